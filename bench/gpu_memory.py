"""The device's memory that an engine holds while nobody captures, with the plugin and without. Part of bench/gpu.py.

Every engine runs in a process of its own, one after the other, inside which PyTorch can be asked what it holds. The
first one of its kind on a machine may hold some tens of MiB more than the next, which is why there are two of each. The
last one captures, until it holds nothing for captures any more and once after that.
"""

from __future__ import annotations

import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor
from typing import Any

from gpu_ratios import ALL, ROUTER
from gpu_setting import Report, Setting, capture, generate, profile, start_engine, stop_engine, wait_idle

ORDER = [False, True, False, True]
WORKLOAD = "decode 256 x (64 + 128)"
MIB = 1 << 20
MEANING = {"warm": "with host memory for the next ones", "after": "without"}


def run_memory(setting: Setting, report: Report) -> bool:
    """Measure, print, and return whether the plugin costs no block of KV cache."""
    engines = []
    for place, tapped in enumerate(ORDER, 1):
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
            engines.append(process.submit(_measure, setting, tapped, place == len(ORDER)).result())
        report.put(memory=engines)
        print(f"# {engines[-1]}", flush=True)
    groups = [[engine for engine in engines if engine["tapped"] is tapped] for tapped in (False, True)]
    plain, idle = ({key: min(state[key] for state in map(_idle, group)) for key in _idle(group[0])} for group in groups)
    last = engines[-1]
    fewer = plain["blocks"] - idle["blocks"]
    report.put(fewer_blocks=fewer, more_bytes={key: idle[key] - plain[key] for key in ("reserved", "driver")})
    for key, meaning in (("reserved", "held by PyTorch beside the KV cache"), ("driver", "held by the driver")):
        print(f"{meaning}: {plain[key] / MIB:.1f} MiB, with the plugin {(idle[key] - plain[key]) / MIB:+.1f}")
    for state in ("warm", "after"):
        more = (last[state]["driver"] - last["idle"]["driver"]) / MIB
        print(f"held by the driver after the first captures, {MEANING[state]}: {more:+.1f} MiB")
    print(f"captures: {last['captures_s']} s, plain {last['plain_s']}")
    print("parts of the first, ms: " + "  ".join(f"{label} {value:.1f}" for label, value in last["first_ms"].items()))
    print(f"{'FAIL' if fewer > 0 else 'PASS'}  blocks of KV cache: {plain['blocks']}, with the plugin {idle['blocks']}")
    return fewer <= 0


def _idle(engine: dict[str, Any]) -> dict[str, int]:
    state = engine["idle"]
    return {
        "blocks": engine["blocks"],
        "reserved": state["reserved"] - engine["kv_bytes"],
        "driver": state["driver"],
    }


def _measure(setting: Setting, tapped: bool, captures: bool) -> dict[str, Any]:
    """Return blocks and bytes of the KV cache, and what is held when idle and after captures, if there are any.

    Of these also how long they take: the first, the next, and the first after all that they held has gone.
    """
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    llm = start_engine(setting, tapped)
    runner = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner
    storages = [cache.untyped_storage() for cache in runner.kv_caches]
    workload = setting.workload(WORKLOAD)
    prompts = setting.prompts(workload)
    generate(llm, prompts, workload[2])
    found: dict[str, Any] = {
        "tapped": tapped,
        "blocks": llm.llm_engine.vllm_config.cache_config.num_gpu_blocks,
        "kv_bytes": sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values()),
        "idle": _held(setting),
    }
    if captures:
        from vllm_tap.engine.capture import idle

        spec = setting.spec(ROUTER if setting.has_experts else ALL)

        def seconds() -> float:
            return capture(setting, llm, prompts, workload[2], spec)[0]

        profile(llm, "host")
        found["captures_s"] = [seconds()]
        found["first_ms"] = {
            f"{label} x {len(times)}": sum(times) * 1e3 for label, times in profile(llm, "")[0].items()
        }
        found["captures_s"].append(seconds())
        wait_idle(llm)
        wait_idle(llm, "is_preparing")
        found["warm"] = _held(setting)
        idle.POOL_LINGER_SECONDS = 0.0  # type: ignore[misc]  # instead of ten minutes
        wait_idle(llm, "capacity_bytes")
        found["after"] = _held(setting)
        found["captures_s"].append(seconds())
        found["plain_s"] = generate(llm, prompts, workload[2])[0]
    stop_engine(llm)
    return found


def _held(setting: Setting) -> dict[str, Any]:
    """Return the bytes that PyTorch holds, those of them in pools of graphs, and those that the driver holds."""
    if not setting.cuda:
        return {"reserved": 0, "graphs": 0, "driver": 0}
    import torch

    torch.cuda.synchronize()
    free, total = torch.cuda.mem_get_info()
    reserved = torch.cuda.memory_reserved()
    graphs = [part["total_size"] for part in torch.cuda.memory_snapshot() if part["segment_pool_id"] != (0, 0)]
    return {"reserved": reserved, "graphs": sum(graphs), "driver": total - free - reserved}

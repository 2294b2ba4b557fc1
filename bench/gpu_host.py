"""What steps that read prompts ask of the host, with and without the plugin. Part of bench/gpu.py (`--plan host`).

Two engines of either kind: those of one kind differ, too. Inside each, every step with a new prompt is timed, and its
page faults are counted: a step of few tokens is launched more slowly than it runs.
"""

from __future__ import annotations

import os
import resource
import statistics
import time
from typing import Any

from gpu_ratios import ALL
from gpu_setting import Report, Setting, capture, generate, start_engine, stop_engine, wait_idle

KINDS = (True, False)
"""Engines with the plugin, and without it."""

COPIES = 2

CASES = [  # (what the engines with the plugin do, prompts, tokens of each, tokens to generate)
    ("idle, before a capture", 1, 64, 1),
    ("idle, before a capture", 1, 400, 1),
    ("idle, before a capture", 8, 64, 4),
    ("all layers", 8, 64, 4),
    ("idle, after captures", 8, 64, 4),
]
ROUNDS = 80

Step = tuple[float, int]
"""(seconds of `execute_model`, page faults of the engine's thread meanwhile)."""


def run_host(setting: Setting, report: Report) -> bool:
    """Run all cases in turn on all engines; return whether there was anything to compare."""
    os.environ["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"  # the plain engines have no calls of ours
    few = {} if setting.smoke else {"gpu_memory_utilization": 0.9 / (COPIES * len(KINDS)), "max_model_len": 2048}
    engines: dict[str, Any] = {}
    for number in range(1, COPIES + 1):
        for tapped in KINDS:
            name = f"{'with' if tapped else 'without'} the plugin, {number}"
            engines[name] = start_engine(setting, tapped, **few)
            engines[name].collective_rpc(watch_steps)
    warm = (8, 64, 16) if not setting.smoke else (2, 8, 2)
    rows: list[dict[str, Any]] = []
    for what, *workload in CASES:
        size = (workload[0], workload[1] if not setting.smoke else 8, workload[2])
        spec = setting.spec(ALL) if what == ALL else None
        for name, llm in engines.items():
            generate(llm, setting.prompts(warm), warm[2])
            if spec is not None and name.startswith("with "):
                capture(setting, llm, setting.prompts(size), size[2], spec)
                wait_idle(llm)
                wait_idle(llm, "is_preparing")
        rows += _measured(setting, engines, what, size, spec)
        report.put(rows=rows)
    for llm in engines.values():
        stop_engine(llm)
    return bool(rows)


def _measured(
    setting: Setting, engines: dict[str, Any], what: str, size: tuple[int, int, int], spec: dict[str, Any] | None
) -> list[dict[str, Any]]:
    times: dict[str, list[float]] = {name: [] for name in engines}
    for llm in engines.values():
        llm.collective_rpc(take_steps)
    for _ in range(setting.rounds(ROUNDS)):
        prompts = setting.prompts(size)
        for name in setting.random.sample(list(engines), len(engines)):
            if spec is not None and name.startswith("with "):
                times[name].append(capture(setting, engines[name], prompts, size[2], spec)[0])
            else:
                times[name].append(generate(engines[name], prompts, size[2])[0])
    rows = []
    for name, llm in engines.items():
        steps: list[Step] = llm.collective_rpc(take_steps)[0]
        row = {
            "case": what if name.startswith("with ") else "plain",
            "workload": "{} x ({} + {})".format(*size),
            "engine": name,
            "ms": statistics.mean(times[name]) * 1e3,
            "error_ms": statistics.stdev(times[name]) * 1e3 / len(times[name]) ** 0.5 if len(times[name]) > 1 else 0.0,
            "host_ms": statistics.mean(seconds for seconds, _ in steps) * 1e3,
            "faults": statistics.mean(faults for _, faults in steps),
        }
        print(
            f"{row['workload']:12s} {name:22s} {row['case']:24s} {row['ms']:7.2f} +- {row['error_ms']:.2f} ms  a step "
            f"that reads prompts: {row['host_ms']:6.2f} ms of the host, {row['faults']:6.1f} page faults",
            flush=True,
        )
        rows.append(row)
    return rows


def watch_steps(worker: Any) -> None:
    """In a worker: time its steps that have new prompts from now on."""
    runner, steps = worker.model_runner, list[Step]()
    execute = runner.execute_model

    def execute_model(scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        before, begin = resource.getrusage(resource.RUSAGE_THREAD).ru_minflt, time.perf_counter()
        result = execute(scheduler_output, *args, **kwargs)
        seconds = time.perf_counter() - begin
        if scheduler_output.scheduled_new_reqs:
            steps.append((seconds, resource.getrusage(resource.RUSAGE_THREAD).ru_minflt - before))
        return result

    runner.execute_model, runner.steps_with_prompts = execute_model, steps


def take_steps(worker: Any) -> list[Step]:
    """In a worker: return what was collected, and forget it."""
    steps = worker.model_runner.steps_with_prompts
    taken = list(steps)
    steps.clear()
    return taken

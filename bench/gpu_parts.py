"""Where a capture's time goes: start, finish, check, the host's part of a step, copies. Part of bench/gpu.py."""

from __future__ import annotations

import statistics
import time
from typing import Any

from gpu_setting import WORKLOADS, Setting, capture, generate, profile

STEP = ("arm", "drain", "sampled")
USUAL = ("decode 8 x (64 + 128)", "decode 256 x (64 + 128)", "prefill 64 x 1000", "prefill 16 x 8000")


def measure_parts(setting: Setting, llm: Any, d2h: float, begin: str, rounds: int = 5) -> list[dict[str, Any]]:
    """Return the parts of captures of all layers, profiled, for each workload whose name begins like this.

    If all do, for the usual ones.
    """
    rows = []
    for name in [name for name in WORKLOADS if name.startswith(begin)] if begin else USUAL:
        few = min(rounds, 3) if name.startswith("prefill") else rounds
        rows.append(_parts(setting, llm, name, d2h, setting.rounds(few)))
    return rows


def _parts(setting: Setting, llm: Any, name: str, d2h: float, rounds: int) -> dict[str, Any]:
    workload = setting.workload(name)
    spec = setting.spec("all layers")

    def once() -> Any:
        return capture(setting, llm, setting.prompts(workload), workload[2], spec)[1]

    once()
    row: dict[str, Any] = {"workload": name, "call_ms": _call_ms(setting, llm, workload, rounds)}
    client = _watch_client()
    profile(llm, "host")
    seconds = [dict(once().seconds) for _ in range(rounds)]
    worker = profile(llm, "dma")[0]
    row["ms"] = {key: statistics.median(part[key] for part in seconds) * 1e3 for key in seconds[0]}
    row["client_ms"] = {label: statistics.median(times) * 1e3 for label, times in client.stop().items()}
    row["worker_ms"] = {
        f"{label} x {len(times) / rounds:g}": statistics.median(times) * 1e3
        for label, times in worker.items()
        if label not in STEP
    }
    row["step_us"] = {label: usual(worker[label]) * 1e6 for label in STEP}
    row["step_us"]["sum"] = sum(row["step_us"].values())
    for _ in range(rounds):
        once()
    row["dma"] = [_copies(rank, d2h) for rank in profile(llm, "") if rank.get("copy_seconds")]
    return row


def usual(times: list[float]) -> float:
    """Return the mean without the longest twentieth: prefill steps and the first of a shape are few, and cost more."""
    return statistics.mean(sorted(times)[: len(times) - len(times) // 20])


def _call_ms(setting: Setting, llm: Any, workload: Any, rounds: int) -> dict[str, float]:
    """Return what a call costs in an idle engine, and as the first thing after a plain generation."""
    times: dict[str, list[float]] = {"idle": [], "after generate": []}
    for _ in range(rounds):
        generate(llm, setting.prompts(workload), min(workload[2], 4))
        for label in ("after generate", "idle"):
            begin = time.perf_counter()
            llm.collective_rpc("vllm_tap_status")
            times[label].append(time.perf_counter() - begin)
            time.sleep(0.02)
    return {label: statistics.median(values) * 1e3 for label, values in times.items()}


def _watch_client() -> Any:
    from vllm_tap.client import connection, recording
    from vllm_tap.engine.capture.profile import Profile

    watched = Profile()
    watched.watch(connection.Connection, "ask", "start: send")
    watched.watch(recording.Recording, "started", "start: wait")
    watched.watch(recording, "Sequences", "finish: sequences")
    watched.watch(recording.Recording, "_finished", "finish: wait and lease")
    watched.watch(connection.Connection, "_memory", "finish: lease")
    watched.watch(recording, "RankRows", "check: rows")
    return watched


def _copies(figures: dict[str, list[float]], d2h: float) -> dict[str, Any]:
    """Return what copies took in the mean of captures, and of each the bytes and the milliseconds.

    `latest_ms` is by how much the slowest one was late: one copy that had to wait tells by itself why a rate is low.
    """
    busy, nbytes = sum(figures["copy_seconds"]), sum(figures["copy_bytes"])
    each = zip(figures["copy_seconds"], figures["copy_bytes"], strict=True)
    after = statistics.median(figures.get("after_forward", [0.0]))
    copying = statistics.median(figures.get("copying_after_forward", [0.0]))
    captures = max(len(figures.get("after_forward", [])), 1)
    return {
        "copies": len(figures["copy_seconds"]) / captures,
        "gigabytes": nbytes / captures / 1e9,
        "busy_ms": busy / captures * 1e3,
        "gb_per_s": nbytes / busy / 1e9,
        "share_of_d2h": nbytes / busy / 1e9 / d2h,
        "latest_ms": max(seconds * 1e3 - size / d2h / 1e6 for seconds, size in each),
        "after_forward_ms": after * 1e3,
        "stall_ms": (after - copying) * 1e3,
        "each_bytes": figures["copy_bytes"],
        "each_ms": [seconds * 1e3 for seconds in figures["copy_seconds"]],
    }


def show_parts(rows: list[dict[str, Any]]) -> None:
    """Print the table."""
    if rows:
        print("\nparts of a capture of all layers, ms (medians, profiled)")
    for row in rows:
        print(f"{row['workload']}")
        for title, unit in (("ms", "capture"), ("client_ms", "in the client"), ("worker_ms", "in worker 0")):
            print(f"    {unit:16s}" + "  ".join(f"{label} {value:.3f}" for label, value in row[title].items()))
        calls, step = row["call_ms"], row["step_us"]
        print(f"    {'bare call':16s}" + "  ".join(f"{label} {value:.3f}" for label, value in calls.items()))
        print(f"    {'host, us a step':16s}" + "  ".join(f"{label} {value:.1f}" for label, value in step.items()))
        for rank, copies in enumerate(row["dma"]):
            means = {label: value for label, value in copies.items() if not label.startswith("each")}
            print(f"    {f'copies, rank {rank}':16s}" + "  ".join(f"{label} {v:.3f}" for label, v in means.items()))

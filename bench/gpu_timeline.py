"""Where the device's time goes in a step, idle and capturing, from PyTorch's profiler. Part of bench/gpu.py.

Every operation on the stream of the model costs what passes from the end of the one before it to its own end, the gap
before it included; so the costs of a step add up to its length, and the tap's show what it adds to the step. Steps of
prefill differ in length: there the costs are of all of them together.
"""

from __future__ import annotations

import gzip
import json
import tempfile
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from gpu_setting import Setting, capture, generate

WORKLOADS = {**{f"decode {n} x (64 + 128)": 24 for n in (8, 64, 256)}, "prefill 64 x 1000": 1}
"""How many tokens to generate: traces are large."""

HOST_GAP_US = 40.0
"""A gap longer than this is the host's, which the profiler slows down, and no cost of the device."""

MORE_STEPS = 3
"""Most steps beyond the number of generated tokens: prompts may take several."""

KEPT, SHOWN = 24, 12
"""Operations of a workload in the results file, and in the table."""


class Operation(NamedTuple):
    """A kernel or copy on the device, times in microseconds."""

    name: str
    stream: int
    begin: float
    end: float


def arguments() -> dict[str, Any]:
    """Return what an engine needs to be profiled: a folder of traces. Costs nothing until a profile is started."""
    folder = tempfile.mkdtemp(prefix="vllm-tap-trace-")
    options = {"torch_profiler_with_stack": False, "torch_profiler_dump_cuda_time_total": False}
    return {"profiler_config": {"profiler": "torch", "torch_profiler_dir": folder, **options}}


def measure_timeline(
    setting: Setting, plain: Any, tapped: Any, specs: Sequence[str], begin: str
) -> list[dict[str, Any]]:
    """Return what operations cost, for each workload whose name begins like this: plain if there is such an engine,
    idle, and capturing each of the specifications.
    """
    return [
        _compare(setting, plain, tapped, specs, name, max_tokens)
        for name, max_tokens in WORKLOADS.items()
        if name.startswith(begin)
    ]


def _compare(
    setting: Setting, plain: Any, tapped: Any, specs: Sequence[str], name: str, max_tokens: int
) -> dict[str, Any]:
    prompts = setting.prompts(setting.workload(name))
    arms: dict[str, tuple[Any, Callable[[], object]]] = {
        "plain": (plain, lambda: generate(plain, prompts, max_tokens)),
        "idle": (tapped, lambda: generate(tapped, prompts, max_tokens)),
    }
    for spec in specs:
        arms[spec] = tapped, lambda spec=spec: capture(setting, tapped, prompts, max_tokens, setting.spec(spec))
    found = {arm: _costs(_trace(llm, run), max_tokens) for arm, (llm, run) in arms.items() if llm is not None}
    names = {name for costs in found.values() for name in costs}
    more = {name: max(abs(_us(found[spec], name) - _us(found["idle"], name)) for spec in specs) for name in names}
    chosen = sorted(names, key=lambda name: -more[name])[:KEPT]
    return {
        "workload": name,
        "us": {arm: sum(us for _, us in costs.values()) for arm, costs in found.items()},
        "operations": {name: {arm: costs.get(name, (0.0, 0.0)) for arm, costs in found.items()} for name in chosen},
    }


def _us(costs: dict[str, tuple[float, float]], name: str) -> float:
    return costs.get(name, (0.0, 0.0))[1]


def _trace(llm: Any, run: Callable[[], object]) -> list[Operation]:
    folder = Path(llm.llm_engine.vllm_config.profiler_config.torch_profiler_dir)
    run()
    before = set(folder.glob("*.gz"))
    llm.start_profile()
    run()
    llm.stop_profile()
    (path,) = set(folder.glob("*.gz")) - before
    with gzip.open(path) as file:
        events = json.load(file)["traceEvents"]
    path.unlink()
    on_device = [event for event in events if event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")]
    found = [Operation(e["name"], e["args"]["stream"], e["ts"], e["ts"] + e["dur"]) for e in on_device]
    return sorted(found, key=lambda operation: operation.begin)


def _costs(operations: list[Operation], max_tokens: int) -> dict[str, tuple[float, float]]:
    """Return how often each operation ran and its microseconds: per step in the steady steps, or all of prefill."""
    streams = Counter(operation.stream for operation in operations)
    main = [operation for operation in operations if operation.stream == streams.most_common(1)[0][0]]
    first, last, num_steps = (0, len(main) - 1, 1) if max_tokens == 1 else _steady(main, max_tokens)
    us: dict[str, list[float]] = defaultdict(list)
    end = main[first].end
    for operation in main[first + 1 : last + 1]:
        cost = operation.end - end
        if operation.begin - end > HOST_GAP_US:
            us["(host)"].append(operation.begin - end)
            cost = operation.end - operation.begin
        us[_short(operation.name)].append(max(cost, 0.0))
        end = max(end, operation.end)
    return {name: (len(values) / num_steps, sum(values) / num_steps) for name, values in us.items()}


def _steady(main: list[Operation], steps: int) -> tuple[int, int, int]:
    """Return the places before the first of the steady steps and at the end of the last, and how many steps that is."""
    # What runs once a step marks the steps; the last of such kernels, so that a step is whole.
    counts = Counter(operation.name for operation in main)
    once = [operation.name for operation in main if 0 <= counts[operation.name] - steps <= MORE_STEPS]
    if not once:
        print(f"# timeline: no operation ran {steps} times: {counts.most_common(SHOWN)}", flush=True)
        return 0, 0, 1
    marks = [place for place, operation in enumerate(main) if operation.name == once[-1]]
    first, last = marks[min(3, len(marks) // 2 - 1)], marks[-1]
    return first, last, len([mark for mark in marks if first < mark <= last])


def _short(name: str) -> str:
    return name.split("<")[0].split("(")[0].removeprefix("void ")[:70] or name[:70]


def show_timeline(rows: list[dict[str, Any]]) -> None:
    """Print the table: operations by what they cost more when capturing than idle."""
    for row in rows:
        totals = ", ".join(f"{arm} {us:.1f}" for arm, us in row["us"].items())
        what = "all steps" if row["workload"].startswith("prefill") else "a step"
        print(f"\n{what} of {row['workload']}, us on the device (profiled): {totals}")
        for name, arms in list(row["operations"].items())[:SHOWN]:
            cells = "".join(f"{times:8.1f} x {us:9.1f}" for times, us in arms.values())
            more = "".join(f"{us - arms['idle'][1]:+11.1f}" for arm, (_, us) in arms.items() if arm != "idle")
            print(f"    {name:70s}{cells}{more}")

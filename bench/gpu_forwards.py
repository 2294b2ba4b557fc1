"""When the forward passes of a generation run on the device, plain and captured. Part of bench/gpu.py.

What captures cost is where these times differ: before the first forward pass, in the passes, between them, or at the
end.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from gpu_power import Power
from gpu_ratios import ALL, FEW, ROUTER
from gpu_setting import WORKLOADS, Setting, capture, generate, profile

IDLE = "idle"
ARMS = IDLE, ALL, *FEW, "last position, embeddings"

LONG = 1.5
"""Passes longer than so many times the median are told apart: among those of decoding, the ones that read prompts."""


def measure_forwards(setting: Setting, llm: Any, begin: str, rounds: int = 5) -> list[dict[str, Any]]:
    """Return the times of every arm for each workload whose name begins like this; one engine, arms in turn."""
    rows = []
    power = Power()
    for name in [name for name in WORKLOADS if name.startswith(begin)]:
        arms = [*ARMS, *([ROUTER] if setting.has_experts else [])]
        seen: dict[str, list[dict[str, float]]] = {arm: [] for arm in arms}
        for round_number in range(-1, setting.rounds(rounds)):
            prompts = setting.prompts(setting.workload(name))
            setting.random.shuffle(arms)
            # Once for nothing: a device that has been at rest is cooler, and faster at first.
            _run(setting, llm, name, prompts, IDLE, power)
            for arm in arms:
                figures = _run(setting, llm, name, prompts, arm, power)
                if round_number >= 0:
                    seen[arm].append(figures)
        rows += [{"workload": name, "arm": arm, "ms": values} for arm, values in seen.items()]
    return rows


def _run(setting: Setting, llm: Any, name: str, prompts: list[Any], arm: str, power: Power) -> dict[str, float]:
    max_tokens = setting.workload(name)[2]
    profile(llm, "forward")
    with power, _requests_sent(llm) as sent:
        begun = time.perf_counter()
        if arm == IDLE:
            generate(llm, prompts, max_tokens)
        else:
            capture(setting, llm, prompts, max_tokens, setting.spec(arm))
        ended = time.perf_counter()
    return _times(profile(llm, "")[0], sent, begun, ended) | power.figures


@contextmanager
def _requests_sent(llm: Any) -> Iterator[list[float]]:
    """Collect when the client sends its requests."""
    core = llm.llm_engine.engine_core
    add_request, sent = core.add_request, list[float]()

    def watched(*args: Any, **kwargs: Any) -> Any:
        sent.append(time.perf_counter())
        return add_request(*args, **kwargs)

    core.add_request = watched
    try:
        yield sent
    finally:
        del core.add_request


def _times(figures: dict[str, list[float]], sent: list[float], begun: float, ended: float) -> dict[str, float]:
    """Return where the time went, in milliseconds; without a device, the host's times stand for the device's."""
    armed = figures["arm at"]
    begins, ends = figures.get("begins at", armed), figures.get("ends at", figures["drain at"])
    # A step without tokens ends without having begun.
    passes = [(a, next(b for b in ends if b >= a)) for a in begins]
    lengths, gaps = [b - a for a, b in passes], [b[0] - a[1] for a, b in itertools.pairwise(passes)]
    usual = statistics.median(lengths)
    seconds = {
        "all": ended - begun,
        "first sent": sent[0] - begun,
        "last sent": sent[-1] - begun,
        "first seen": figures["expect at"][0] - begun,
        "first armed": armed[0] - begun,
        "first begins": begins[0] - armed[0],
        "passes": sum(lengths),
        "usual pass": usual,
        "much longer": sum(length for length in lengths if length > LONG * usual),
        "between": sum(gaps),
        "usual gap": statistics.median(gaps) if gaps else 0.0,
        "end": ended - passes[-1][1],
        "first pass": passes[0][1] - begins[0],
    }
    return {label: value * 1e3 for label, value in seconds.items()} | {"steps": len(passes)}


def show_forwards(rows: list[dict[str, Any]]) -> None:
    """Print the medians."""
    if rows:
        print("\nforward passes on the device, ms (medians)")
    for row in rows:
        medians = {label: statistics.median(ms[label] for ms in row["ms"]) for label in row["ms"][0]}
        text = "  ".join(f"{label} {value:.2f}" for label, value in medians.items())
        print(f"    {row['workload']:24s} {row['arm']:26s} {text}")

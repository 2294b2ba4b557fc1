"""What the timeline of bench/gpu.py makes of a trace."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture
def timeline(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module, which is no part of a package."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[3] / "bench"))
    import gpu_timeline

    yield gpu_timeline
    for name in ("gpu_timeline", "gpu_setting"):
        sys.modules.pop(name)


def test_costs_of_a_step_add_up_to_its_length(timeline: Any) -> None:
    """Six steps of 100 us: two layers of a matmul and a tap, then a sampler; copies on another stream do not count."""
    operations = []
    for step in range(6):
        start = 100.0 * step
        spans = [("matmul", 0, 30), ("tap", 31, 33), ("matmul", 33, 60), ("tap", 62, 63), ("sampler", 65, 100)]
        operations += [timeline.Operation(name, 7, start + begin, start + end) for name, begin, end in spans]
        operations.append(timeline.Operation("copy", 9, start + 33, start + 90))
    costs = timeline._costs(operations, 6)
    assert costs == {"matmul": (2, 30 + 27), "tap": (2, 3 + 3), "sampler": (1, 37)}


def test_a_long_gap_is_the_hosts(timeline: Any) -> None:
    """The device waited for the host: that is no cost of the operation that came after."""
    spans = [(name, 500.0 * step + begin) for step in range(6) for name, begin in (("a", 0), ("b", 10), ("b", 30))]
    operations = [timeline.Operation(name, 1, begin, begin + 10) for name, begin in spans]
    assert timeline._costs(operations, 6) == {"a": (1, 10), "b": (2, 10 + 20), "(host)": (1, 460)}


def test_all_of_prefill_is_added_up(timeline: Any) -> None:
    """Steps of prefill differ in length; what is on the stream of the model counts, from the end of its first work."""
    spans = [("a", 0, 10), ("b", 10, 30), ("a", 31, 36), ("b", 36, 100)]
    operations = [timeline.Operation(name, 1, float(begin), float(end)) for name, begin, end in spans]
    assert timeline._costs(operations, 1) == {"b": (2, 20 + 64), "a": (1, 6)}

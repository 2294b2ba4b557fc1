"""What bench/gpu.py --forwards makes of the times of a generation."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest


def test_the_parts_of_a_generation_add_up_to_all_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step without tokens ends and has not begun: it belongs to what is between passes, or behind them."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[3] / "bench"))
    import gpu_forwards

    figures = {
        "expect at": [10.5, 12.0],
        "arm at": [11.0, 12.5],
        "drain at": [11.2, 12.6, 17.0],
        "begins at": [11.5, 14.0],
        "ends at": [13.0, 16.0, 17.0],
    }
    ms = gpu_forwards._times(figures, [10.1, 10.2], 10.0, 18.0)
    for name in ("gpu_forwards", "gpu_power", "gpu_ratios", "gpu_setting"):
        sys.modules.pop(name)
    assert ms["passes"] == pytest.approx(1500 + 2000)
    assert ms["between"] == pytest.approx(1000)
    assert ms["end"] == pytest.approx(2000)
    assert (ms["first sent"], ms["last sent"]) == (pytest.approx(100), pytest.approx(200))
    assert ms["first armed"] + ms["first begins"] + ms["passes"] + ms["between"] + ms["end"] == pytest.approx(ms["all"])
    assert ms["steps"] == 2

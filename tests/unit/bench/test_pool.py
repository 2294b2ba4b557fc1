"""Rounds of several calls of bench/gpu.py in one table."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture
def pool(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module, which is no part of a package."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[3] / "bench"))
    import gpu_pool

    yield gpu_pool.pool
    for name in ("gpu_pool", "gpu_ratios", "gpu_setting"):
        sys.modules.pop(name)


def call(unit: float, plain: list[float], tapped: list[float], **other: Any) -> dict[str, Any]:
    """Results of a call on an engine that takes `unit` seconds for what others do in one."""

    def row(arm: str, times: list[float], **more: Any) -> dict[str, Any]:
        times = [unit * seconds for seconds in times]
        steps = [{"steps": 3, "step_ms": 1e3 * seconds} for seconds in times]
        seconds = sorted(times)[len(times) // 2]
        row = {"workload": "decode 8", "arm": arm, "all": times, "seconds": seconds, "steps": steps, "bytes": 0}
        return row | {"parts": {}, "generate": [], "segments_gb": []} | more

    parts = {"generate": unit, "finish": 0.001}
    return {
        "machine": {"gpu": "Some GPU"},
        "command": f"bench/gpu.py --plan {len(plain)}",
        "shape": "tiny",
        "plain": "engine without the plugin",
        "rates_gb_per_s": {"d2h": 50 + unit},
        "checks": {},
        "rows": [row("plain", plain), row("all", tapped, bytes=7, parts=parts, generate=[unit] * len(tapped))],
    } | other


def test_calls_of_unlike_engines_count_by_their_rounds(pool: Any) -> None:
    """The second engine takes ten times as long: what a capture costs there is a share of that, not of the first's."""
    pooled = pool([call(1.0, [1, 1, 1], [1.25, 1.25, 1.25]), call(10.0, [1] * 5, [2.0, 2.0, 2.0, 2.0, 1.25])])
    rows = {row["arm"]: row for row in pooled["rows"]}
    assert pooled["num_calls"] == 2
    assert pooled["command"] == "bench/gpu.py --plan 3`, `bench/gpu.py --plan 5"
    assert len(rows["all"]["all"]) == len(rows["all"]["steps"]) == len(rows["all"]["generate"]) == 8
    assert rows["plain"]["ratio"] == pytest.approx(1.0)
    # Eight rounds: 1.25 four times, 2 four times.
    assert rows["all"]["ratio"] == pytest.approx(1 / 1.625)
    assert rows["all"]["paired"] == pytest.approx((1 / 1.25 + 1 / 2) / 2)
    assert rows["all"]["bytes"] == 7
    assert rows["all"]["parts"]["finish"] == 0.001


def test_what_was_put_together_is_put_together_with_more(pool: Any) -> None:
    """As if it had been done at once."""
    calls = [
        call(unit, [1.0, 1.1, 1.2], [1.25 + unit / 10, 1.5, 1.75], checks={"unit": unit}) for unit in (1.0, 10.0, 3.0)
    ]
    at_once, one_by_one = pool(calls), pool([pool(calls[:2]), calls[2]])
    for first, second in zip(at_once["rows"], one_by_one["rows"], strict=True):
        for key in ("ratio", "paired"):
            assert second[key] == pytest.approx(first[key])
        assert second["steps"] == first["steps"]
    for key in ("command", "num_calls", "checks", "rates_gb_per_s", "parts"):
        assert one_by_one[key] == at_once[key]


def test_a_workload_of_one_call_stays_as_it_was(pool: Any) -> None:
    """As where one plan has more workloads than another; of each, the calls have the same arms."""
    first, second = call(1.0, [1, 1, 1], [2, 2, 2]), call(1.0, [1, 1, 1], [4, 4, 4])
    for row in second["rows"]:
        row["workload"] = "decode 64"
    rows = pool([first, second])["rows"]
    assert [(row["workload"], row["arm"], row["ratio"]) for row in rows if row["arm"] == "all"] == [
        ("decode 8", "all", 0.5), ("decode 64", "all", 0.25)
    ]  # fmt: skip
    second["rows"][0]["workload"] = "decode 8"
    with pytest.raises(ValueError, match=r"decode 8: .* the same arms .*, got \['plain'\] in one"):
        pool([first, second])


def test_calls_on_unlike_machines_are_not_put_together(pool: Any) -> None:
    """Nor what measured no ratios."""
    with pytest.raises(ValueError, match=r"calls of one machine can be put together, got .*Some GPU.* and .*Another"):
        pool([call(1.0, [1], [1]), call(1.0, [1], [1], machine={"gpu": "Another GPU"})])
    with pytest.raises(ValueError, match=r"calls that measured ratios .*, got bench/gpu.py --plan 1"):
        pool([call(1.0, [1], [1], rows=[])])

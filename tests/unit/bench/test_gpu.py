"""How much of the device each engine of bench/gpu.py takes."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture
def share(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., float]]:
    """The function, of a module that is no part of a package, on options as the command line makes them."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[3] / "bench"))
    before = set(sys.modules)
    import gpu

    def of(**given: Any) -> float:
        options = {"plan": "decode", "pairs": 1, "no_plain": False, "apart": False, "memory": None, **given}
        return gpu.memory_of_each(argparse.Namespace(**options))

    yield of
    for name in set(sys.modules) - before:
        if name.startswith("gpu"):
            sys.modules.pop(name)


@pytest.mark.parametrize("options", [{}, {"pairs": 2}, {"pairs": 4}, {"pairs": 3, "no_plain": True}])
def test_engines_side_by_side_fit_unless_told_otherwise(share: Callable[..., float], options: dict[str, Any]) -> None:
    num_engines = options.get("pairs", 1) * (1 if "no_plain" in options else 2)
    assert 0.8 <= num_engines * share(**options) <= 0.9


def test_more_than_there_is_is_refused_before_an_engine_starts(share: Callable[..., float]) -> None:
    with pytest.raises(ValueError, match=r"--memory 0.4 is too much for 4 engines .* at most 0.25"):
        share(pairs=2, memory=0.4)
    assert share(memory=0.48) == 0.48


@pytest.mark.parametrize("alone", [{"plan": "memory"}, {"plan": "tp2", "apart": True}, {"no_plain": True}])
def test_engines_that_run_one_after_the_other_may_have_nearly_all(
    share: Callable[..., float], alone: dict[str, Any]
) -> None:
    assert share(memory=0.92, **alone) == 0.92

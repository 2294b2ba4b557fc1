"""Ends of processes whose engines are at work, a few of those that `tests/exits.py` repeats. Beside the tests."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from exits import Exit, run

pytestmark = pytest.mark.engine


@pytest.mark.parametrize(
    "how",
    [
        Exit("pool", "own", "held"),  # rows and engine live to the end
        Exit("generate", "own", "interrupted"),  # an exception in the midst of a capture
        Exit("generate", "same", "dropped"),  # all threads of the worker are in the process that ends
    ],
    ids=str,
)
def test_a_process_ends_without_a_fault(how: Exit, tiny_model: Callable[..., Path]):
    """Its status is 0, and neither its log nor that of its engine has a fault in it."""
    end = run(how, tiny_model("llama"))
    assert not end.fault, f"{end.fault}\n{end.log[-4000:]}"

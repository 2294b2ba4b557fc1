"""Fixtures of the tests that start vLLM engines; runs in the test process."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from engine.engines import References, largest

# A worker that has been told to end waits this long for something to happen; nothing does.
os.environ.setdefault("VLLM_WORKER_SHUTDOWN_TIMEOUT_SECONDS", "1")


@pytest.fixture(scope="session")
def references(tiny_model: Callable[..., Path]) -> Callable[[str], References]:
    """A function (family) that returns Hugging Face's forward passes of that tiny model."""
    known: dict[str, References] = {}

    def get(family: str) -> References:
        if family not in known:
            known[family] = References(tiny_model(family))
        return known[family]

    return get


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say how far rows were off, at most: of what the tolerance is."""
    if largest:
        errors = ", ".join(f"{stream} {error:.2g}" for stream, error in sorted(largest.items()))
        terminalreporter.write_line(f"largest errors, of the scale of a stream: {errors}")

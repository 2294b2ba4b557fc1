"""Fixtures of the tests that start vLLM engines; runs in the test process."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from engine.engines import References

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

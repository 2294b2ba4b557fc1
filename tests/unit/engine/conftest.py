"""The simulated device of these tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from simulated_cuda import SimulatedCuda, simulated_cuda
from simulated_engine import GRAPH_TOKENS
from vllm_tap.engine.cuda import graphs, kernel, operator
from vllm_tap.engine.cuda import sink as device_sink
from vllm_tap.engine.cuda.slab import SlabKeeper


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[SimulatedCuda]:
    """A device whose limits are low, so that small steps go all ways."""
    monkeypatch.setattr(device_sink, "MIN_STAGED_ROWS", GRAPH_TOKENS)
    monkeypatch.setattr(graphs, "FEW_TAPS", 1)
    monkeypatch.setattr(kernel, "LARGE_ROWS", GRAPH_TOKENS)
    monkeypatch.setattr(kernel, "MOST_ROWS", 8)
    monkeypatch.setattr(SlabKeeper, "_start", lambda _: None)
    monkeypatch.setattr(operator, "_by_pointer", {})
    with simulated_cuda() as cuda:
        yield cuda

"""Fixtures of the tests that are made for a GPU; those with engines run on a CPU as well."""

from __future__ import annotations

import pytest

import device
from real_cuda import RealCuda
from simulated_engine import GRAPH_TOKENS
from vllm_tap.engine.cuda import graphs, kernel, operator
from vllm_tap.engine.cuda import sink as device_sink
from vllm_tap.engine.cuda.slab import SlabKeeper


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> RealCuda:
    """The device, with limits so low that small steps go all ways."""
    if not device.ON_CUDA:
        pytest.skip("runs on a GPU: make test-gpu")
    monkeypatch.setattr(device_sink, "MIN_STAGED_ROWS", GRAPH_TOKENS)
    monkeypatch.setattr(graphs, "FEW_TAPS", 1)
    monkeypatch.setattr(kernel, "LARGE_ROWS", GRAPH_TOKENS)
    monkeypatch.setattr(kernel, "MOST_ROWS", 8)
    monkeypatch.setattr(SlabKeeper, "_start", lambda _: None)
    monkeypatch.setattr(operator, "_by_pointer", {})
    return RealCuda()

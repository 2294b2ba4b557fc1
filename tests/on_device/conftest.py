"""Fixtures of the tests that are made for a GPU; those with engines run on a CPU as well."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

import device
import simulated_engine
from real_cuda import RealCuda
from vllm_tap.engine.cuda import graphs, kernel, operator
from vllm_tap.engine.cuda import sink as device_sink
from vllm_tap.engine.cuda.slab import SlabKeeper
from vllm_tap.transport.segment.pool import SegmentPool


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[RealCuda]:
    """The device, with limits so low that small steps go all ways."""
    if not device.ON_CUDA:
        pytest.skip("runs on a GPU: make test-gpu")
    monkeypatch.setattr(device_sink, "MIN_STAGED_ROWS", simulated_engine.GRAPH_TOKENS)
    monkeypatch.setattr(graphs, "FEW_TAPS", 1)
    monkeypatch.setattr(kernel, "LARGE_ROWS", simulated_engine.GRAPH_TOKENS)
    monkeypatch.setattr(kernel, "MOST_ROWS", 8)
    monkeypatch.setattr(SlabKeeper, "_start", lambda _: None)
    monkeypatch.setattr(operator, "_by_pointer", {})
    pools: list[SegmentPool] = []

    def pool(*args: Any, **options: Any) -> SegmentPool:
        pools.append(SegmentPool(*args, **options))
        return pools[-1]

    monkeypatch.setattr(simulated_engine, "SegmentPool", pool)
    real = RealCuda()
    yield real
    real.synchronize()
    for one in pools:  # memory that is pinned must not be given back
        one.close()

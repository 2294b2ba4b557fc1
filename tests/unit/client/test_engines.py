"""Which of several data parallel engines runs a captured request, and how its workers are called."""

from __future__ import annotations

import asyncio
import contextlib
from types import SimpleNamespace
from typing import Any

import pytest

from vllm_tap.client.engines import Engines
from vllm_tap.vllm import asynchronous


def engines(num: int) -> Engines:
    """Return engines to which nobody is connected."""
    connections: Any = {number: SimpleNamespace() for number in range(num)}
    return Engines(connections)


@pytest.mark.parametrize("num", [1, 2, 5])
def test_requests_are_spread(num: int) -> None:
    """Those at a time evenly, those behind one another in turn, and an engine that has more gets none."""
    of_all = engines(num)
    with contextlib.ExitStack() as running:
        for _ in range(3 * num):
            running.enter_context(of_all.least_busy().busy(1))
        assert [one.num_requests for one in of_all.lives] == [3] * num
        with of_all.lives[0].busy(1):
            assert (of_all.least_busy().engine == 0) == (num == 1)
        assert of_all.least_busy(of_all.lives[-1:]).engine == num - 1
    assert [one.num_requests for one in of_all.lives] == [0] * num
    assert sorted(of_all.least_busy().engine for _ in range(2 * num)) == sorted(list(range(num)) * 2)


@pytest.mark.parametrize("num", [1, 3])
def test_workers_of_an_engine_are_called(num: int) -> None:
    """Those of the engine alone; with one engine, by what vLLM offers."""
    called: list[Any] = []

    class Core:
        core_engines = tuple(b"%d" % number for number in range(num))

        async def _call_utility_async(self, *arguments: Any, engine: bytes) -> list[str]:
            called.append((*arguments, engine))
            return ["said"]

    async def collective_rpc(method: str) -> list[str]:
        called.append(method)
        return ["said"]

    llm = SimpleNamespace(engine_core=Core(), collective_rpc=collective_rpc)
    assert asyncio.run(asynchronous.call(llm, "open", num - 1)) == ["said"]
    assert called == ["open" if num == 1 else ("collective_rpc", "open", None, (), None, b"2")]
    assert asynchronous.route(llm, num - 1) == ({} if num == 1 else {"data_parallel_rank": 2})

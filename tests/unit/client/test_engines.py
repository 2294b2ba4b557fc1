"""Which of several data parallel engines runs a captured request, and how its workers are called."""

from __future__ import annotations

import asyncio
import contextlib
from types import SimpleNamespace
from typing import Any

import pytest

from vllm_tap.client import engines as engines_module
from vllm_tap.client.engines import Engines
from vllm_tap.errors import CaptureError, SpecError, TapError
from vllm_tap.vllm import asynchronous


def engines(num: int) -> Engines:
    """Return engines to which nobody is connected."""
    connections: Any = {number: SimpleNamespace() for number in range(num)}
    llm = SimpleNamespace(engine_core=SimpleNamespace(core_engines=list(range(num))))
    return Engines(llm, connections)


@pytest.mark.parametrize("num", [1, 2, 5])
def test_requests_are_spread(num: int) -> None:
    """Those at a time evenly, those behind one another in turn, and an engine that has more gets none."""
    of_all = engines(num)
    with contextlib.ExitStack() as running:
        for _ in range(3 * num):
            running.enter_context(of_all.least_busy().counted(1))
        assert [one.num_requests for one in of_all.lives] == [3] * num
        with of_all.lives[0].counted(1):
            assert (of_all.least_busy().engine == 0) == (num == 1)
        assert of_all.least_busy(of_all.lives[-1:]).engine == num - 1
    assert [one.num_requests for one in of_all.lives] == [0] * num
    assert sorted(of_all.least_busy().engine for _ in range(2 * num)) == sorted(list(range(num)) * 2)


@pytest.mark.parametrize(
    ("failed", "is_fault"), [(CaptureError("it broke"), True), (SpecError("no such layer"), False)]
)
def test_an_engine_that_cannot_capture_comes_last(
    monkeypatch: pytest.MonkeyPatch, failed: TapError, is_fault: bool
) -> None:
    """For a while, though it has the fewest requests; alone it gets them all the same. Wrong requests do not count."""
    of_all = engines(2)
    broken, sound = of_all.lives
    with pytest.raises(type(failed)), broken.counted(1), broken.blamed():
        raise failed
    with sound.counted(5):
        chosen = {of_all.least_busy().engine for _ in range(4)}
        assert chosen == {sound.engine if is_fault else broken.engine}
        assert of_all.least_busy([broken]) is broken
        monkeypatch.setattr(engines_module, "PENALTY_S", 0.0)
        assert of_all.least_busy() is broken
    assert [one.num_requests for one in of_all.lives] == [0, 0]


def test_engines_that_vllm_has_let_go_of_get_nothing() -> None:
    """As elastic engines are scaled down; one that comes is not known here."""
    of_all = engines(3)
    core = of_all._llm.engine_core
    for num in (2, 1, 4, 3):
        core.core_engines = list(range(num))
        assert {of_all.least_busy().engine for _ in range(9)} == set(range(min(num, 3)))


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

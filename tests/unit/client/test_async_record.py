"""Recording by captures of an event loop: parts, errors, and what is left when it is cancelled. Without an engine."""

from __future__ import annotations

import asyncio
import threading
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from synthetic_rows import MODEL, SyntheticCapture, check_dataset, prompts_of
from vllm_tap.client.async_record import record_async
from vllm_tap.errors import BudgetError, DatasetError, SpecError
from vllm_tap.store.dataset import Dataset, open_dataset
from vllm_tap.store.recording import Run

PROMPTS = prompts_of(14)
RUN = Run(SyntheticCapture([]).spec, MODEL, "max_tokens=4", {"vllm_tap": "0"})


async def captured(prompts: list[str]) -> Any:
    """Capture prompts, some turns of the loop later."""
    for _ in range(3):
        await asyncio.sleep(0)
    return SyntheticCapture(prompts)


async def record(path: Path, capture: Callable[[list[Any]], Any] = captured, prompts: Any = PROMPTS) -> Dataset:
    """Record prompts, five at a time."""
    return await record_async(capture, prompts, path, RUN, batch=5, resume=True)


def test_captures_are_made_in_the_loop_and_prompts_are_read_elsewhere(tmp_path: Path) -> None:
    """So that the loop's other tasks go on."""
    threads: dict[str, set[int]] = {"prompts": set(), "captures": set()}
    turns = 0

    def read() -> Iterator[str]:
        for prompt in PROMPTS:
            threads["prompts"].add(threading.get_ident())
            yield prompt

    held: weakref.WeakSet[Any] = weakref.WeakSet()

    async def capture(prompts: list[str]) -> Any:
        threads["captures"].add(threading.get_ident())
        assert len(held) <= 1  # which is being written
        result = await captured(prompts)
        held.add(result)
        return result

    async def count() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    async def run() -> None:
        counting = asyncio.create_task(count())
        check_dataset(await record(tmp_path, capture, read()), PROMPTS)
        counting.cancel()

    asyncio.run(run())
    assert threads["captures"] == {threading.get_ident()}
    assert threading.get_ident() not in threads["prompts"]
    assert turns > 9
    assert not held


@pytest.mark.parametrize("error", [SpecError("prompt 1 of 3 is odd", sample=1), RuntimeError("engine")])
def test_what_ends_a_capture_ends_the_recording(tmp_path: Path, error: Exception) -> None:
    """With the number of the prompt among all; what came before is sealed, and the next call goes on behind it."""

    async def capture(prompts: list[str]) -> Any:
        if prompts[0] == PROMPTS[10]:
            raise error
        return await captured(prompts)

    with pytest.raises(type(error), match=r"prompt 11 of 3|engine"):
        asyncio.run(record(tmp_path, capture))
    check_dataset(open_dataset(tmp_path), PROMPTS[:10])
    check_dataset(asyncio.run(record(tmp_path)), PROMPTS)


def test_rows_that_do_not_fit_are_captured_when_those_before_are_written(tmp_path: Path) -> None:
    """As by `record`."""
    refused: list[str] = []

    async def capture(prompts: list[str]) -> Any:
        if prompts[0] == PROMPTS[5] and not refused:
            refused.extend(prompts)
            raise BudgetError("no room")
        return await captured(prompts)

    check_dataset(asyncio.run(record(tmp_path, capture)), PROMPTS)
    assert refused == PROMPTS[5:10]


@pytest.mark.parametrize("number", range(3))
def test_cancelled_it_ends_when_its_capture_has(tmp_path: Path, number: int) -> None:
    """Whole parts are left, no thread is, and the same call goes on."""
    events: list[str] = []

    async def run() -> None:
        reached = asyncio.Event()

        async def capture(prompts: list[str]) -> Any:
            if prompts[0] != PROMPTS[5 * number]:
                return await captured(prompts)
            reached.set()
            try:
                await asyncio.sleep(60)
            finally:
                await asyncio.sleep(0.01)  # memory is given back
                events.append("capture ended")

        task = asyncio.create_task(record(tmp_path, capture))
        await reached.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        events.append("recording ended")

    before = threading.active_count()
    asyncio.run(run())
    assert events == ["capture ended", "recording ended"]
    assert threading.active_count() == before
    if number:
        left = len(open_dataset(tmp_path))
        assert left in (5 * (number - 1), 5 * number)  # the last one may have been under way
        check_dataset(open_dataset(tmp_path), PROMPTS[:left])
    check_dataset(asyncio.run(record(tmp_path)), PROMPTS)


def test_cancelled_between_captures_it_begins_no_other(tmp_path: Path) -> None:
    """As while prompts are read, however long that takes."""
    is_read, go_on, begun = threading.Event(), threading.Event(), []

    def read() -> Iterator[str]:
        is_read.set()
        go_on.wait(30)
        yield from PROMPTS

    async def capture(prompts: list[str]) -> Any:
        begun.append(prompts)
        return await captured(prompts)

    async def run() -> None:
        task = asyncio.create_task(record(tmp_path, capture, read()))
        await asyncio.to_thread(is_read.wait)
        task.cancel()
        await asyncio.sleep(0)
        go_on.set()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(run())
    assert begun == []
    with pytest.raises(DatasetError):
        open_dataset(tmp_path)

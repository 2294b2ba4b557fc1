"""Recording by captures of an event loop: parts, errors, and what is left when it is cancelled. Without an engine."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import gc
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from synthetic_rows import MODEL, SyntheticCapture, check_dataset, prompts_of
from vllm_tap.client.async_record import record_async
from vllm_tap.errors import BudgetError, DatasetError, PositionError, SpecError
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


def join() -> None:
    """Wait for threads that have handed over what came of their recordings, and end."""
    for thread in threading.enumerate():
        if thread.name == "vllm-tap-record":
            thread.join(20)
            assert not thread.is_alive()


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


def test_variables_of_the_caller_are_seen(tmp_path: Path) -> None:
    """By prompts, captures, and whoever is told of parts; as with any call."""
    variable, seen = contextvars.ContextVar("name", default="lost"), []

    def read() -> Iterator[str]:
        seen.append(variable.get())
        yield from PROMPTS

    async def capture(prompts: list[str]) -> Any:
        seen.append(variable.get())
        return await captured(prompts)

    async def run() -> None:
        variable.set("of the caller")
        await record(tmp_path, capture, read())

    asyncio.run(run())
    assert seen == ["of the caller"] * 4


def test_any_error_of_the_user_ends_it(tmp_path: Path) -> None:
    """Also one that futures do not take."""
    parts = iter([1])

    async def run() -> None:
        async with asyncio.timeout(20):
            await record_async(captured, PROMPTS, tmp_path, RUN, batch=5, on_part=lambda part: next(parts))

    with pytest.raises(RuntimeError, match="StopIteration"):
        asyncio.run(run())
    assert len(list(tmp_path.glob("part-*"))) == 2


def test_many_recordings_need_no_threads_of_the_loop(tmp_path: Path) -> None:
    """Which captures wait for: of one thread, ten recordings end."""

    async def capture(prompts: list[str]) -> Any:
        return await asyncio.to_thread(SyntheticCapture, prompts)

    async def run() -> None:
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(1))
        async with asyncio.timeout(60):
            for dataset in await asyncio.gather(*(record(tmp_path / str(n), capture) for n in range(10))):
                check_dataset(dataset, PROMPTS)

    asyncio.run(run())


def test_rows_of_an_error_are_let_go_of_with_it(tmp_path: Path) -> None:
    """At once: no circle of references waits for the collector."""

    class Rows:
        pass

    held = [Rows()]
    alive = weakref.ref(held[0])

    async def capture(prompts: list[str]) -> Any:
        raise PositionError("prompt 0 has no such position", result=held.pop())

    async def run() -> None:
        with contextlib.suppress(PositionError):
            await record(tmp_path, capture)

    gc.disable()
    try:
        asyncio.run(run())
        join()
        assert alive() is None
    finally:
        gc.enable()


def test_an_event_loop_that_is_closed_keeps_no_process(tmp_path: Path) -> None:
    """Also where nothing has cancelled the recording: the interpreter's end does."""
    program = (
        "import asyncio, sys, threading\n"
        "from pathlib import Path\n"
        "sys.path[:0] = sys.argv[2:]\n"
        "from test_async_record import record\n"
        "begun = threading.Event()\n"
        "async def capture(prompts):\n"
        "    begun.set()\n"
        "    await asyncio.sleep(1000)\n"
        "async def run():\n"
        "    task = asyncio.ensure_future(record(Path(sys.argv[1]), capture))\n"
        "    while not begun.is_set():\n"
        "        await asyncio.sleep(0.01)\n"
        "loop = asyncio.new_event_loop()\n"
        "loop.run_until_complete(run())\n"
        "loop.close()\n"
        "print('main ends', flush=True)\n"
    )
    command = [sys.executable, "-c", program, str(tmp_path), str(Path(__file__).parent), *sys.path]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout == "main ends\n", done.stderr
    assert done.returncode == 0, done.stderr


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

    asyncio.run(run())
    assert events == ["capture ended", "recording ended"]
    join()
    left = len(list(tmp_path.glob("part-*")))
    assert left in (max(number - 1, 0), number)  # the last one may have been under way
    if left:
        check_dataset(open_dataset(tmp_path), PROMPTS[: 5 * left])
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

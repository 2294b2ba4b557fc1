"""Recording by captures of an event loop, while a thread reads prompts and writes parts. Client process."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable, Coroutine, Iterable
from concurrent.futures import Future
from typing import Any

from vllm_tap.client.result import Capture
from vllm_tap.store.dataset import Dataset
from vllm_tap.store.recording import Run, record_with


class Captures:
    """Captures that another thread asks for, one at a time, and this event loop makes.

    Args:
        capture: Captures prompts.
    """

    def __init__(self, capture: Callable[[list[Any]], Coroutine[Any, Any, Capture]]) -> None:
        self._capture = capture
        self._loop = asyncio.get_running_loop()
        self._task: asyncio.Task[Capture] | None = None
        self._has_stopped = False

    def __call__(self, prompts: list[Any]) -> Capture:
        """Return what was captured; to be called in the other thread.

        Raises:
            asyncio.CancelledError: It was stopped.
            TapError: As the capture does.
        """
        found: Future[Capture] = Future()
        self._loop.call_soon_threadsafe(self._begin, prompts, found)
        return found.result()

    def stop(self) -> None:
        """Cancel the capture under way, and all that are asked for; to be called in the event loop."""
        self._has_stopped = True
        if self._task is not None:
            self._task.cancel()

    def _begin(self, prompts: list[Any], found: Future[Capture]) -> None:
        if self._has_stopped:
            found.set_exception(asyncio.CancelledError())
            return
        self._task = self._loop.create_task(self._capture(prompts))
        self._task.add_done_callback(functools.partial(self._ended, found=found))

    def _ended(self, task: asyncio.Task[Capture], found: Future[Capture]) -> None:
        self._task = None  # which would keep the rows
        if task.cancelled():
            found.set_exception(asyncio.CancelledError())
        elif (error := task.exception()) is not None:
            found.set_exception(error)
        else:
            found.set_result(task.result())


async def record_async(
    capture: Callable[[list[Any]], Coroutine[Any, Any, Capture]],
    prompts: Iterable[Any],
    path: Any,
    run: Run,
    **options: Any,
) -> Dataset:
    """Record as `record_with` does, by captures of this event loop.

    Cancelled, it ends when the capture under way and the thread have ended; what is sealed stays.
    """
    captures = Captures(capture)
    recording = asyncio.create_task(asyncio.to_thread(record_with, captures, prompts, path, run, **options))
    try:
        return await asyncio.shield(recording)
    except asyncio.CancelledError:
        captures.stop()
        await asyncio.wait([recording])
        if not recording.cancelled():
            recording.exception()  # seen here: nobody else asks for it
        raise

"""Recording by captures of an event loop, while a thread reads prompts and writes parts. Client process."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import functools
from collections.abc import Callable, Coroutine, Iterable
from concurrent.futures import Future, InvalidStateError
from typing import Any

from vllm_tap.client.result import Capture
from vllm_tap.client.tasks import seen
from vllm_tap.store.dataset import Dataset
from vllm_tap.store.recording import Run, record_with
from vllm_tap.transport import threads


class Captures:
    """Captures that another thread asks for, one at a time, and this event loop makes.

    Args:
        capture: Captures prompts.

    Attributes:
        ended: Result of the recording, until that begins.
    """

    def __init__(self, capture: Callable[[list[Any]], Coroutine[Any, Any, Capture]]) -> None:
        self._capture = capture
        self._loop = asyncio.get_running_loop()
        self._task: asyncio.Task[Capture] | None = None
        self._asked: Future[Capture] | None = None
        self._has_stopped = False
        self.ended: asyncio.Future[Dataset] = self._loop.create_future()
        self.ended.add_done_callback(seen)

    def run(self, record: Callable[[], Dataset]) -> None:
        """Record by these captures, in the other thread; `ended` has what comes of it."""
        ended, found = self.ended, None
        failed: BaseException | None = None
        del self.ended  # a failure has this frame in its traceback
        try:
            found = record()
        except StopIteration as error:  # of the user's, which no future takes
            failed = RuntimeError(f"{error!r} was raised")
            failed.__cause__ = error
        except BaseException as error:
            failed = error
        with contextlib.suppress(RuntimeError):  # the loop is closed
            self._loop.call_soon_threadsafe(_settle, ended, found, failed)
        del ended, failed

    def __call__(self, prompts: list[Any]) -> Capture:
        """Return what was captured; to be called in the other thread.

        Raises:
            asyncio.CancelledError: It was stopped.
            TapError: As the capture does.
        """
        found = self._asked = Future()
        try:
            if self._has_stopped:
                raise asyncio.CancelledError
            self._loop.call_soon_threadsafe(self._begin, prompts, found)
            return found.result()
        finally:
            self._asked = None
            del found  # its failure has this frame in its traceback

    def stop(self) -> None:
        """Cancel the capture under way, and all that are asked for; to be called in the event loop."""
        self._has_stopped = True
        if self._task is not None:
            self._task.cancel()

    def abandon(self) -> None:
        """Have the other thread wait no longer, for an event loop that may not run any more; from any thread."""
        self._has_stopped = True
        if (found := self._asked) is not None:
            _settle(found, None, asyncio.CancelledError())

    def _begin(self, prompts: list[Any], found: Future[Capture]) -> None:
        if self._has_stopped:
            _settle(found, None, asyncio.CancelledError())
            return
        self._task = self._loop.create_task(self._capture(prompts))
        self._task.add_done_callback(functools.partial(self._ended, found=found))

    def _ended(self, task: asyncio.Task[Capture], found: Future[Capture]) -> None:
        self._task = None  # which would keep the rows
        if task.cancelled():
            _settle(found, None, asyncio.CancelledError())
        elif (error := task.exception()) is not None:
            _settle(found, None, error)
        else:
            _settle(found, task.result(), None)


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
    ended = captures.ended
    record = functools.partial(record_with, captures, prompts, path, run, **options)
    # Not one of the loop's own threads: captures wait for those.
    run_here = contextvars.copy_context().run
    threads.start("vllm-tap-record", run_here, captures.run, record, stop=captures.abandon)
    try:
        return await asyncio.shield(ended)
    except asyncio.CancelledError:
        captures.stop()
        if not ended.done():
            await asyncio.wait([ended])
        raise
    finally:
        del ended  # its failure has this frame in its traceback


def _settle(future: Any, found: Any, failed: BaseException | None) -> None:
    """End a future, unless it has ended."""
    with contextlib.suppress(InvalidStateError, asyncio.InvalidStateError):
        if failed is None:
            future.set_result(found)
        else:
            future.set_exception(failed)

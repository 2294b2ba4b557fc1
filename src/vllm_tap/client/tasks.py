"""Tasks of an event loop that run beside those who began them. Client process."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Coroutine, Iterable
from typing import Any, TypeVar

T = TypeVar("T")


class Tasks:
    """Tasks of an event loop that are kept until they have ended."""

    def __init__(self) -> None:
        self._running: set[asyncio.Task[Any]] = set()

    def run(self, coroutine: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        """Start a task, whose failure is not reported when nobody waits for it."""
        task = asyncio.get_running_loop().create_task(coroutine)
        self._running.add(task)
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self._running.discard(task)
        seen(task)


def seen(future: asyncio.Future[Any]) -> None:
    """Look at the failure of what has ended, which is not reported then if nobody waits for it."""
    if not future.cancelled():
        future.exception()


async def all_of(running: Iterable[Awaitable[T]]) -> list[T]:
    """Return the results of all when all have ended; raise the first failure."""
    found = await asyncio.gather(*running, return_exceptions=True)
    one = None
    try:
        for one in found:
            if isinstance(one, BaseException):
                raise one
        return found  # type: ignore[return-value]
    finally:
        del found, one  # failures have this frame in their traceback


async def finished(coroutine: Coroutine[Any, Any, T]) -> T:
    """Return what a coroutine returns, which goes on to its end where the caller is cancelled."""
    task = asyncio.get_running_loop().create_task(coroutine)
    task.add_done_callback(seen)
    try:
        return await asyncio.shield(task)
    finally:
        del task  # its failure has this frame in its traceback

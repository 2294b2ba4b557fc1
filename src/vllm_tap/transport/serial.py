"""A thread that does one thing behind the other, and ends before the interpreter does. Any process."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from vllm_tap.transport import threads


class Serial:
    """A thread with a queue, in the form of an executor.

    Raises:
        RuntimeError: There can be no more threads, or the interpreter is about to end.
    """

    def __init__(self, name: str) -> None:
        self._lock = threading.Lock()
        self._ended = False
        self._queue: queue.SimpleQueue[tuple[Future[Any], Callable[..., Any], tuple[Any, ...]] | None]
        self._queue = queue.SimpleQueue()
        self._thread = threads.start(name, self._run, stop=self._end)

    def submit(self, function: Callable[..., Any], /, *args: Any) -> Future[Any]:
        """Have the thread call a function when it has done what came before.

        Raises:
            RuntimeError: It has been told to end.
        """
        future: Future[Any] = Future()
        with self._lock:  # nothing comes behind the end of the queue, where nobody would do it
            if self._ended:
                raise RuntimeError("this thread has been told to end")
            self._queue.put((future, function, args))
        return future

    def _run(self) -> None:
        while (item := self._queue.get()) is not None:
            future, function, args = item
            try:
                future.set_result(function(*args))
            except BaseException as error:
                future.set_exception(error)
            del item, future, function, args  # not while it waits for more

    def _end(self) -> None:
        with self._lock:
            if not self._ended:
                self._ended = True
                self._queue.put(None)

    def __enter__(self) -> Serial:
        return self

    def __exit__(self, *_: object) -> None:
        """Wait until all is done, and for the end of the thread."""
        self._end()
        self._thread.join()

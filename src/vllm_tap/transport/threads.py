"""Threads that end before the interpreter does. Any process.

As the interpreter goes, Python 3.11 to 3.13 end a daemon thread at the next moment at which it wants the interpreter's
lock. If it stands in C++ that has let go of the lock, as PyTorch does in most of its functions, the C++ runtime calls
that a fault: "terminate called without an active exception", SIGABRT. So threads here are told to end when the
interpreter is about to, after those that are no daemons, and are waited for.
"""

from __future__ import annotations

import _thread
import atexit
import contextlib
import logging
import os
import threading
import time
from collections.abc import Callable
from typing import Any, Final, Protocol

logger = logging.getLogger("vllm_tap")

PATIENCE_SECONDS: Final = 10.0
"""Seconds that the interpreter's end waits for all threads together: those that let go of memory take 0.1 s a GiB."""

_THE_END: Final = "the interpreter is about to end: no more threads are started"


class Joinable(Protocol):
    """A thread that runs."""

    name: str

    def join(self, timeout: float | None = None) -> None:
        """Wait until it has ended, or so many seconds have passed."""


class _Bare:
    """A thread without `threading.Thread`."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._running = _thread.allocate_lock()
        self._running.acquire()

    def run(self, function: Callable[[], object]) -> None:
        try:
            function()
        finally:
            _running.pop(self, None)
            self._running.release()

    def join(self, timeout: float | None = None) -> None:
        if self._running.acquire(timeout=-1 if timeout is None else timeout):
            self._running.release()


# Written by single operations, no lock around them: the garbage collector may start a thread at any moment.
_running: dict[Joinable, Callable[[], object]] = {}
_is_ending = threading.Event()


def start(name: str, function: Callable[..., object], *args: Any, stop: Callable[[], object]) -> threading.Thread:
    """Start a daemon thread that ends before the interpreter does.

    Args:
        name: Of the thread.
        function: What it runs.
        *args: Arguments of it.
        stop: Called from another thread when the interpreter is about to end: the function is to return soon after. It
            may be called more often, and when the function has returned; it does not wait.

    Raises:
        RuntimeError: There can be no more threads, or the interpreter is about to end.
    """
    _require_time()

    def run() -> None:
        try:
            function(*args)
        finally:
            _running.pop(thread, None)

    thread = threading.Thread(target=run, name=name, daemon=True)
    _start(thread, thread.start, stop)
    return thread


def start_bare(function: Callable[[], object], *, stop: Callable[[], object]) -> None:
    """Start a thread as `start` does, by `_thread`: 0.08 ms instead of 0.28, and from a finalizer if need be.

    The start of a `threading.Thread` waits for the thread, and takes a lock that the garbage collector may have
    interrupted.

    Raises:
        RuntimeError: As `start`.
    """
    _require_time()
    thread = _Bare(getattr(function, "__qualname__", "a bare thread"))
    _start(thread, lambda: _thread.start_new_thread(thread.run, (function,)), stop)


def is_ending() -> bool:
    """Tell whether the interpreter is about to end."""
    return _is_ending.is_set()


def _require_time() -> None:
    if _is_ending.is_set():
        raise RuntimeError(_THE_END)


def _start(thread: Joinable, begin: Callable[[], object], stop: Callable[[], object]) -> None:
    if not _running:
        # Again and again: multiprocessing forgets what was registered before a process of its own begins.
        atexit.unregister(end_all)
        atexit.register(end_all)
    _running[thread] = stop  # before it runs: the first thing that it does may be to end
    try:
        begin()
    except BaseException:
        _running.pop(thread, None)
        raise


def end_all() -> None:
    """Have all threads end, and wait for them; none is started any more. The interpreter calls it at its end."""
    _is_ending.set()
    deadline = time.monotonic() + PATIENCE_SECONDS
    running = dict(_running)
    for stop in running.values():
        with contextlib.suppress(Exception):  # what it is to end may have ended
            stop()
    for thread in running:
        with contextlib.suppress(RuntimeError):  # it has not begun, or this is it
            thread.join(max(deadline - time.monotonic(), 0.0))
    if left := [thread.name for thread in running if thread in _running]:
        logger.warning("vllm-tap: not ended within %g s: %s", PATIENCE_SECONDS, ", ".join(left))


os.register_at_fork(after_in_child=_running.clear)

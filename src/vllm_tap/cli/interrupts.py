"""Ctrl-C while a command has an engine: its processes never see it, and twice ends all at once. User's process.

A terminal sends SIGINT to every process in its foreground, and vLLM's answer it with pages of tracebacks. They start
with the signal blocked, which they inherit and do not undo, and are ended by this process.
"""

from __future__ import annotations

import functools
import math
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing import resource_tracker
from types import FrameType
from typing import Final

from vllm_tap.client.interruption import Interruption
from vllm_tap.transport import threads

EXIT_CODE: Final = 130

REPEAT_SECONDS: Final = 0.3
"""A second signal this soon is the same Ctrl-C: what started the command may pass on what the terminal sends, too."""


class Interrupts(Interruption):
    """Takes SIGINT in a block of the main thread. The first raises KeyboardInterrupt there, a second ends the process.

    Args:
        keeps: There is something to keep that is not kept yet. Else the first ends the process.
        says: Said then.

    Attributes:
        at_end: Called before the process ends at once.
        came: The first has been raised.
    """

    def __init__(self, keeps: bool, says: str = "interrupted") -> None:
        super().__init__()
        self.at_end: list[Callable[[], object]] = []
        self.came = False
        self._keeps, self._says, self._starting = keeps, says, False
        self._first = -math.inf

    def __enter__(self) -> Interrupts:
        super().__enter__()
        # The signal's number is written here in whichever thread it arrives, also while the main one is in C code.
        self._read, self._write = socket.socketpair()
        self._write.setblocking(False)
        self._wakeup = signal.set_wakeup_fd(self._write.fileno(), warn_on_full_buffer=False)
        stop = functools.partial(self._read.shutdown, socket.SHUT_RDWR)
        threads.start("vllm-tap-interrupts", self._watch, stop=stop)
        return self

    def __exit__(self, *_: object) -> None:
        signal.set_wakeup_fd(self._wakeup)
        self._write.close()  # and the thread ends
        super().__exit__()

    @contextmanager
    def starting(self) -> Iterator[None]:
        """Shield processes that start in the block. Ctrl-C ends them and this one at once: there is nothing to keep."""
        _start_tracker()
        self._starting = True
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            yield
        finally:
            self._starting = False
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._keeps and not self._starting and not self.came:  # else it is for `_watch`
            super()._handle(number, frame)

    def _raise(self) -> None:
        self.came = True
        super()._raise()

    def _watch(self) -> None:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        with self._read:
            while number := self._read.recv(1):
                if number[0] != signal.SIGINT:
                    continue
                now = time.monotonic()
                self._first = now if self._first == -math.inf else self._first
                if self._starting:
                    self._end("interrupted while the engine started")
                if not self._keeps:
                    self._end(self._says)
                if now > self._first + REPEAT_SECONDS:
                    self._end("interrupted twice: ended at once")

    def _end(self, what: str) -> None:
        """End this process and all that it has started."""
        for call in self.at_end:
            call()
        children = _children()
        say(what)
        # The interpreter is not let go of in between: the main thread would tell that its engine is gone.
        for child in children:
            with suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
        os._exit(EXIT_CODE)


def say(what: str) -> None:
    """Print a line about an interrupt, under what the terminal shows of it."""
    newline = "\n" if sys.stderr.isatty() else ""
    os.write(sys.stderr.fileno(), f"{newline}vllm-tap: {what}\n".encode())


def _start_tracker() -> None:
    """Start the process that cleans up behind others, which would unblock the signal later.

    Behind processes that were killed it cleans up too, and would warn of that.
    """
    given = os.environ.get("PYTHONWARNINGS")
    os.environ["PYTHONWARNINGS"] = ",".join(filter(None, [given, "ignore:resource_tracker:UserWarning"]))
    try:
        resource_tracker.ensure_running()
    finally:
        del os.environ["PYTHONWARNINGS"]
        if given is not None:
            os.environ["PYTHONWARNINGS"] = given


def _children() -> list[int]:
    """Return the processes that this one has started, and theirs, but not the one that cleans up behind them."""
    import psutil  # comes with vLLM, and nothing has started without it

    tracker = getattr(resource_tracker._resource_tracker, "_pid", None)
    return [child.pid for child in psutil.Process().children(recursive=True) if child.pid != tracker]

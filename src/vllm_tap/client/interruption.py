"""Ctrl-C during a capture that is to keep what is finished. Client process."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

_active: list[Interruption] = []


def current() -> Interruption | None:
    """Return the object in whose block this is; none in other threads than the main one."""
    return _active[-1] if _active and threading.current_thread() is threading.main_thread() else None


class Interruption:
    """Takes SIGINT in a block of the main thread, in which Ctrl-C ends a capture with what is finished.

    `outputs` of the result is then None where a prompt is not finished. If none is, KeyboardInterrupt goes on.
    Where SIGINT is ignored, as a shell has it for what runs in the background, it stays so.
    """

    def __init__(self) -> None:
        self._seen = False
        self._allowed = True

    def __enter__(self) -> Interruption:
        self._before: Any = signal.getsignal(signal.SIGINT)
        if self._before is not signal.SIG_IGN:
            signal.signal(signal.SIGINT, self._handle)
        _active.append(self)
        return self

    def __exit__(self, *_: object) -> None:
        _active.remove(self)
        if self._before is not signal.SIG_IGN:
            signal.signal(signal.SIGINT, self._before)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self._seen = True
        if self._allowed:
            self._raise()

    def _raise(self) -> None:
        self._seen = False
        raise KeyboardInterrupt

    def hold(self) -> None:
        """Raise no more in this block: what is left to do keeps what is finished."""
        self._allowed = False

    @contextmanager
    def held(self) -> Iterator[None]:
        """Put off an interrupt to the end of the block, or to where `allowed` lets it in."""
        self._allowed = False
        try:
            yield
        finally:
            self._allowed = True
        if self._seen:
            self._raise()

    @contextmanager
    def allowed(self) -> Iterator[None]:
        """Let an interrupt in again, inside `held`."""
        self._allowed = True  # first: what comes now is raised, what came before was seen
        try:
            if self._seen:
                self._raise()
            yield
        finally:
            self._allowed = False

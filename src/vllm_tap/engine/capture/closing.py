"""The end of all that a worker has opened, with its engine, in a process that outlives it. Worker process."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from vllm_tap.engine.capture.interfaces import Backend
from vllm_tap.errors import TransportError
from vllm_tap.transport import threads


class Closable(Protocol):
    """A session, a pool of segments, or a server."""

    def close(self) -> None:
        """Give back what it holds."""


def weakly(method: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that calls a method and does not keep its object: for threads, which would keep the engine.

    It raises a `TransportError` when the object is gone.
    """
    reference = weakref.WeakMethod(method)

    def call(*args: Any) -> Any:
        bound = reference()
        if bound is None:
            raise TransportError("the engine is gone")
        return bound(*args)

    return call


def close_all(things: Sequence[Closable], backend: Backend) -> None:
    """Close them, the youngest first, in a thread of its own: this one may hold any lock when an object goes."""

    def close() -> None:
        with backend.on_stream():
            for thing in reversed(things):
                thing.close()

    if things and not threads.is_ending():  # the end of the process does the same
        threads.start("vllm-tap-close", close, stop=lambda: None)  # it ends by itself

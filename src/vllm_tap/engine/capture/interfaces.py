"""What differs between engines on processors and on CUDA devices, behind one face. Worker process."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

from vllm_tap.engine.capture.cpu import HostSink, Taps
from vllm_tap.engine.capture.profile import Profile
from vllm_tap.engine.capture.session import Sink
from vllm_tap.engine.model.tap import Rows
from vllm_tap.frame.layout import Stream
from vllm_tap.transport.segment.pool import SegmentPool


class Backend(Protocol):
    """How rows get from the taps of a worker into segments."""

    @property
    def rows(self) -> Rows:
        """The rows of the current step, shared by all taps."""
        ...

    @property
    def refusal(self) -> str:
        """Why rows cannot be taken, as far as the forward passes until now have shown; an empty string if they can."""
        ...

    def new_sink(self, streams: Sequence[Stream], taps: Taps, pool: SegmentPool, staging: str) -> Sink:
        """Return where the rows of one capture go.

        Raises:
            BudgetError: There is no room for staging, and `staging` insists on it.
            EngineUnsupportedError: Rows cannot be taken, see `refusal`.
        """
        ...

    def new_pool(self, shared: bool) -> SegmentPool:
        """Return a pool without segments, whose budget is zero."""
        ...

    def is_quiet(self) -> bool:
        """Tell whether the device has nothing to do; from any thread."""
        ...

    def note_stream(self) -> None:
        """Note on which stream the engine works; in the engine's own thread."""

    def on_stream(self) -> AbstractContextManager[None]:
        """Queue what another thread does on the engine's stream."""
        ...

    def watch(self, profile: Profile) -> None:
        """Have a profile time the parts that only this backend has."""

    def copy_profile(self) -> Profile | None:
        """Return a profile of copies from the device, or None where rows need none."""
        ...


class HostBackend:
    """Taps write into segments."""

    refusal = ""

    def __init__(self) -> None:
        self.rows = Rows()

    def new_sink(self, streams: Sequence[Stream], taps: Taps, pool: SegmentPool, staging: str) -> Sink:
        """Return a sink; rows are never staged."""
        return HostSink(streams, taps, self.rows, pool)

    def new_pool(self, shared: bool) -> SegmentPool:
        """Return a pool."""
        return SegmentPool(0, shared=shared)

    def is_quiet(self) -> bool:
        """Nothing of the engine waits for what a pool does."""
        return True

    def note_stream(self) -> None:
        """There are no streams."""

    def on_stream(self) -> AbstractContextManager[None]:
        """There are no streams."""
        return nullcontext()

    def watch(self, profile: Profile) -> None:
        """Nothing more to time."""

    def copy_profile(self) -> Profile | None:
        """There are no copies."""
        return None


def choose(worker: Any, step_lock: AbstractContextManager[Any]) -> Backend:
    """Return the backend of a worker whose model has been loaded; the lock is held during each of its steps."""
    if worker.device.type != "cuda":
        return HostBackend()
    from vllm_tap.engine.cuda.backend import DeviceBackend

    return DeviceBackend(worker, step_lock)

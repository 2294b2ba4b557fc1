"""Interfaces of a backend and of its sinks: CPU and CUDA engines behind one face. Worker process."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple, Protocol

from vllm_tap.engine.capture.profile import Profile
from vllm_tap.engine.capture.selection import Selection
from vllm_tap.engine.model.tap import Rows, Tap, Taps
from vllm_tap.frame.layout import Layout, Stream
from vllm_tap.transport.segment.pool import Block, SegmentPool
from vllm_tap.vllm.runner import Batch


class Settling(NamedTuple):
    """Rows on their way into their blocks.

    Attributes:
        wait: Returns when they are there. Once, in any thread, while steps go on.
        check: After it, between steps, makes sure that all steps of these rows went through every tap; raises
            `CaptureError`.
    """

    wait: Callable[[], None]
    check: Callable[[], None]


class Sink(Protocol):
    """Destination of the rows of a step; see `cpu` and `cuda.sink`."""

    def before_forward(self, chunk: Block, start: int, form: Layout[int], selection: Selection, batch: Batch) -> None:
        """Let the rows of a step through, into a block that starts in a segment and has a layout counted from there."""

    def repeat(self, start: int) -> bool:
        """Let rows through as in the step before, into a block that starts here; tell whether that is so."""
        ...

    def after_forward(self) -> list[Tap]:
        """The forward pass has been launched; return taps that are known to have been silent."""
        ...

    def clear(self) -> None:
        """Let no row through until the next `before_forward` or `repeat`."""

    def after_sampling(self, generates: bool) -> None:
        """The step's tokens are on their way: send off what is worth it by now.

        The device is busy with the step: if rows of generated tokens will come, make ready what their steps need.
        """

    def on_idle(self) -> None:
        """Queue what `synchronize` waits for: no step is known to follow."""

    def synchronize(self) -> None:
        """Wait until all rows lie in their blocks, and make sure that every step went through every tap."""

    def queued(self) -> Settling:
        """Queue what is left of the rows so far. Steps may go on before they lie in their blocks."""
        ...

    def close(self) -> None:
        """Give back what the sink holds besides the blocks."""


class Backend(Protocol):
    """The way of rows from the taps of a worker into segments."""

    @property
    def rows(self) -> Rows[Any]:
        """The rows of the current step, for all taps."""
        ...

    @property
    def refusal(self) -> str:
        """Why rows cannot be taken, as far as the forward passes until now have shown; an empty string if they can."""
        ...

    def new_sink(
        self, streams: Sequence[Stream], taps: Taps, modes: Mapping[str, int], pool: SegmentPool, staging: str
    ) -> Sink:
        """Return where the rows of one capture go; `modes` says of a stream what its rows are, by default `ADD`.

        Raises:
            BudgetError: There is no room for staging, and `staging` insists on it.
            CaptureError: As many captures are under way as there is room for.
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

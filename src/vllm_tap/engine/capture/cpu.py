"""The sink of a CPU engine: taps write straight into the block of the step. Runs in the worker process.

A sink is told of a step `before_forward`, or to `repeat` the one before, or to `clear`; then `after_forward`,
`after_sampling` and `on_idle` (no step is known to follow). `queued` tells of rows that are taken while steps go on. At
the end, `synchronize` waits until all rows lie in their blocks, and `close` lets go of the rest.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext

import numpy as np
import torch

from vllm_tap.engine.capture.interfaces import Settling, Sink
from vllm_tap.engine.capture.profile import Profile
from vllm_tap.engine.capture.selection import Selection
from vllm_tap.engine.model.tap import ADD, GATHER_ABOVE, Group, Plane, Rows, Tap, Taps
from vllm_tap.frame.layout import Layout, Stream
from vllm_tap.labels import NUM_LABELS
from vllm_tap.transport.segment.pool import Block, SegmentPool
from vllm_tap.vllm.runner import Batch


class CpuSink:
    """Planes of the step are views of its block: one copy in all, made by the tap itself."""

    def __init__(
        self, streams: Sequence[Stream], taps: Taps, modes: Mapping[str, int], rows: Rows[Group], pool: SegmentPool
    ) -> None:
        self._pool, self._rows, self._modes = pool, rows, modes
        self._group = Group()
        rows.groups.append(self._group)
        self._streams = [(stream, [taps[stream.name, layer] for layer in stream.layers]) for stream in streams]

    def before_forward(self, chunk: Block, start: int, form: Layout[int], selection: Selection, batch: Batch) -> None:
        """Point every tap at its plane, write the labels, and let rows through.

        Cost: one tensor view per tap; the labels are written once, [3, R] int32.
        """
        memory, group = self._pool.segment(chunk.segment_id).view, self._group
        num_rows = selection.num_rows
        labels = np.frombuffer(memory, np.int32, NUM_LABELS * num_rows, start).reshape(NUM_LABELS, num_rows)
        labels[0] = selection.numbers
        labels[1] = batch.positions.numpy()[selection.sources]
        labels[2] = batch.token_ids.numpy()[selection.sources]
        for (stream, taps), place in zip(self._streams, form.streams, strict=True):
            shape = (len(taps), num_rows, stream.width)
            planes = torch.frombuffer(
                memory, dtype=getattr(torch, stream.dtype), count=int(np.prod(shape)), offset=start + place
            ).view(shape)
            mode = self._modes.get(stream.name, ADD)
            for tap, plane in zip(taps, planes.unbind(), strict=True):
                tap.planes[group] = Plane(plane, mode)
        group.failure = None
        group.num_tokens = int(selection.sources.max(initial=-1)) + 1
        group.runs = runs = selection.runs
        group.sources = torch.from_numpy(selection.sources) if len(runs) > GATHER_ABOVE else None

    def repeat(self, start: int) -> bool:
        """Begin a step like the one before: nothing is saved here, so it is to be begun as any other."""
        return False

    def after_forward(self) -> list[Tap]:
        """Stop letting rows through. Returns the taps that no row passed in this step.

        Raises:
            TapError: What went wrong in a tap of this step.
        """
        silent = []
        for _, taps in self._streams:
            for tap in taps:
                plane = tap.planes.pop(self._group, None)
                if plane is None or not plane.is_written:
                    silent.append(tap)
        self.clear()
        if self._group.failure is not None:
            raise self._group.failure
        return silent

    def clear(self) -> None:
        """Let no row through."""
        self._group.clear()

    def after_sampling(self, generates: bool) -> None:
        """Send off what is still on the device: nothing."""

    def on_idle(self) -> None:
        """Queue what `synchronize` waits for: nothing."""

    def synchronize(self) -> None:
        """Wait until all rows lie in their blocks: they already do."""

    def queued(self) -> Settling:
        """Return what settles rows: there is nothing to wait for."""
        return Settling(_nothing, _nothing)

    def close(self) -> None:
        """Let go of the taps."""
        for _, taps in self._streams:
            for tap in taps:
                tap.planes.pop(self._group, None)
        self._rows.groups.remove(self._group)


def _nothing() -> None:
    pass


class CpuBackend:
    """Taps write into segments."""

    refusal = ""

    def __init__(self) -> None:
        self.rows: Rows[Group] = Rows()

    def new_sink(
        self, streams: Sequence[Stream], taps: Taps, modes: Mapping[str, int], pool: SegmentPool, staging: str
    ) -> Sink:
        """Return a sink; rows are never staged, and captures may be as many as there is memory for."""
        return CpuSink(streams, taps, modes, self.rows, pool)

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

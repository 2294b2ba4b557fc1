"""One capture in one worker: the requests it met, the blocks it filled, the error that ended it early.

Runs in the worker process, between and around forward passes. Nothing here may raise into the engine: what goes wrong
is kept, rows stop, generation goes on, and the client gets the error when it asks for the rows.
"""

from __future__ import annotations

import contextlib
import functools
import math
import sys
import time
from collections.abc import Iterable, Sequence
from typing import Final, NamedTuple

import numpy as np
import torch

from vllm_tap.engine.capture.interfaces import Settling, Sink
from vllm_tap.engine.capture.selection import Selection, Selector
from vllm_tap.errors import BudgetError, CaptureError, SpecError, TapError
from vllm_tap.frame import messages
from vllm_tap.frame.layout import CACHE_LINE, Layout, Stream, block_bytes, layout
from vllm_tap.labels import Mark
from vllm_tap.spec import Choice, read_positions, takes_generated
from vllm_tap.transport.segment.pool import Account, Block
from vllm_tap.transport.segment.spill import SpillArea
from vllm_tap.vllm.names import completion_of
from vllm_tap.vllm.runner import Batch

STEPS_PER_CHUNK: Final = 64
MAX_CHUNK_BYTES: Final = 64 << 20
MOST_CHUNKS: Final = 16
"""Small steps share a reservation, of a small part of the budget: each costs the worker and the client some
microseconds, and steps that lie together leave a device together."""


class Taking(NamedTuple):
    """Rows that a capture has let go of, and when they are where they are said to be."""

    descriptor: messages.Descriptor
    settling: Settling
    biases: torch.Tensor | None


class Session:
    """A capture under way."""

    def __init__(
        self,
        start: messages.Start,
        rank: int,
        streams: Sequence[Stream],
        sink: Sink,
        account: Account,
        drafts: bool = False,
    ) -> None:
        self.start, self.rank, self.streams = start, rank, tuple(streams)
        self.client = start.clients.get(rank, 0)
        self.num_rows = 0
        self.is_new = True  # all rows that are not taken yet come from the next step on
        self.biases: torch.Tensor | None = None  # of routers, when its first step ran
        self.error: TapError | None = None
        self.account = account
        self._sink = sink
        self._block_bytes = functools.lru_cache(functools.partial(block_bytes, streams=self.streams))
        self._form = functools.lru_cache(self._new_form)
        self._period = math.lcm(CACHE_LINE, *(stream.alignment for stream in self.streams))
        self._positions = start.choice()
        self._selector = Selector(self._positions, drafts)
        self._table: list[messages.Request] = []  # requests that the client has not been told of
        self._first_request = 0  # number of the first of them
        self._chunks: list[Block] = []
        spill = start.spill
        self._files = None if spill is None else SpillArea(account.pool, spill.folder, spill.most_bytes)
        self._num_spilled = 0  # of the chunks, the first
        self._largest_bytes = 0  # of a step's block
        self._chunk_number = 0  # of the current one
        self._free_offset = self._free_end = 0
        self._blocks: list[tuple[int, int, int]] = []  # chunk, offset in it, rows
        self._key: tuple[list[str], bytes] | None = None  # requests and lengths whose selection holds
        self._selection: Selection | None = None
        self._last: Selection | None = None
        self._stride = 0  # from the start of its block to the next
        self._is_open = False  # has met requests, ships rows of them, and has not failed
        self._armed = False
        self._generates = False  # the last generated token never enters the model

    def scheduled(self, request_id: str) -> None:
        """A request of anybody is scheduled for the first time; a capture meets its own."""

    def meet(self, request_id: str, mark: Mark, prompt_len: int, generates: bool = True) -> None:
        """Take a request that the engine schedules for the first time; `generates` says whether more than one token.

        The V2 runner adds a preempted request again under the same id: it keeps its number.
        """
        if mark.capture_id != self.start.capture_id or request_id in self._selector:
            return
        positions = self._positions_of(mark)
        self.is_new = self.is_new or not (self._selector or self._blocks)
        self._selector.add(request_id, self._first_request + len(self._table), prompt_len, positions)
        self._table.append(messages.Request(request_id, mark.sample, completion_of(request_id, mark.num_completions)))
        # A rank without a layer of this capture ships nothing, not even labels.
        self._is_open = bool(self.streams) and self.error is None
        self._generates = self._generates or (generates and takes_generated(positions))

    def _positions_of(self, mark: Mark) -> Choice:
        """Return which rows of a request are taken; those of its capture if it says what nobody understands."""
        if mark.positions is None:
            return self._positions
        try:
            return read_positions(mark.positions)
        except SpecError as error:
            self.fail(error)
            return self._positions

    def before_forward(self, batch: Batch) -> None:
        """Before a forward pass: find room for the rows that are asked for, and let them through."""
        if not self._is_open:
            return
        try:
            key = batch.request_ids, batch.starts.tobytes()
            if key != self._key:
                self._selection = self._selector.select(batch)
                self._key = key if self._selector.takes_all else None
            selection = self._selection
            if selection is None:
                self._sink.clear()
                return
            start, end = self._free_offset, self._free_offset + self._stride
            if selection is self._last and end <= self._free_end and self._sink.repeat(start):
                # Like the step before, right behind it in its chunk.
                self._free_offset = end
            else:
                start = self._begin(batch, selection)
            self._armed = True
            num_rows = selection.num_rows
            self._blocks.append((self._chunk_number, start - self._chunks[-1].offset, num_rows))
            self.num_rows += num_rows
        except Exception as error:
            self.fail(error)

    def _begin(self, batch: Batch, selection: Selection) -> int:
        """Begin a step in a block of its own form; return where the block starts."""
        start, form = self._place(selection.num_rows)
        self._sink.before_forward(self._chunks[-1], start, form, selection, batch)
        self._stride = self._free_offset - start
        # Blocks that are so far apart lie alike.
        self._last = selection if self._stride % self._period == 0 else None
        return start

    def _place(self, num_rows: int) -> tuple[int, Layout[int]]:
        """Find room for a block in the current chunk, or reserve the next one; return its start and its layout.

        Raises:
            BudgetError: There is none.
        """
        start = self._free_offset
        form = self._form(start % self._period, num_rows)
        if start + form.end > self._free_end:
            chunk = self._reserve(num_rows)
            if self._chunks and self.num_rows >= self.start.expected_rows:
                self.account.pool.grow_more()
            self._chunk_number = len(self._chunks)
            self._chunks.append(chunk)
            start, self._free_end = chunk.offset, chunk.offset + chunk.nbytes
            form = self._form(start % self._period, num_rows)
        # The next block's labels start on a cache line of their own.
        self._free_offset = start + -(-form.end // CACHE_LINE) * CACHE_LINE
        return start, form

    def _new_form(self, phase: int, num_rows: int) -> Layout[int]:
        """Return the layout of a block, counted from its start: the same for all that start in the same phase."""
        labels, streams, end = layout(phase, num_rows, self.streams)
        return Layout(labels - phase, tuple([start - phase for start in streams]), end - phase)

    def _reserve(self, num_rows: int) -> Block:
        nbytes = self._block_bytes(num_rows)
        self._largest_bytes = max(self._largest_bytes, nbytes)
        num_steps = STEPS_PER_CHUNK
        if self.start.expected_rows > self.num_rows:
            num_steps = min(num_steps, -(-(self.start.expected_rows - self.num_rows) // num_rows))
        roomy = min(num_steps * nbytes, MAX_CHUNK_BYTES, self.start.budget_bytes // MOST_CHUNKS)
        nbytes_or_more = max(roomy, nbytes)
        with contextlib.suppress(BudgetError):
            return self.account.reserve(nbytes_or_more)
        self._spill()
        with contextlib.suppress(BudgetError):
            return self.account.reserve(nbytes_or_more)
        # Near the end of the budget, room for this step alone may still be there.
        return self.account.reserve(nbytes)

    def _spill(self) -> None:
        """Move all chunks to files, if there are to be any; each chunk is complete. The engine waits.

        Raises:
            TapError: The files are full, or rows did not arrive.
        """
        if self._files is None or self._num_spilled == len(self._chunks):
            return
        self._sink.synchronize()
        while self._num_spilled < len(self._chunks):
            number = self._num_spilled
            self._chunks[number] = self._files.move(self._chunks[number], self._period)
            self._num_spilled += 1

    def after_forward(self) -> None:
        """After a forward pass: send off the rows of the step, and make sure that every tap ran."""
        if not self._armed:
            return
        self._armed = False
        try:
            silent = self._sink.after_forward()
            if silent:
                names = ", ".join(f"{tap.stream}[{tap.layer}]" for tap in silent[:4])
                raise CaptureError(
                    f"the forward pass did not go through {len(silent)} taps ({names}): this model or step runs its "
                    "layers in a way that cannot be tapped. Set enforce_eager=True, and report the model."
                )
        except Exception as error:
            self.fail(error)

    def after_sampling(self) -> None:
        """After sampling: send off what is still on the device.

        Not before: the copy of the sampled tokens, for which the engine waits, would queue behind ours.
        """
        try:
            self._sink.after_sampling(self._generates)
        except Exception as error:
            self.fail(error)

    def on_idle(self) -> None:
        """Send off all rows while an engine finishes that has nothing more to compute, before the client asks."""
        if self.error is not None:
            return
        try:
            self._sink.on_idle()
        except Exception as error:
            self.fail(error)

    def fail(self, error: Exception) -> None:
        """End the capture early; the first error is the one that the client gets."""
        self._sink.clear()
        self._is_open = self._armed = False
        if self.error is None:
            if not isinstance(error, TapError):
                error = CaptureError(f"unexpected {type(error).__name__}: {error}")
            self.error = error

    def forget(self, request_ids: Iterable[str]) -> None:
        """Let go of requests that have ended: none of their rows will come."""
        for request_id in request_ids:
            self._selector.remove(request_id)

    def finish(self) -> messages.Descriptor:
        """Wait for the last rows and describe where all of them are that have not been taken.

        Raises:
            TapError: What ended the capture early.
        """
        return self._describe(self._settle())

    def _settle(self) -> float:
        """Wait for the last rows; return for how many seconds."""
        begin = time.perf_counter()
        if self.error is None:
            self._sink.synchronize()
        if self.error is not None:
            raise self.error
        return time.perf_counter() - begin

    def _describe(self, wait_seconds: float) -> messages.Descriptor:
        blocks = np.array(self._blocks, "<i8").reshape(-1, 3)
        blocks[:, 1] += np.array([chunk.offset for chunk in self._chunks], "<i8")[blocks[:, 0]]
        return messages.Descriptor(
            rank=self.rank,
            capture_id=self.start.capture_id,
            streams=self.streams,
            requests=tuple(self._table),
            first_request=self._first_request,
            chunks=tuple(messages.Chunk(*chunk) for chunk in self._chunks),
            blocks=blocks.tobytes(),
            byte_order=sys.byteorder,
            wait_seconds=wait_seconds,
        )

    def begin_take(self) -> Taking:
        """Describe the rows that have come since the last time, and go on in memory of its own.

        They lie in their blocks when the wait is over, which the next steps need not wait for. Where rows may have to
        be moved to files, they do.

        Raises:
            TapError: What ended the capture early.
        """
        wait_seconds = self._settle() if self._files is not None else 0.0
        if self.error is not None:
            raise self.error
        settling = self._sink.queued()
        if self._chunks and self._num_spilled < len(self._chunks):
            last = self._chunks[-1]
            self._chunks[-1] = self.account.pool.shorten(last, self._free_offset - last.offset)
        budget = self.start.budget_bytes
        if self.account.used_bytes > min(budget // 2, budget - self._largest_bytes):
            # What is handed over cannot be moved any more: half of the budget is left, and room for the largest step.
            self._spill()
        taken = self._describe(wait_seconds)
        self._first_request += len(self._table)
        self._table, self._chunks, self._blocks, self._num_spilled = [], [], [], 0
        self._free_offset = self._free_end = 0
        self._last = None
        return Taking(taken, settling, self.biases)

    @property
    def stalled_seconds(self) -> float:
        """Time for which the engine has waited for files of spilled rows."""
        return 0.0 if self._files is None else self._files.seconds

    @property
    def num_bytes(self) -> int:
        """Bytes of the rows taken so far."""
        return self.num_rows * sum(len(stream.layers) * stream.row_bytes for stream in self.streams)

    @property
    def block_ids(self) -> list[int]:
        """The reservations that this capture holds."""
        return [chunk.block_id for chunk in self._chunks]

    def release(self) -> None:
        """Free the blocks that this capture holds."""
        for block_id in self.block_ids:
            self.account.pool.release(block_id)

    def close(self) -> None:
        """Let go of the taps; blocks are kept until somebody releases them, and count against later captures."""
        self._sink.clear()
        self._sink.close()
        self.account.close()
        if self._files is not None:
            self._files.close()

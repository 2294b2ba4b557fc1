"""The rows that one rank shipped: checked against the final sequences, then found by number. Client process."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from vllm_tap.client.memory import RankMemory
from vllm_tap.client.sequences import Sequences
from vllm_tap.errors import DescriptorError, RowsMissingError
from vllm_tap.frame.layout import IntArray
from vllm_tap.frame.messages import Descriptor
from vllm_tap.labels import NUM_LABELS

SHOWN = 8
"""Positions that an error message lists."""


class Place(NamedTuple):
    """Where a stream lies in this rank's blocks."""

    stream: int
    layer: int


class RankRows:
    """All rows of one rank.

    Raises:
        RowsMissingError: A row that was asked for did not arrive, or none that arrived belongs to the final sequence.
        DescriptorError: Labels that cannot be.
    """

    def __init__(self, descriptor: Descriptor, memory: RankMemory, sequences: Sequences) -> None:
        self.rank = descriptor.rank
        self._streams = descriptor.streams
        self._memory = memory
        self.places = {
            (stream.name, layer): Place(s, i)
            for s, stream in enumerate(descriptor.streams)
            for i, layer in enumerate(stream.layers)
        }
        self._counts = counts = descriptor.table()[:, 2]
        block_of = np.repeat(np.arange(len(counts)), counts)
        row_in_block = np.arange(len(block_of)) - np.repeat(np.cumsum(counts) - counts, counts)
        chosen = _choose(descriptor, _labels(memory, counts), sequences)
        self._block_of, self._row_of = block_of[chosen], row_in_block[chosen]

    def rows(self, stream: str, layer: int, start: int, stop: int) -> torch.Tensor:
        """Return rows `start` to `stop` of the wanted ones: a view when they lie together, else one gather."""
        place = self.places[stream, layer]
        described = self._streams[place.stream]
        dtype = getattr(torch, described.dtype)
        starts = self._memory.placed.streams[place.stream]
        blocks, rows = self._block_of[start:stop], self._row_of[start:stop]
        num_rows = stop - start
        if not num_rows:
            return torch.empty(0, described.width, dtype=dtype)
        if blocks[0] == blocks[-1] and rows[-1] - rows[0] == num_rows - 1 and (np.diff(rows) == 1).all():
            block = int(blocks[0])
            first = place.layer * int(self._counts[block]) + int(rows[0])
            offset = int(starts[block]) + first * described.row_bytes
            return self._memory.view(block, offset, num_rows * described.row_bytes).view(dtype).view(num_rows, -1)
        index = starts[blocks] // described.row_bytes + place.layer * self._counts[blocks] + rows
        return self._memory.gather(blocks, torch.from_numpy(index), dtype, described.width)


def _labels(memory: RankMemory, counts: IntArray) -> npt.NDArray[np.int32]:
    """Return all labels [3, rows], block after block."""
    if not len(counts):
        return np.empty((NUM_LABELS, 0), np.int32)
    pieces = [memory.labels(block, int(count)) for block, count in enumerate(counts)]
    return np.concatenate(pieces, axis=1)


def _choose(descriptor: Descriptor, labels: npt.NDArray[np.int32], sequences: Sequences) -> IntArray:
    """Return for every wanted row the row that holds it: the last one written for its sequence and position.

    Rows past the end of a sequence (an asynchronous step after a stop, rejected drafts) have no place and fall away;
    a row whose token is not the final sequence's is no match.
    """
    numbers, positions, token_ids = labels
    slot_of = np.array(
        [sequences.slots.get((request.sample, request.completion), -1) for request in descriptor.requests],
        dtype=np.int64,
    )
    if len(numbers) and not (numbers.min() >= 0 and numbers.max() < len(slot_of)):
        raise DescriptorError(f"rank {descriptor.rank}: a row names request {numbers.max()} of {len(slot_of)}")
    sequence = slot_of[numbers] if len(slot_of) else np.empty(0, np.int64)
    lengths = np.diff(sequences.starts)
    usable = np.flatnonzero((sequence >= 0) & (positions >= 0) & (positions < lengths[sequence]))
    flat = sequences.starts[sequence[usable]] + positions[usable]
    # A position written twice (recomputed after preemption, a draft that was rejected) counts as last written: numpy
    # assigns repeated indices in order.
    table = np.full(int(sequences.starts[-1]), -1, np.int64)
    table[flat] = usable
    chosen = table[sequences.wanted]
    absent = np.flatnonzero(chosen < 0)
    if len(absent):
        _raise_missing(descriptor, sequences, sequences.wanted[absent], "did not arrive")
    wrong = np.flatnonzero(token_ids[chosen] != sequences.token_ids[sequences.wanted])
    if len(wrong):
        _raise_missing(descriptor, sequences, sequences.wanted[wrong], "arrived for other tokens than the final ones")
    return chosen


def _raise_missing(descriptor: Descriptor, sequences: Sequences, flat: IntArray, what: str) -> None:
    sequence, position = sequences.position_of(flat)
    sample, completion = next(key for key, number in sequences.slots.items() if number == sequence[0])
    names = {(r.sample, r.completion): r.request_id for r in descriptor.requests}
    mine = position[sequence == sequence[0]]
    listed = ", ".join(map(str, mine[:SHOWN])) + (", ..." if len(mine) > SHOWN else "")
    request_id = names.get((sample, completion), "")
    layers = {stream.name: list(stream.layers) for stream in descriptor.streams}
    raise RowsMissingError(
        f"rank {descriptor.rank}: {len(flat)} of {len(sequences.wanted)} rows {what}; first sample {sample}, request "
        f"{request_id or 'never met by this rank'}, positions {listed}, in {layers}. Nothing of this capture is "
        "returned. Capture again; if it stays so, run `vllm-tap doctor` and report it.",
        sample=sample,
        request_id=request_id,
        positions=mine.tolist(),
        rank=descriptor.rank,
    )

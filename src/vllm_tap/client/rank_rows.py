"""The rows that one rank shipped: checked against the final sequences, then found by number. Client process."""

from __future__ import annotations

import functools
from collections import Counter
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from vllm_tap.client.memory import RankMemory
from vllm_tap.client.sequences import Sequences
from vllm_tap.errors import DescriptorError, RowsMissingError
from vllm_tap.frame.blocks import Places
from vllm_tap.frame.layout import IntArray, Stream
from vllm_tap.frame.messages import Descriptor, Request
from vllm_tap.vllm.names import is_request_of

SHOWN = 8
"""Positions that an error message lists."""


class Plane(NamedTuple):
    """Place of a layer of a stream in this rank's blocks."""

    stream: int
    layer: int


class RankRows:
    """All rows of one rank.

    Attributes:
        memory: Where they lie.
        places: {(stream, layer): place in the blocks}.
        chosen: For every wanted row the number of the row that holds it, over all blocks.

    Raises:
        RowsMissingError: A row that was asked for did not arrive, or none that arrived belongs to the final sequence
            and to the request that its output names.
        DescriptorError: Labels that cannot be.
    """

    def __init__(self, descriptor: Descriptor, memory: RankMemory, matcher: RowMatcher) -> None:
        self._streams = descriptor.streams
        self.memory = memory
        self.places = {
            (stream.name, layer): Plane(s, i)
            for s, stream in enumerate(descriptor.streams)
            for i, layer in enumerate(stream.layers)
        }
        self._counts = descriptor.table()[:, 2]
        self.chosen = matcher.of(descriptor, memory.labels(self._counts))

    @functools.cached_property
    def _place_of(self) -> Places:
        """Places of the wanted rows; made when rows are first read."""
        return Places.all(self._counts).at(self.chosen)

    def stream_of(self, place: tuple[str, int]) -> Stream:
        """Return what this rank says of a layer's rows."""
        return self._streams[self.places[place].stream]

    def rows(self, stream: str, layer: int, start: int, stop: int) -> torch.Tensor:
        """Return rows `start` to `stop` of the wanted ones: a view when they lie together, else one gather."""
        place = self.places[stream, layer]
        described = self._streams[place.stream]
        dtype = getattr(torch, described.dtype)
        starts = self.memory.placed.streams[place.stream]
        blocks, rows = chosen = self._place_of.at(slice(start, stop))
        num_rows = stop - start
        if not num_rows:
            return torch.empty(0, described.width, dtype=dtype)
        if blocks[0] == blocks[-1] and rows[-1] - rows[0] == num_rows - 1 and (np.diff(rows) == 1).all():
            block = int(blocks[0])
            first = place.layer * int(self._counts[block]) + int(rows[0])
            offset = int(starts[block]) + first * described.row_bytes
            return self.memory.view(block, offset, num_rows * described.row_bytes).view(dtype).view(num_rows, -1)
        index = chosen.numbers(starts, self._counts, place.layer, described.row_bytes)
        return self.memory.gather(blocks, torch.from_numpy(index), dtype, described.width)


class RowMatcher:
    """Which rows of a rank are those of the final sequences.

    Tensor-parallel ranks, and pipeline stages too, meet the same rows in the same order: labels that are equal to the
    last rank's, byte for byte, need no second check.
    """

    def __init__(self, sequences: Sequences) -> None:
        self._sequences = sequences
        self._last: tuple[list[tuple[int, int]], npt.NDArray[np.int32], IntArray] | None = None

    def of(self, descriptor: Descriptor, labels: npt.NDArray[np.int32]) -> IntArray:
        """Return for every wanted row the row of this rank that holds it, given the labels [3, R] of all its rows.

        Raises:
            RowsMissingError: As for `RankRows`.
            DescriptorError: As for `RankRows`.
        """
        requests = [(request.sample, request.completion) for request in descriptor.requests]
        if self._last is None or self._last[0] != requests or not np.array_equal(self._last[1], labels):
            self._last = requests, labels, choose_rows(descriptor, labels, self._sequences)
        return self._last[2]


def choose_rows(descriptor: Descriptor, labels: npt.NDArray[np.int32], sequences: Sequences) -> IntArray:
    """Return for every wanted row the row that holds it: the last one written for its sequence and position.

    Rows past the end of a sequence (an asynchronous step after a stop, rejected drafts) have no place and fall away, as
    do those of another request than the one that the output names: where prompts agree, as at the end of a template,
    their tokens would match. A row whose token is not the final sequence's is no match.
    """
    numbers, positions, token_ids = labels
    # As unsigned numbers, what is negative is also too large: one comparison for both bounds.
    if len(numbers) and int(numbers.view(np.uint32).max()) >= len(descriptor.requests):
        raise DescriptorError(
            f"rank {descriptor.rank}: a row names request {numbers[numbers.view(np.uint32).argmax()]} of "
            f"{len(descriptor.requests)}"
        )
    slots = [
        sequences.slots.get((request.sample, request.completion), -1) if _is_of(request, sequences) else -1
        for request in descriptor.requests
    ]
    slot_of = np.array(slots, np.int64)
    lengths = np.where(slot_of >= 0, np.append(np.diff(sequences.starts), 0)[slot_of], 0).astype(np.uint32)
    # All numbers are in bounds: "clip" spares a second look at them.
    usable = positions.view(np.uint32) < lengths.take(numbers, mode="clip")
    flat = sequences.starts[slot_of].take(numbers, mode="clip")
    flat += positions
    is_all = len(sequences.wanted) == len(sequences.token_ids)
    wanted = sequences.token_ids if is_all else sequences.token_ids[sequences.wanted]
    everything = bool(usable.all())
    if everything and np.array_equal(flat, sequences.wanted):
        chosen, found = np.arange(len(flat)), token_ids  # prompts that went through in order
    else:
        chosen = _last_written(flat, usable, everything, int(sequences.starts[-1]))
        chosen = chosen if is_all else chosen[sequences.wanted]
        if len(chosen) and chosen.min() < 0:
            _raise_missing(descriptor, sequences, sequences.wanted[chosen < 0], "did not arrive")
        found = token_ids[chosen]
    wrong = found != wanted
    if wrong.any():
        _raise_missing(descriptor, sequences, sequences.wanted[wrong], "arrived for other tokens than the final ones")
    return chosen


def _is_of(request: Request, sequences: Sequences) -> bool:
    """Tell whether a request is the one that the output of its sample names."""
    output_id = sequences.request_ids.get(request.sample, "")
    return is_request_of(request.request_id, request.completion, output_id)


def _last_written(flat: IntArray, usable: npt.NDArray[np.bool_], everything: bool, num_rows: int) -> IntArray:
    """Return for each of `num_rows` places the usable row that was written there last, -1 where there is none.

    A position is written twice when it is recomputed after preemption, or was a draft that was rejected.
    """
    rows = np.arange(len(flat))
    table = np.full(num_rows, -1, np.int64)
    # numpy assigns repeated indices in order.
    if everything:
        table[flat] = rows
    else:
        table[flat[usable]] = rows[usable]
    return table


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
        f"returned. {_advice(descriptor, sequences, sample, completion)}",
        sample=sample,
        request_id=request_id,
        positions=mine.tolist(),
        rank=descriptor.rank,
    )


def _advice(descriptor: Descriptor, sequences: Sequences, sample: int, completion: int) -> str:
    """Return what to do about rows of a completion that are missing, by which requests came with which marks."""
    mine = [request for request in descriptor.requests if (request.sample, request.completion) == (sample, completion)]
    others = [request.request_id for request in mine if not _is_of(request, sequences)]
    shared = [key for key, count in Counter((r.sample, r.completion) for r in descriptor.requests).items() if count > 1]
    if others:
        return (
            f"Rows came for this sample from request {others[0]}, and its output is of request "
            f"{sequences.request_ids[sample]}: give the outputs in the order of the samples, and every request "
            "a mark of its own."
        )
    if mine:
        return "Capture again; if it stays so, run `vllm-tap doctor` and report it."
    advice = (
        "No request came with the mark of this sample: its parameters had no mark, or that of an older Recording or of "
        f"another sample. Pass what mark(params, {sample}) of this Recording returns, to one request."
    )
    return advice + (f" More than one request came with the mark of sample {shared[0][0]}." if shared else "")

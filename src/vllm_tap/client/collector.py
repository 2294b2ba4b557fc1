"""Rows of a capture that is under way: taken in parts, kept until their sequences are complete. Client process.

A *part* is what one rank handed over at one time. It is let go of, and its memory is free in the worker, as soon as the
last row that somebody may still want has been copied out of it.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterator, Sequence
from typing import Any, Final, NamedTuple

import msgspec
import numpy as np
import torch

from vllm_tap.client.memory import RankMemory
from vllm_tap.client.owned import OwnedRows, Place
from vllm_tap.client.rank_rows import choose_rows
from vllm_tap.client.recording import Recording
from vllm_tap.client.result import Capture
from vllm_tap.client.sequences import Sequences
from vllm_tap.errors import DescriptorError
from vllm_tap.frame.blocks import Places
from vllm_tap.frame.layout import IntArray, Stream
from vllm_tap.frame.messages import Descriptor, Request
from vllm_tap.labels import NUM_LABELS
from vllm_tap.store.dtypes import new_tensor

SMALL_BYTES: Final = 1 << 18
"""Bytes of layers that are copied together: of fewer, the calls cost more than the bytes."""


class Part:
    """Part that one rank handed over at one time.

    Attributes:
        num_pending: Rows of it that have not been copied out or dropped.
    """

    def __init__(self, descriptor: Descriptor, memory: RankMemory) -> None:
        self.descriptor, self._memory = descriptor, memory
        self._counts = descriptor.table()[:, 2]
        self.labels = memory.labels(self._counts)
        self.num_pending = self.labels.shape[1]
        self._places = Places.all(self._counts)

    @property
    def num_bytes(self) -> int:
        """Bytes of the memory that it keeps from being used again."""
        return sum(chunk.nbytes for chunk in self.descriptor.chunks)

    def by_request(self) -> Iterator[tuple[int, IntArray]]:
        """Yield the number of each request, and which rows are of it, ascending."""
        numbers = self.labels[0]
        order = np.argsort(numbers, kind="stable")
        firsts = np.flatnonzero(np.diff(numbers[order], prepend=-1))
        for first, end in itertools.pairwise([*firsts.tolist(), len(order)]):
            yield int(numbers[order[first]]), order[first:end]

    def gather(self, stream: int, planes: IntArray, rows: IntArray, out: torch.Tensor | None = None) -> torch.Tensor:
        """Copy rows of some layers, by their numbers in this part: a tensor [L, R, D]; `out` if that is given."""
        described = self.descriptor.streams[stream]
        places = self._places.at(rows)
        starts = self._memory.placed.streams[stream]
        index = places.numbers(starts, self._counts, planes[:, None], described.row_bytes).ravel()
        dtype = getattr(torch, described.dtype)
        blocks = np.tile(places.blocks, len(planes))
        flat = None if out is None else out.view(-1, described.width)
        found = self._memory.gather(blocks, torch.from_numpy(index), dtype, described.width, flat)
        return found.view(len(planes), len(rows), described.width)


class Piece(NamedTuple):
    """Rows of one sequence in one part."""

    part: Part
    rows: IntArray


class Rank:
    """Parts that one rank has handed over and nobody has read yet."""

    def __init__(self) -> None:
        self.last: Descriptor | None = None
        self._requests: dict[int, Request] = {}  # by their numbers, as the rows have them
        self._numbers: dict[int, list[int]] = {}  # by sample
        self._pieces: dict[int, list[Piece]] = {}  # by number

    def add(self, part: Part) -> None:
        """Sort the rows of a part by their requests.

        Raises:
            DescriptorError: A row of a request that nobody named.
        """
        self.last = descriptor = part.descriptor
        for number, request in enumerate(descriptor.requests, descriptor.first_request):
            self._requests[number] = request
            self._numbers.setdefault(request.sample, []).append(number)
        for number, rows in part.by_request():
            if number in self._requests:
                self._pieces.setdefault(number, []).append(Piece(part, rows))
            elif number >= descriptor.first_request + len(descriptor.requests):
                raise DescriptorError(f"rank {descriptor.rank}: a row names request {number}, which was never met")
            else:
                part.num_pending -= len(rows)  # of a sample that was dropped while it ran

    def requests(self, sample: int) -> list[tuple[Request, list[Piece]]]:
        """Return the engine's requests that were marked as a sample, with their rows in the order they came in."""
        numbers = self._numbers.get(sample, ())
        return [(self._requests[number], self._pieces.get(number, [])) for number in numbers]

    def drop(self, sample: int) -> None:
        """Let go of a sample."""
        for number in self._numbers.pop(sample, ()):
            del self._requests[number]
            for piece in self._pieces.pop(number, ()):
                piece.part.num_pending -= len(piece.rows)

    def drop_before(self, sample: int, position: int) -> None:
        """Let go of a sample's rows of positions before this one."""
        for number in self._numbers.get(sample, ()):
            kept = []
            for part, rows in self._pieces.get(number, ()):
                later = rows[part.labels[1, rows] >= position]
                part.num_pending -= len(rows) - len(later)
                kept += [Piece(part, later)] if len(later) else []
            self._pieces[number] = kept

    def parts(self) -> set[Part]:
        """Return the parts that somebody may still want rows of."""
        return {piece.part for pieces in self._pieces.values() for piece in pieces}


class Collector:
    """Takes rows from a capture that goes on, and makes results of requests that have ended.

    Args:
        recording: The capture; the collector alone takes from it.
    """

    def __init__(self, recording: Recording) -> None:
        self._recording = recording
        self._ranks: dict[int, Rank] = {}

    @property
    def held_bytes(self) -> int:
        """Bytes that the engine may not use again yet."""
        return sum(part.num_bytes for rank in self._ranks.values() for part in rank.parts())

    def take(self) -> None:
        """Take the rows that have come since the last time.

        Raises:
            TapError: What ended the capture early.

        Cost:
            A call to each worker, which waits for the copies that are on their way; some numpy calls. No row is copied.
        """
        for descriptor, memory in self._recording.take():
            self._ranks.setdefault(descriptor.rank, Rank()).add(Part(descriptor, memory))

    def result(self, sample: int, output: Any) -> Capture:
        """Return the rows of one output, which has ended, as a capture of their own, and let go of the memory.

        Args:
            sample: Number that its request was marked with.
            output: vLLM's.

        Raises:
            RowsMissingError: A row that was asked for has not come: `take` first.

        Cost:
            One copy of the rows.
        """
        try:
            return self._result(sample, output, Sequences([output], self._recording.wishes.of(sample).positions))
        finally:
            self.drop(sample)

    def rows_until(self, sample: int, output: Any, begin: int, end: int) -> Capture:
        """Return the rows of some positions of a sequence that goes on, and let go of all before `end`.

        Args:
            sample: Number that its request was marked with.
            output: In the form of vLLM's outputs, with the tokens that are known: at least one more than `end`. A row
                is final when the token behind it is known: drafts of its position may have come before it.
            begin: First position.
            end: Position behind the last one.

        Raises:
            RowsMissingError: As for `result`.
        """
        sequences = Sequences([output], self._recording.wishes.of(sample).positions)
        first, last = np.searchsorted(sequences.wanted, (begin, end))
        sequences.wanted = sequences.wanted[first:last]
        sequences.wanted_starts = np.array([0, len(sequences.wanted)])
        try:
            return self._result(sample, output, sequences)
        finally:
            for rank in self._ranks.values():
                rank.drop_before(sample, end)

    def _result(self, sample: int, output: Any, sequences: Sequences) -> Capture:
        places = self._recording.places_of(self._recording.wishes.of(sample))
        sources = [_owned(rank, sample, sequences, places) for rank in self._ranks.values() if rank.last]
        result = self._recording.new_result([output], sequences, sources, self._recording.wishes.of(sample))
        result.first_sample = sample
        if not self._recording.wishes.is_one:
            result.specs = [self._recording.wishes.of(sample)]
        return result

    def drop(self, sample: int) -> None:
        """Let go of the rows of a sample, such as one that was aborted."""
        for rank in self._ranks.values():
            rank.drop(sample)

    def close(self) -> None:
        """Let go of all rows. An error that ended the capture may keep this object, and with it the memory."""
        self._ranks.clear()


def _owned(rank: Rank, sample: int, sequences: Sequences, places: Collection[Place]) -> OwnedRows:
    """Return the wanted rows of one rank in some streams and layers, copied together."""
    assert rank.last is not None
    found = rank.requests(sample)
    pieces = [piece for _, pieces in found for piece in pieces]
    labels = [piece.part.labels[:, piece.rows] for piece in pieces]
    # As those of a capture that has nothing but this sample.
    owner = itertools.chain.from_iterable([number] * len(pieces) for number, (_, pieces) in enumerate(found))
    for number, mine in zip(owner, labels, strict=True):
        mine[0] = number
    requests = tuple(Request(request.request_id, 0, request.completion) for request, _ in found)
    alone = msgspec.structs.replace(rank.last, requests=requests)
    empty = np.empty((NUM_LABELS, 0), np.int32)
    chosen = choose_rows(alone, np.concatenate([empty, *labels], axis=1), sequences)
    tensors: dict[Place, torch.Tensor] = {}
    for number, stream in enumerate(alone.streams):
        planes = [plane for plane, layer in enumerate(stream.layers) if (stream.name, layer) in places]
        copies = _copied(pieces, chosen, number, stream, planes)
        tensors.update(zip(((stream.name, stream.layers[plane]) for plane in planes), copies, strict=True))
    return OwnedRows(tensors)


def _copied(
    pieces: Sequence[Piece], chosen: IntArray, number: int, stream: Stream, planes: Sequence[int]
) -> Iterator[torch.Tensor]:
    """Yield rows of layers of a stream, each in memory of its own: a layer that is kept does not keep the others."""
    step = max(1, SMALL_BYTES // max(1, len(chosen) * stream.row_bytes))
    for some in (planes[begin : begin + step] for begin in range(0, len(planes), step)):
        rows = new_tensor(stream.dtype, len(some), len(chosen), stream.width)
        _gather(pieces, chosen, number, np.array(some), rows)
        yield from rows if len(some) == 1 else (layer.clone() for layer in rows)


def _gather(pieces: Sequence[Piece], chosen: IntArray, stream: int, planes: IntArray, out: torch.Tensor) -> None:
    """Copy rows of some layers, by their numbers over all pieces, into a tensor [L, R, D]."""
    firsts = np.cumsum([0, *(len(piece.rows) for piece in pieces)])
    of_piece = np.searchsorted(firsts, chosen, "right") - 1
    for number, piece in enumerate(pieces):
        at = np.flatnonzero(of_piece == number)
        if not len(at):
            continue
        rows = piece.rows[chosen[at] - firsts[number]]
        target = out[:, at[0] : at[-1] + 1]
        if target.shape[1] == len(at) and target.is_contiguous():
            piece.part.gather(stream, planes, rows, target)
        else:
            out[:, torch.from_numpy(at)] = piece.part.gather(stream, planes, rows)

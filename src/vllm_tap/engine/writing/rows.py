"""Rows that a client holds, as its shards have them: read where they lie. Worker process."""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Sequence

import numpy as np

from vllm_tap.errors import DescriptorError
from vllm_tap.frame import messages
from vllm_tap.frame.blocks import Bytes, Places
from vllm_tap.frame.layout import IntArray, Stream
from vllm_tap.store.facts import MAX_LAYERS, StreamFacts, check_stream
from vllm_tap.store.files import HELD_CHUNKS
from vllm_tap.transport.segment.pool import SegmentPool


class HeldRows:
    """Rows in the memory of a client, in the order of its shards.

    Attributes:
        streams: Of the descriptor, as a dataset has them.

    Raises:
        DescriptorError: Numbers or names that cannot be, or rows that the client does not hold.
    """

    def __init__(self, write: messages.Write, pool: SegmentPool) -> None:
        descriptor = write.descriptor
        placed = descriptor.validate(write.capture_id, sys.byteorder)
        _require_held(descriptor.chunks, pool)
        numbers, table = write.numbers(), descriptor.table()
        self.streams = [_facts_of(stream) for stream in descriptor.streams]
        self._starts, self._counts = placed.streams, table[:, 2]
        self._places = Places.all(self._counts).at(numbers)
        segments = np.array([chunk.segment_id for chunk in descriptor.chunks], np.int64)[table[:, 0]]
        self._segments = segments[self._places.blocks]
        self._memory = {
            number: np.frombuffer(pool.segment(number).view, np.uint8) for number in np.unique(segments).tolist()
        }
        self._buffers = deque(np.empty(0, np.uint8) for _ in range(HELD_CHUNKS))

    def __len__(self) -> int:
        return len(self._segments)

    def rows(self, stream: int, plane: int, start: int, stop: int) -> Bytes:
        """Return the bytes of rows `start` to `stop` of a shard: a view where they lie together, else one gather.

        What is gathered lies in memory that is used again by the next but one call.
        """
        row_bytes = self.streams[stream].row_bytes
        index = self._places.at(slice(start, stop)).numbers(self._starts[stream], self._counts, plane, row_bytes)
        segments = self._segments[start:stop]
        first = int(segments[0])
        is_one = bool((segments == first).all())
        if is_one and index[-1] - index[0] == len(index) - 1 and (np.diff(index) == 1).all():
            return self._memory[first][int(index[0]) * row_bytes : (int(index[-1]) + 1) * row_bytes]
        out = self._buffer(len(index) * row_bytes).reshape(-1, row_bytes)
        for number in [first] if is_one else np.unique(segments).tolist():
            at = slice(None) if is_one else np.flatnonzero(segments == number)
            self._gather(number, index[at], out, at)
        return out.reshape(-1)

    def _gather(self, segment: int, index: IntArray, out: Bytes, at: slice | IntArray) -> None:
        memory, row_bytes = self._memory[segment], out.shape[1]
        rows = memory[: len(memory) // row_bytes * row_bytes].reshape(-1, row_bytes)
        if isinstance(at, slice):
            # All numbers are in bounds: "clip" copies straight into `out`.
            np.take(rows, index, axis=0, out=out, mode="clip")
        else:
            out[at] = rows[index]

    def _buffer(self, nbytes: int) -> Bytes:
        buffer = self._buffers.popleft()
        if len(buffer) < nbytes:
            buffer = np.empty(nbytes, np.uint8)
        self._buffers.append(buffer)
        return buffer[:nbytes]


def _facts_of(stream: Stream) -> StreamFacts:
    """Return what a dataset says of a stream, which a client has named."""
    facts = StreamFacts(name=stream.name, dtype=stream.dtype, width=stream.width, layers=stream.layers, convention="")
    try:
        check_stream(facts, MAX_LAYERS)
    except ValueError as error:
        raise DescriptorError(f"a stream is to be written that cannot be: {error}") from error
    return facts


def _require_held(chunks: Sequence[messages.Chunk], pool: SegmentPool) -> None:
    for chunk in chunks:
        block = pool.block(chunk.block_id)
        is_inside = block.offset <= chunk.offset and chunk.offset + chunk.nbytes <= block.offset + block.nbytes
        if block.segment_id != chunk.segment_id or not is_inside:
            raise DescriptorError(f"{chunk} is to be written, which is not {block}", block_id=chunk.block_id)

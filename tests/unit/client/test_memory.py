"""The bytes of a rank's blocks as a client reads them: mapped as fetched, and free in the worker in time."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vllm_tap.client.memory import FetchedMemory, MappedMemory, by_calls
from vllm_tap.errors import DescriptorError
from vllm_tap.frame.layout import IntArray, Layout, Stream, layout
from vllm_tap.frame.messages import Chunk, Descriptor
from vllm_tap.transport.segment.pool import SegmentPool
from vllm_tap.transport.segment.reader import SegmentReader
from vllm_tap.transport.segment.server import SegmentServer

MIB = 1 << 20
STREAM = Stream("hidden_states", "int64", 1, (0,))
NUM_CHUNKS = 20
BLOCKS_OF_CHUNK = 3
NUM_ROWS = 7


class Worker:
    """A pool that shares its segments in this process, and a reader of it."""

    def __init__(self) -> None:
        self.pool = SegmentPool(8 * MIB, segment_bytes=2 * MIB)
        self.server = SegmentServer(lambda _: self.pool)
        self.reader = SegmentReader(self.server.address, timeout_s=5)

    def describe(self) -> Descriptor:
        """Publish chunks of random bytes with a few blocks each."""
        chunks, table = [], []
        for number in range(NUM_CHUNKS):
            chunk = self.pool.reserve(300_000)
            self.pool.view(chunk)[:] = np.random.default_rng(number).bytes(chunk.nbytes)
            chunks.append(Chunk(*chunk))
            offset = chunk.offset
            for _ in range(BLOCKS_OF_CHUNK):
                table.append((number, offset, NUM_ROWS))
                offset = -(-layout(offset, NUM_ROWS, [STREAM]).end // 64) * 64
        self.server.publish(self.reader.client, [chunk.block_id for chunk in chunks])
        return describe(chunks, table)

    def fetch(self, segment_id: int, offset: int, nbytes: int) -> bytes:
        """Return bytes of a segment, as the inline transport does."""
        return bytes(self.pool.segment(segment_id).view[offset : offset + nbytes])

    def map(self, descriptor: Descriptor) -> MappedMemory:
        """Take the blocks of a descriptor as a client does."""
        return MappedMemory(descriptor, placed(descriptor), self.reader)

    def wait_for(self, num_blocks: int) -> None:
        """Wait until so many chunks are taken."""
        wait_until(lambda: self.pool.stats().num_blocks == num_blocks)

    def close(self) -> None:
        """Close all three."""
        self.reader.close()
        self.server.close()
        self.pool.close()


def describe(chunks: Sequence[Chunk], table: Sequence[tuple[int, int, int]]) -> Descriptor:
    """Return what says that these blocks (chunk, offset, number of rows) lie in chunks."""
    return Descriptor(
        rank=0,
        capture_id="c",
        streams=(STREAM,),
        requests=(),
        first_request=0,
        chunks=tuple(chunks),
        blocks=np.array(table, "<i8").tobytes(),
        byte_order="little",
        wait_seconds=0.0,
    )


def placed(descriptor: Descriptor) -> Layout[IntArray]:
    """Return where the arrays of all blocks lie."""
    return descriptor.validate("c", "little")


def wait_until(condition: Callable[[], bool]) -> None:
    """Return as soon as a condition holds."""
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        os.sched_yield()


@pytest.fixture
def worker() -> Iterator[Worker]:
    """A worker without chunks."""
    worker = Worker()
    yield worker
    worker.close()


def rows_of(memory: MappedMemory | FetchedMemory, block: int) -> torch.Tensor:
    """Return all rows of a block as a view."""
    return memory.view(block, int(memory.placed.streams[0][block]), 8 * NUM_ROWS).view(torch.int64)


def test_mapped_bytes_equal_fetched_ones(worker):
    """Labels, views in any order and repeated, and a gather over several segments are those of plain copies."""
    descriptor = worker.describe()
    assert len({chunk.segment_id for chunk in descriptor.chunks}) > 1
    mapped, fetched = worker.map(descriptor), FetchedMemory(descriptor, placed(descriptor), by_calls(worker.fetch))
    num_blocks = NUM_CHUNKS * BLOCKS_OF_CHUNK
    counts = np.full(num_blocks, NUM_ROWS)
    np.testing.assert_array_equal(mapped.labels(counts), fetched.labels(counts))
    for block in [*range(num_blocks - 1, -1, -2), *range(num_blocks)]:
        assert torch.equal(rows_of(mapped, block), rows_of(fetched, block))
    blocks = np.arange(num_blocks)[::-1].copy()
    gathered = [
        memory.gather(blocks, torch.from_numpy(memory.placed.streams[0][blocks] // 8), torch.int64, 1)
        for memory in (mapped, fetched)
    ]
    assert torch.equal(*gathered)


@given(st.lists(st.tuples(st.integers(1, 3), st.integers(0, 2), st.booleans()), max_size=30), st.integers(1, 4))
def test_labels_are_those_of_each_block_whatever_their_distances(blocks, num_repeats):
    """Blocks of any numbers of rows, with gaps and in two segments, also many times in a row: read one by one."""
    segments = {number: np.random.default_rng(number).integers(0, 256, 1 << 16, np.uint8) for number in (1, 2)}
    chunks = tuple(Chunk(number, 0, len(segment), number) for number, segment in segments.items())
    table, expected, chunk, offset = [], [np.empty((3, 0), np.int32)], 0, 0
    for num_rows, gap, changes in [block for block in blocks for _ in range(num_repeats)]:
        chunk ^= changes
        table.append((chunk, offset, num_rows))
        labels = segments[chunks[chunk].segment_id][offset : offset + 12 * num_rows]
        expected.append(labels.view(np.int32).reshape(3, num_rows))
        offset = -(-layout(offset, num_rows, [STREAM]).end // 64) * 64 + 64 * gap
    descriptor = describe(chunks, table)
    reader = SimpleNamespace(hold=lambda _: None, segment_array=segments.__getitem__)
    labels = MappedMemory(descriptor, placed(descriptor), reader).labels(descriptor.table()[:, 2])
    assert labels.dtype == np.int32
    np.testing.assert_array_equal(labels, np.concatenate(expected, axis=1))


def test_a_chunk_is_free_when_its_tensors_and_the_memory_are_gone(worker):
    """A tensor that is kept keeps its own chunk when all others become free, and no chunk is free before."""
    memory = worker.map(worker.describe())
    first, again, other = rows_of(memory, 6), rows_of(memory, 8), rows_of(memory, 9)
    expected = first.clone()
    del again, other  # of the same chunk and of another one
    assert worker.pool.stats().num_blocks == NUM_CHUNKS
    del memory
    worker.wait_for(1)
    assert torch.equal(first, expected)
    del first
    worker.wait_for(0)


def test_repeated_views_of_a_chunk_share_one_lease(worker):
    """The second view of a chunk makes nothing anew: both tensors lie in the same pages."""
    memory = worker.map(worker.describe())
    first, again = rows_of(memory, 0), rows_of(memory, 0)
    assert first.data_ptr() == again.data_ptr()
    del memory, first
    worker.wait_for(1)
    del again
    worker.wait_for(0)


def test_a_descriptor_with_a_bad_chunk_holds_nothing(worker):
    """One chunk outside its segment: the error comes at once, and the other chunks are free."""
    descriptor = worker.describe()
    last = descriptor.chunks[-1]
    bad = Chunk(last.segment_id, last.offset, 4 * MIB, last.block_id)
    lying = msgspec.structs.replace(descriptor, chunks=(*descriptor.chunks[:-1], bad))
    with pytest.raises(DescriptorError, match="ends outside its segment"):
        worker.map(lying)
    wait_until(lambda: worker.pool.stats().num_blocks <= 1)

"""Writes of a client into what a worker shares: they end no process, nobody else sees them, and the lease ends them."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from vllm_tap.transport.segment import mapping
from vllm_tap.transport.segment.memory import PAGE_BYTES
from vllm_tap.transport.segment.pool import Block, SegmentPool
from vllm_tap.transport.segment.reader import SegmentReader
from vllm_tap.transport.segment.server import SegmentServer

MIB = 1 << 20


class Worker:
    """A pool and its server in this process, and a reader of it."""

    def __init__(self) -> None:
        self.pool = SegmentPool(4 * MIB, segment_bytes=2 * MIB)
        self.server = SegmentServer(lambda _: self.pool)
        self.reader = SegmentReader(self.server.address, timeout_s=5)

    def put(self, nbytes: int, value: int) -> Block:
        """Publish a block of equal bytes."""
        block = self.pool.reserve(nbytes)
        self.pool.view(block)[:] = bytes([value]) * nbytes
        self.server.publish(self.reader.client, [block.block_id])
        return block

    def wait_for(self, num_blocks: int) -> None:
        """Wait until so many blocks are taken."""
        while self.pool.stats().num_blocks != num_blocks:
            os.sched_yield()

    def close(self) -> None:
        """Close all three."""
        self.reader.close()
        self.server.close()
        self.pool.close()


@pytest.fixture
def worker() -> Iterator[Worker]:
    """A worker without blocks."""
    worker = Worker()
    yield worker
    worker.close()


WRITES: dict[str, Callable[[np.ndarray], object]] = {
    "array": lambda array: array.__isub__(1),
    "view of an array": lambda array: array.view(np.uint16).reshape(-1, 2)[1:].fill(7),
    "tensor": lambda array: torch.from_numpy(array).sub_(1),
    "numpy of a tensor": lambda array: torch.from_numpy(array).view(torch.float32).numpy().fill(3),
    "array of a tensor": lambda array: np.asarray(torch.from_numpy(array)).__setitem__(slice(None, None, 9), 0),
}


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
def test_a_write_stays_in_this_process(worker, write):
    """The array has what was written; the worker, and another reader of the same segment, have what was there."""
    block = worker.put(3 * PAGE_BYTES, 5)
    array = worker.reader.lease(block).array
    other = SegmentReader(worker.server.address, timeout_s=5)
    write(array)
    assert (array != 5).any()
    assert bytes(worker.pool.view(block)) == b"\5" * block.nbytes
    worker.server.publish(other.client, [block.block_id])
    assert other.lease(block).array.tobytes() == b"\5" * block.nbytes
    other.close()


@pytest.mark.parametrize("way", ["looks for copies", "cannot look", "cannot let go"])
def test_what_was_written_does_not_hide_later_blocks(worker, monkeypatch, way):
    """A place that is used again shows the worker's bytes, however little the system tells and does."""
    if way == "cannot look":
        monkeypatch.setattr(mapping, "PAGEMAP", "/nowhere")
    if way == "cannot let go":
        monkeypatch.setattr(mapping, "advise", refuse)
    places = []
    for value in range(1, 6):
        block = worker.put(3 * PAGE_BYTES - 100, value)
        places.append((block.segment_id, block.offset))
        array = worker.reader.lease(block).array
        assert (array == value).all()
        array[:: PAGE_BYTES // 2] = 200
        del array
        worker.wait_for(0)
    assert len(set(places)) == 1


def refuse(*_: int) -> None:
    """Do as the kernel does where pages are locked in memory."""
    raise OSError("Invalid argument")


def test_what_was_written_touches_no_other_block(worker):
    """Blocks of a few bytes lie beside a written one: those that were there, and those that come while it is held."""
    before, mine = worker.put(10, 1), worker.put(10, 2)
    array = worker.reader.lease(mine).array
    array[:] = 200
    after = worker.put(10, 3)
    assert {block.segment_id for block in (before, mine, after)} == {mine.segment_id}
    assert worker.reader.lease(before).array.tolist() == [1] * 10
    assert worker.reader.lease(after).array.tolist() == [3] * 10
    assert array.tolist() == [200] * 10


def test_only_written_pages_are_copied(worker):
    """Reading takes no memory of this process's own, a write takes its page, and the end of the lease gives it back."""
    block = worker.put(64 * PAGE_BYTES, 9)
    lease = worker.reader.lease(block)
    address = lease.array.ctypes.data
    assert int(lease.array.sum()) == 9 * block.nbytes
    assert own_bytes(address) == 0
    lease.array[5 * PAGE_BYTES : 7 * PAGE_BYTES] = 1
    assert own_bytes(address) == 2 * PAGE_BYTES
    del lease
    worker.wait_for(0)
    assert own_bytes(address) == 0


def own_bytes(address: int) -> int:
    """Return how many bytes of the mapping at an address this process shares with nobody, as the kernel counts them."""
    found, kib = False, 0
    for line in Path("/proc/self/smaps").read_text().splitlines():
        name, *values = line.split()
        if "-" in name and not name.endswith(":"):
            start, end = (int(bound, 16) for bound in name.split("-"))
            found = start <= address < end
        elif found and name == "Anonymous:":
            kib += int(values[0])
    return kib * 1024

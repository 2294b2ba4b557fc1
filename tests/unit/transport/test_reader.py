"""Blocks that are held together: the bytes of single leases, each block's own end, and nothing held by half.

What does not depend on where the bytes lie is tested over every transport. Over a network they are the client's own,
and blocks end when they are here.
"""

from __future__ import annotations

import gc
import itertools
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

import transports
from transports import connect, keeps, serve
from vllm_tap.errors import DescriptorError, TransportError
from vllm_tap.transport import wire
from vllm_tap.transport.segment.pool import Block, SegmentPool
from vllm_tap.transport.tcp import frames

MIB = 1 << 20


class Worker:
    """A pool and its server in this process, and a reader of it.

    Attributes:
        releases: the block numbers of each packet that frees some, as they arrived.
    """

    def __init__(self, transport: str) -> None:
        self.pool = SegmentPool(32 * MIB, segment_bytes=2 * MIB)
        self.server = serve(transport, self.pool)
        self.reader = connect(self.server.address)
        self.releases: list[list[int]] = []

    def put(self, *sizes: int) -> list[Block]:
        """Publish blocks of random bytes."""
        blocks = [self.pool.reserve(nbytes) for nbytes in sizes]
        for block in blocks:
            self.pool.view(block)[:] = np.random.default_rng(block.block_id).bytes(block.nbytes)
        self.server.publish(self.reader.client, [block.block_id for block in blocks])
        return blocks

    def content(self, block: Block) -> bytes:
        """Return what a block holds in the worker."""
        return bytes(self.pool.view(block))

    def wait_for(self, num_blocks: int) -> None:
        """Wait until so many blocks are taken; see that no packet is under way that frees more."""
        wait_until(lambda: self.pool.stats().num_blocks <= num_blocks)
        (last,) = self.put(1)
        self.reader.lease(last)
        wait_until(lambda: [last.block_id] in self.releases and self.pool.stats().num_blocks <= num_blocks)
        self.releases.remove([last.block_id])
        assert self.pool.stats().num_blocks == num_blocks

    def released(self) -> list[int]:
        """Return the block numbers of all packets in order."""
        return sorted(itertools.chain.from_iterable(self.releases))

    def close(self) -> None:
        """Close all three."""
        self.reader.close()
        self.server.close()
        self.pool.close()


def wait_until(condition: Callable[[], bool]) -> None:
    """Return as soon as a condition holds."""
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        os.sched_yield()


@pytest.fixture(params=["segment"])
def worker(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Worker]:
    """A worker whose packets are noted as they arrive."""
    worker, decode, decode_ids = Worker(request.param), wire.decode_request, frames.decode_ids

    def noted(packet: bytes) -> tuple[int, tuple[int, ...]]:
        kind, numbers = decode(packet)
        if kind == wire.RELEASE:
            worker.releases.append(sorted(numbers))
        return kind, numbers

    def noted_ids(data: bytes) -> tuple[int, ...]:
        numbers = decode_ids(data)
        worker.releases.append(sorted(numbers))
        return numbers

    monkeypatch.setattr(wire, "decode_request", noted)
    monkeypatch.setattr(frames, "decode_ids", noted_ids)
    yield worker
    worker.close()


over_every_transport = pytest.mark.parametrize("worker", transports.NAMES, indirect=True)


def numbers(blocks: list[Block]) -> list[int]:
    """Return the numbers of blocks in order."""
    return sorted(block.block_id for block in blocks)


@over_every_transport
def test_held_blocks_show_the_bytes_of_single_leases(worker):
    """Blocks of many sizes in several segments, read in any order, lie where a lease of each would lie."""
    sizes = [1, 4095, 4096, 100_000, MIB, 2 * MIB, 3 * MIB]
    held_blocks, leased_blocks = worker.put(*sizes), worker.put(*sizes)
    assert len({block.segment_id for block in held_blocks}) > 1
    contents = [worker.content(block) for block in held_blocks]
    held = worker.reader.hold(held_blocks)
    for index in (3, 0, 6, 5, 1, 4, 2, -1):
        lease, block = held.lease(index), held_blocks[index]
        assert lease.block == block
        assert lease.array.tobytes() == contents[index]
        if not keeps(worker.reader):
            continue
        whole = worker.reader.segment_array(block.segment_id)
        assert lease.array.ctypes.data == whole.ctypes.data + block.offset
    for block in leased_blocks:
        content = worker.content(block)
        assert worker.reader.lease(block).array.tobytes() == content


def test_blocks_that_nobody_asked_for_end_in_one_packet(worker):
    """The end of the whole is one RELEASE with all numbers, without a cycle collection."""
    blocks = worker.put(*[10] * 200)
    gc.disable()
    try:
        held = worker.reader.hold(blocks)
        worker.wait_for(200)
        del held
        worker.wait_for(0)
    finally:
        gc.enable()
    assert worker.releases == [numbers(blocks)]


@over_every_transport
def test_more_blocks_than_a_packet_takes_end_in_few(worker):
    """A packet names at most 4096 blocks; the rest follows in the next one."""
    blocks = worker.put(*[1] * 5000)
    worker.reader.hold(blocks)
    worker.wait_for(0)
    assert sorted(map(len, worker.releases)) == [5000 - wire.MAX_RELEASE_IDS, wire.MAX_RELEASE_IDS]
    assert worker.released() == numbers(blocks)


def test_a_lease_keeps_its_own_block_only(worker):
    """When the whole is gone, all blocks are free but the one over which an array lives, then that one as well."""
    blocks = worker.put(*[5000] * 10)
    held = worker.reader.hold(blocks)
    kept = held.lease(4).array[100:200]
    del held
    worker.wait_for(1)
    assert worker.releases == [numbers(blocks[:4] + blocks[5:])]
    assert kept.tobytes() == worker.content(blocks[4])[100:200]
    del kept
    worker.wait_for(0)
    assert worker.releases[1:] == [[blocks[4].block_id]]


def test_a_lease_that_is_gone_stays_while_the_whole_is_held(worker):
    """A block is not free before the whole is gone, whether or not somebody has looked at it: it can be read again."""
    blocks = worker.put(*[100] * 3)
    held = worker.reader.hold(blocks)
    held.lease(0)
    held.lease(1)
    worker.wait_for(3)
    assert held.lease(0).array.tobytes() == worker.content(blocks[0])
    del held
    worker.wait_for(0)
    assert worker.released() == numbers(blocks)


@pytest.fixture
def frequent_switches() -> Iterator[None]:
    """Threads that take turns as often as they can."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


@over_every_transport
def test_threads_that_ask_for_one_index_share_its_pages(worker, frequent_switches):
    """Whoever comes first, there is one lease for an index, which ends once."""
    num_threads, blocks = 4, worker.put(*[10] * 300)
    barrier = threading.Barrier(num_threads)
    held = [worker.reader.hold(blocks)]

    def lease(index: int) -> object:
        barrier.wait()
        return held[0].lease(index).array.base

    def lease_all() -> list[object]:
        return [lease(index) for index in range(len(blocks))]

    with ThreadPoolExecutor(num_threads) as threads:
        found = [future.result() for future in [threads.submit(lease_all) for _ in range(num_threads)]]
    for bases in zip(*found, strict=True):
        assert len(set(map(id, bases))) == 1
    worker.wait_for(300 * keeps(worker.reader))
    del held[0], found, bases
    worker.wait_for(0)
    assert worker.released() == numbers(blocks)


def test_held_blocks_outlive_the_reader(worker):
    """After `close`, blocks that nobody has looked at can still be; their end is the end of the connection."""
    blocks = worker.put(*[1000] * 3)
    held = worker.reader.hold(blocks)
    worker.reader.close()
    kept = held.lease(1)
    assert kept.array.tobytes() == worker.content(blocks[1])
    with pytest.raises(TransportError, match="closed"):
        worker.reader.hold(blocks)
    del held
    wait_until(lambda: worker.pool.stats().num_blocks == 1)
    assert worker.server.is_connected(worker.reader.client)
    del kept
    wait_until(lambda: not worker.server.is_connected(worker.reader.client))
    assert worker.pool.stats().num_blocks == 0


@over_every_transport
def test_no_blocks_are_held_and_released(worker):
    """A rank that ships nothing costs no packet."""
    worker.reader.hold([])
    worker.wait_for(0)
    assert worker.releases == []


BAD = {
    "outside": lambda block: block._replace(nbytes=3 * MIB),
    "negative": lambda block: block._replace(offset=-1),
    "no integer": lambda block: block._replace(nbytes="10"),
    "no number": lambda block: block._replace(block_id=None),
    "not hashable": lambda block: block._replace(block_id=[]),
    "too large a number": lambda block: block._replace(block_id=1 << 64),
    "no such segment": lambda block: block._replace(segment_id=99),
}


@pytest.mark.parametrize(
    ("worker", "spoil"),
    [
        pytest.param(transport, BAD[name], id=f"{transport}-{name}")
        for transport in transports.NAMES
        for name in BAD
        if transport == "segment" or name != "no such segment"  # which nobody looks into there
    ],
    indirect=["worker"],
)
@pytest.mark.parametrize("at", [0, 2, 4])
def test_one_bad_block_frees_the_others(worker, spoil, at):
    """Wherever the bad block stands, it is refused as by a lease, and the worker has the good ones back at once."""
    blocks = worker.put(*[10] * 5)
    given = [*blocks[:at], spoil(blocks[at]), *blocks[at + 1 :]]
    with pytest.raises(DescriptorError) as single:
        worker.reader.lease(given[at])
    with pytest.raises(DescriptorError) as caught:  # kept, with all that its frames refer to
        worker.reader.hold(given)
    assert (str(caught.value), caught.value.identity) == (str(single.value), single.value.identity)
    good = numbers(blocks[:at] + blocks[at + 1 :])
    wait_until(lambda: len(worker.released()) >= len(good))
    assert [number for number in worker.releases[-1] if number != blocks[at].block_id] == good
    # Over a network a lease that is refused frees its block as well, if it has the number of one.
    assert len(worker.releases) == 1 or not keeps(worker.reader)


def test_blocks_in_other_hands_are_refused_and_stay_there(worker):
    """A list with a block that is leased or held is refused and freed, all but that block."""
    leased, held, *rest = worker.put(*[10] * 6)
    lease, holder = worker.reader.lease(leased), worker.reader.hold([held])
    for taken in (leased, held):
        with pytest.raises(DescriptorError, match=f"block {taken.block_id} is leased or held already"):
            worker.reader.hold([rest.pop(), taken, rest.pop()])
    worker.wait_for(2)
    assert lease.array.tobytes() == worker.content(leased)
    assert holder.lease(0).array.tobytes() == worker.content(held)
    del lease, holder
    worker.wait_for(0)


def test_a_held_block_is_leased_through_its_holder_only(worker):
    """A single lease would end the block under the holder."""
    (block,) = worker.put(10)
    held = worker.reader.hold([block])
    with pytest.raises(DescriptorError, match="leased or held already"):
        worker.reader.lease(block)
    worker.wait_for(1)
    assert held.lease(0).array.tobytes() == worker.content(block)


@over_every_transport
def test_a_block_that_comes_twice_is_refused(worker):
    """It would end twice, the first time under the other's tensors."""
    blocks = worker.put(10, 10)
    with pytest.raises(DescriptorError, match="one comes twice"):
        worker.reader.hold([*blocks, blocks[0]])
    worker.wait_for(0)
    assert worker.releases == [numbers(blocks)]

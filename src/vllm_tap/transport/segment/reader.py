"""The client's side: blocks of a worker as arrays, each with a lease that ends with the last array over it.

Runs in the client process.
"""

from __future__ import annotations

import contextlib
import os
import threading
import weakref
from collections.abc import Callable, Collection, Sequence
from typing import NamedTuple

from vllm_tap.errors import DescriptorError, TransportError
from vllm_tap.transport import threads, wire
from vllm_tap.transport.segment.link import Link
from vllm_tap.transport.segment.mapping import Bytes, Mapping, Pages
from vllm_tap.transport.segment.pool import Block

_NOTICE_SECONDS = 10.0
"""Seconds that segments stay mapped, in a process that does nothing, after the worker has closed them."""

_END = 1 << 63
"""Numbers of blocks and segments lie below."""


class Lease(NamedTuple):
    """A reader's right to a block; it ends when the last array or tensor over it is gone, this one included.

    Attributes:
        block: the block.
        array: its bytes, uint8 [nbytes]. Every array or tensor made from it without a copy keeps the lease. They are
            the worker's pages; one that is written becomes a copy of this process's own, for as long as the lease.
    """

    block: Block
    array: Bytes


class Held:
    """Blocks that were taken together, each of which becomes a lease when it is first asked for.

    Those that nobody asks for end together when this object is gone. One that was asked for ends when its lease and
    this object are gone.
    """

    def __init__(self, blocks: Sequence[Block], mappings: dict[int, Mapping], link: Link) -> None:
        self._blocks = blocks
        self._mappings = mappings
        self._link = link
        self._lock = threading.Lock()
        self._leases: list[Lease | None] = [None] * len(blocks)
        self._untouched = {block.block_id for block in blocks}
        _at_end_of(self, link.end, self._untouched)  # those that are in it then

    def lease(self, index: int) -> Lease:
        """Return the bytes of the block at this index of the list that was taken; each time the same lease.

        Returns:
            Lease whose array is uint8 [nbytes], CPU, over the worker's pages. It keeps its own block and none of the
            others. Outlives this object, the reader and the worker.

        Cost:
            No copy. Microseconds at the first call for an index.
        """
        lease = self._leases[index]
        return self._first_lease(index) if lease is None else lease

    def _first_lease(self, index: int) -> Lease:
        with self._lock:  # two threads with one index share one lease, which ends once
            lease = self._leases[index]
            if lease is None:
                block = self._blocks[index]
                # First, and once: whatever interrupts what follows, no tensor ever shows a block that is free.
                self._untouched.remove(block.block_id)
                pages = _leased_pages(block, self._mappings, self._link)
                lease = self._leases[index] = Lease(block, pages.array())
        return lease


class SegmentReader:
    """Reads what one worker publishes to this process.

    Args:
        address: the `SegmentServer.address` of the worker.
        timeout_s: how long a worker may take to answer.

    Attributes:
        client: the number by which the worker knows this reader.
        worker_pid: process of the worker.
        pool_id: 16 random bytes that name the worker's pool.

    Raises:
        TransportError: nothing answers at the address; another host, container or network namespace cannot reach it.
    """

    def __init__(self, address: str, *, timeout_s: float = 30.0) -> None:
        self._link = Link(address, timeout_s)
        self.client, self.worker_pid, self.pool_id = self._link.hello
        self._lock = threading.Lock()
        self._mappings: dict[int, Mapping] = {}
        self._leased: weakref.WeakValueDictionary[int, Pages] = weakref.WeakValueDictionary()
        self._closed = self._is_looked_after = False
        self._ended = threading.Lock()  # held until then; the garbage collector may let go of it at any moment
        self._ended.acquire()
        self._end = weakref.finalize(self, self._ended.release)
        self._end.atexit = False

    @property
    def alive(self) -> bool:
        """True while the worker is there; False from the moment its connection ends, or after `close`."""
        if not self._closed and self._lock.acquire(blocking=False):  # else another thread is talking to the worker
            try:
                self._take_notices()
            finally:
                self._lock.release()
        return not self._closed and not self._link.eof

    def lease(self, block: Block) -> Lease:
        """Return the bytes of a block that was published to this reader.

        The lease ends with the last array or tensor over it; after that the worker writes over the block, and the
        same descriptor must not be leased again.

        Returns:
            Lease whose array is uint8 [nbytes], CPU, over the worker's pages. Outlives `close` and the worker.

        Raises:
            DescriptorError: the block does not lie in a segment of the worker, or the segment is not a sealed one.
            TransportError: the reader is closed, or the worker has gone before it handed over the segment.

        Cost:
            No copy. Microseconds; the first lease in a segment maps it, about 0.13 s a GiB.
        """
        check_block(block)
        with self._lock:  # two threads with one block share one lease, which ends once
            pages = self._leased.get(block.block_id)
            if pages is None:
                mappings = self._begin([block])
                pages = self._leased[block.block_id] = _leased_pages(block, mappings, self._link)
        return Lease(block, _same_block(pages, block))

    def hold(self, blocks: Sequence[Block]) -> Held:
        """Take all blocks of a list that was published to this reader, or none of them.

        They stay until the result is gone; one that was leased through it stays until that lease is gone too. Until
        then `lease` and `hold` refuse them.

        Returns:
            Held, whose `lease` takes an index into `blocks`.

        Raises:
            DescriptorError: as for `lease`, and for a block that comes twice, or is leased or held already.
            TransportError: as for `lease`. After either error the worker may write over the whole list, except for what
                was leased or held before.

        Cost:
            No copy. About a microsecond a block; the first use of a segment maps it, about 0.13 s a GiB.
        """
        blocks = tuple(blocks)
        with self._lock:
            try:
                for block in blocks:
                    check_block(block)
                mappings = self._begin(blocks)
            except BaseException:
                self._give_back(blocks)
                raise
            return Held(blocks, mappings, self._link)

    def _begin(self, blocks: Sequence[Block]) -> dict[int, Mapping]:
        """Note that leases on blocks begin, if all of them can; return their segments by number."""
        self._catch_up()
        block_ids = {block.block_id for block in blocks}
        taken = self._link.leased(block_ids)
        if taken:
            raise DescriptorError(f"block {min(taken)} is leased or held already", block_id=min(taken))
        check_distinct(blocks)
        mappings = {segment_id: self._mapping(segment_id) for segment_id in {block.segment_id for block in blocks}}
        for block in blocks:
            _check_bounds(block, mappings[block.segment_id].nbytes)
        self._link.begin(block_ids)
        return mappings

    def _give_back(self, blocks: Sequence[Block]) -> None:
        """End what nobody leases of a list that was refused."""
        block_ids = usable_ids(blocks)
        self._link.end(block_ids - self._link.leased(block_ids))

    def release(self, block_ids: Collection[int]) -> None:
        """Tell the worker that blocks which were never leased are not wanted any more; does not wait."""
        self._link.end(block_ids)

    def segment_array(self, segment_id: int) -> Bytes:
        """Return a whole segment, for gathers over many blocks; the caller holds the leases of what it reads.

        Returns:
            Array uint8 [segment bytes], CPU, over the worker's pages; keeps the mapping, not the blocks.

        Raises:
            DescriptorError: the worker has no such segment, or not a sealed one.
            TransportError: the reader is closed, or the worker has gone.
        """
        with self._lock:
            self._catch_up()
            mapping = self._mapping(segment_id)
        return Pages(mapping.address, mapping.nbytes, mapping).array()

    def close(self) -> None:
        """Take no more leases. Arrays stay readable; the worker's memory is free again when the last is gone."""
        with self._lock:
            self._closed = True
            self._end()
            self._mappings.clear()
        self._link.close()

    def _catch_up(self) -> None:
        if self._closed:
            raise TransportError("this reader is closed: it takes no more leases.")
        self._link.flush()
        self._take_notices()

    def _mapping(self, segment_id: int) -> Mapping:
        mapping = self._mappings.get(segment_id)
        if mapping is None or mapping.is_spoilt:
            mapping = self._mappings[segment_id] = self._map(segment_id)
            if not self._is_looked_after:
                with contextlib.suppress(RuntimeError):  # no more threads here: notices wait for the next lease
                    arguments = weakref.ref(self), self._ended
                    threads.start("vllm-tap-reader", _look_after, *arguments, stop=self._ended.release)
                    self._is_looked_after = True
        return mapping

    def _map(self, segment_id: int) -> Mapping:
        self._link.request_segment(segment_id)
        while True:
            packet, fds = self._link.receive()
            try:
                reply = wire.Reply.decode(packet)
                if reply.kind == wire.DROPPED:
                    self._mappings.pop(reply.segment_id, None)
                    continue
                if reply.segment_id != segment_id or len(fds) != 1:
                    raise DescriptorError(
                        f"segment {segment_id} was asked for; the worker answered with segment {reply.segment_id} and "
                        f"{len(fds)} file descriptors: it has no such segment, does not share it, or has no descriptor "
                        "left; see its log.",
                        segment_id=segment_id,
                    )
                return Mapping(fds[0], segment_id, reply.nbytes, is_file=reply.kind == wire.IN_FILE)
            finally:
                for fd in fds:
                    os.close(fd)

    def _take_notices(self) -> None:
        """Let go of segments that the worker has closed, so that their memory is free."""
        while (received := self._link.receive_now()) is not None:
            packet, fds = received
            for fd in fds:
                os.close(fd)
            self._mappings.pop(wire.Reply.decode(packet).segment_id, None)

    def _look(self) -> bool:
        """Take notices that have come while nobody leases anything; return whether there is something to look after."""
        with self._lock:
            self._is_looked_after = False
            if not self._closed:
                self._take_notices()
            self._is_looked_after = bool(self._mappings) and not self._closed and not self._link.eof
            return self._is_looked_after


def _look_after(reference: weakref.ref[SegmentReader], ended: threading.Lock) -> None:
    while not ended.acquire(timeout=_NOTICE_SECONDS):
        reader = reference()
        if reader is None or not reader._look():
            return
        del reader  # not while this waits: the reader may go


def _leased_pages(block: Block, mappings: dict[int, Mapping], link: Link) -> Pages:
    mapping = mappings[block.segment_id]
    pages = Pages(mapping.address + block.offset, block.nbytes, mapping)
    _at_end_of(pages, _end_lease, block, mapping, link)
    return pages


def _end_lease(block: Block, mapping: Mapping, link: Link) -> None:
    # In this order: once the worker knows, it may write here, and a copy would hide that.
    mapping.forget_writes(block.offset, block.nbytes)
    link.end([block.block_id])


def _at_end_of(owner: object, function: Callable[..., None], *args: object) -> None:
    """Have a function called when an object is gone."""
    # Not at exit: the end of the connection frees everything, and threads may be gone by then.
    weakref.finalize(owner, function, *args).atexit = False


def check_block(block: Block) -> None:
    """Refuse a block whose numbers cannot be.

    Raises:
        DescriptorError: Which one.
    """
    segment_id, offset, nbytes, block_id = block
    if not type(segment_id) is type(offset) is type(nbytes) is type(block_id) is int:
        raise DescriptorError(f"{_name(block)} holds something that is not an integer")
    if offset < 0 or nbytes < 1 or not 1 <= block_id < _END or not 1 <= segment_id < _END:
        raise DescriptorError(f"{_name(block)} has a number out of range", block_id=block.block_id)


def check_distinct(blocks: Sequence[Block]) -> None:
    """Refuse a list in which a block comes twice.

    Raises:
        DescriptorError: One does.
    """
    block_ids = {block.block_id for block in blocks}
    if len(block_ids) < len(blocks):
        raise DescriptorError(f"{len(blocks)} blocks have {len(block_ids)} different numbers: one comes twice")


def usable_ids(blocks: Sequence[Block]) -> set[int]:
    """Return the numbers of those blocks that have one."""
    return {block.block_id for block in blocks if type(block.block_id) is int and 1 <= block.block_id < _END}


def _check_bounds(block: Block, segment_nbytes: int) -> None:
    if block.nbytes > segment_nbytes - block.offset:
        raise DescriptorError(
            f"{_name(block)} ends outside its segment of {segment_nbytes} bytes",
            block_id=block.block_id,
            segment_id=block.segment_id,
        )


def _same_block(pages: Pages, block: Block) -> Bytes:
    array = pages.array()
    if array.nbytes != block.nbytes:
        raise DescriptorError(f"{_name(block)} is leased already with {array.nbytes} bytes", block_id=block.block_id)
    return array


def _name(block: Block) -> str:
    return f"block {block.block_id} ({block.nbytes} bytes at {block.offset} of segment {block.segment_id})"

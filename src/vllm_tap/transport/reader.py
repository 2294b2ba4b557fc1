"""The client's side: blocks of a worker as arrays, each with a lease that ends with the last array over it.

Runs in the client process.
"""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
import threading
import weakref
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from vllm_tap.errors import DescriptorError, TransportError
from vllm_tap.transport import wire
from vllm_tap.transport.link import Link
from vllm_tap.transport.memory import MADV_POPULATE_READ, SEAL_GROW, SEAL_SHRINK, address_of, populate
from vllm_tap.transport.pool import Block

Bytes = npt.NDArray[np.uint8]

_NEEDED_SEALS = SEAL_SHRINK | SEAL_GROW


class Lease(NamedTuple):
    """A reader's right to a block; it ends when the last array or tensor over it is gone, this one included.

    Attributes:
        block: the block.
        array: its bytes, uint8 [nbytes]. Every array or tensor made from it without a copy keeps the lease. The pages
            are mapped read-only though the array is not marked so (tensors know no such mark): writing into them ends
            the process with a segmentation fault. Copy what you want to change.
    """

    block: Block
    array: Bytes


class _Pages:
    """Bytes at an address; arrays made from it keep it alive, and with it what the bytes lie in."""

    __slots__ = ("__array_interface__", "__weakref__", "_keep")

    def __init__(self, address: int, nbytes: int, keep: object) -> None:
        self.__array_interface__ = {"version": 3, "data": (address, False), "shape": (nbytes,), "typestr": "|u1"}
        self._keep = keep

    def array(self) -> Bytes:
        return np.asarray(self)


class _Mapping:
    """A worker's segment in this process. Unmapped when nothing refers to it any more, never by a call."""

    def __init__(self, fd: int, segment_id: int, nbytes: int) -> None:
        _check_segment(fd, segment_id, nbytes)
        self._mmap = mmap.mmap(fd, nbytes, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ)
        self.nbytes = nbytes
        self.address = address_of(self._mmap)
        with contextlib.suppress(OSError):  # a kernel before 5.14 maps the pages at the first reading
            populate(self.address, nbytes, MADV_POPULATE_READ)


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
        self._mappings: dict[int, _Mapping] = {}
        self._leased: weakref.WeakValueDictionary[int, _Pages] = weakref.WeakValueDictionary()
        self._closed = False

    @property
    def alive(self) -> bool:
        """Whether the worker is there; False from the moment its connection ends, or after `close`."""
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
        _check_block(block)
        with self._lock:  # two threads with one block share one lease, which ends once
            pages = self._leased.get(block.block_id)
            if pages is None:
                pages = self._begin(block)
        return Lease(block, _same_block(pages, block))

    def _begin(self, block: Block) -> _Pages:
        mapping = self._mapping(block.segment_id)
        _check_bounds(block, mapping.nbytes)
        pages = _Pages(mapping.address + block.offset, block.nbytes, mapping)
        self._link.begin(block.block_id)
        # Not at exit: the end of the connection frees everything, and threads may be gone by then.
        weakref.finalize(pages, self._link.end, block.block_id).atexit = False
        self._leased[block.block_id] = pages
        return pages

    def segment_array(self, segment_id: int) -> Bytes:
        """Return a whole segment, for gathers over many blocks; the caller holds the leases of what it reads.

        Returns:
            Array uint8 [segment bytes], CPU, over the worker's pages; keeps the mapping, not the blocks.

        Raises:
            DescriptorError: the worker has no such segment, or not a sealed one.
            TransportError: the reader is closed, or the worker has gone.
        """
        with self._lock:
            mapping = self._mapping(segment_id)
        return _Pages(mapping.address, mapping.nbytes, mapping).array()

    def close(self) -> None:
        """Take no more leases. Arrays stay readable; the worker's memory is free again when the last is gone."""
        with self._lock:
            self._closed = True
            self._mappings.clear()
        self._link.close()

    def _mapping(self, segment_id: int) -> _Mapping:
        if self._closed:
            raise TransportError("this reader is closed: it takes no more leases.")
        self._link.flush()
        self._take_notices()
        mapping = self._mappings.get(segment_id)
        if mapping is None:
            mapping = self._mappings[segment_id] = self._map(segment_id)
        return mapping

    def _map(self, segment_id: int) -> _Mapping:
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
                        f"{len(fds)} file descriptors: it has no such segment, or it does not share it.",
                        segment_id=segment_id,
                    )
                return _Mapping(fds[0], segment_id, reply.nbytes)
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


class InlineReader:
    """Reads blocks through a function that brings their bytes, for clients that cannot map the worker's memory.

    Args:
        fetch: returns the bytes of a block, given its number.
        release: frees blocks in the worker, given their numbers; called as soon as their bytes are here.
    """

    def __init__(
        self, fetch: Callable[[int], bytes | bytearray | memoryview], release: Callable[[list[int]], None]
    ) -> None:
        self._fetch = fetch
        self._release = release
        self._leased: weakref.WeakValueDictionary[int, _Pages] = weakref.WeakValueDictionary()

    def lease(self, block: Block) -> Lease:
        """Return the bytes of a block; they are this process's own, so the worker frees the block at once.

        Returns:
            Lease whose array is uint8 [nbytes], CPU, over the bytes that were fetched. Treat it as read-only.

        Raises:
            DescriptorError: the block is malformed, or what was fetched has another length.

        Cost:
            One copy in the worker and whatever the channel takes; none here.
        """
        _check_block(block)
        pages = self._leased.get(block.block_id)
        if pages is not None:
            return Lease(block, _same_block(pages, block))
        data = np.frombuffer(self._fetch(block.block_id), np.uint8)
        if data.nbytes != block.nbytes:
            raise DescriptorError(f"{_name(block)} arrived with {data.nbytes} bytes", block_id=block.block_id)
        self._release([block.block_id])
        pages = self._leased[block.block_id] = _Pages(data.ctypes.data, data.nbytes, data)
        return Lease(block, pages.array())

    def close(self) -> None:
        """Do nothing: arrays own their bytes. Here so that both readers can be used alike."""


def _check_block(block: Block) -> None:
    if any(type(number) is not int for number in block):
        raise DescriptorError(f"{_name(block)} holds something that is not an integer")
    if block.offset < 0 or block.nbytes < 1 or not 1 <= block.block_id < 1 << 63 or not 1 <= block.segment_id < 1 << 63:
        raise DescriptorError(f"{_name(block)} has a number out of range", block_id=block.block_id)


def _check_bounds(block: Block, segment_nbytes: int) -> None:
    if block.nbytes > segment_nbytes - block.offset:
        raise DescriptorError(
            f"{_name(block)} ends outside its segment of {segment_nbytes} bytes",
            block_id=block.block_id,
            segment_id=block.segment_id,
        )


def _same_block(pages: _Pages, block: Block) -> Bytes:
    array = pages.array()
    if array.nbytes != block.nbytes:
        raise DescriptorError(f"{_name(block)} is leased already with {array.nbytes} bytes", block_id=block.block_id)
    return array


def _check_segment(fd: int, segment_id: int, nbytes: int) -> None:
    """Refuse memory that the worker could shrink later: reading it would then be a SIGBUS."""
    try:
        seals = fcntl.fcntl(fd, fcntl.F_GET_SEALS)
    except OSError:
        seals = 0
    if seals & _NEEDED_SEALS != _NEEDED_SEALS:
        raise DescriptorError(
            f"segment {segment_id} has seals {seals:#x}, expected at least {_NEEDED_SEALS:#x}", segment_id=segment_id
        )
    actual = os.fstat(fd).st_size
    if actual != nbytes or not nbytes:
        raise DescriptorError(
            f"segment {segment_id} has {actual} bytes, and the worker said {nbytes}", segment_id=segment_id
        )


def _name(block: Block) -> str:
    return f"block {block.block_id} ({block.nbytes} bytes at {block.offset} of segment {block.segment_id})"

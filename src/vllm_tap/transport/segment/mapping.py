"""A worker's segment as the client maps it: shared as long as it is read, copied page by page where it is written.

Runs in the client process.
"""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
import stat
from typing import Final

import numpy as np
import numpy.typing as npt

from vllm_tap.errors import DescriptorError
from vllm_tap.transport.segment.memory import (
    MADV_DONTNEED,
    MADV_POPULATE_READ,
    MAP_NORESERVE,
    PAGE_BYTES,
    SEAL_GROW,
    SEAL_SHRINK,
    address_of,
    advise,
    populate,
    round_up,
)

Bytes = npt.NDArray[np.uint8]

NEEDED_SEALS: Final = SEAL_SHRINK | SEAL_GROW

PAGEMAP: Final = "/proc/self/pagemap"
"""Word of the kernel on each page of this process, in 64 bits: see admin-guide/mm/pagemap.rst."""

_PRESENT, _SWAPPED, _OF_FILE = (np.uint64(1 << bit) for bit in (63, 62, 61))


class Mapping:
    """A worker's segment in this process. Unmapped when nothing refers to it any more, never by a call.

    It is private: a write goes into a copy of the page that nobody else sees. `forget_writes` lets go of such copies;
    a mapping that could not is spoilt: bytes that the worker writes there later would not show.

    A segment may be a file, of rows that were spilled. Its pages are read from the disk when they are first touched.
    """

    def __init__(self, fd: int, segment_id: int, nbytes: int, *, is_file: bool = False) -> None:
        """Map a segment.

        Raises:
            DescriptorError: the memory is not what the worker said, or could shrink.
        """
        (_check_file if is_file else _check_segment)(fd, segment_id, nbytes)
        # Without a reserve: a system that counts what it promises would count every page as if it were to be copied.
        self._mmap = mmap.mmap(
            fd, nbytes, flags=mmap.MAP_PRIVATE | MAP_NORESERVE, prot=mmap.PROT_READ | mmap.PROT_WRITE
        )
        self.nbytes = nbytes
        self.address = address_of(self._mmap)
        self.is_spoilt = False
        if is_file:
            return
        with contextlib.suppress(OSError):  # a kernel before 5.14 maps the pages at the first reading
            populate(self.address, nbytes, MADV_POPULATE_READ)

    def forget_writes(self, offset: int, nbytes: int) -> None:
        """Let go of this process's copies of the pages of a block; the worker's show again, and stay mapped.

        For finalizers: takes no lock.

        Cost:
            Some microseconds, and about 12 ms a GiB to look for copies.
        """
        start = self.address + offset // PAGE_BYTES * PAGE_BYTES
        end = self.address + round_up(offset + nbytes, PAGE_BYTES)
        try:
            for first, last in _copied(start, end):
                advise(first, last - first, MADV_DONTNEED)
        except OSError:  # pages that are locked in memory
            self.is_spoilt = True


def _copied(start: int, end: int) -> list[tuple[int, int]]:
    """Return the runs of pages in a private mapping of a file that were copied; all of them where nothing says which.

    A page of the file is present and marked so, or absent; a copy is present without the mark, or swapped out.
    """
    try:
        entries = np.frombuffer(_page_entries(start // PAGE_BYTES, (end - start) // PAGE_BYTES), np.uint64)
    except OSError:
        return [(start, end)]
    if len(entries) != (end - start) // PAGE_BYTES:
        return [(start, end)]
    copied = (entries & (_PRESENT | _OF_FILE) == _PRESENT) | (entries & _SWAPPED != 0)
    edges = np.flatnonzero(np.diff(copied, prepend=False, append=False)).reshape(-1, 2)
    return [(start + int(first) * PAGE_BYTES, start + int(last) * PAGE_BYTES) for first, last in edges]


def _page_entries(first: int, num_pages: int) -> bytes:
    fd = os.open(PAGEMAP, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return os.pread(fd, 8 * num_pages, 8 * first)
    finally:
        os.close(fd)


class Pages:
    """Bytes at an address; arrays made from it keep it alive, and with it what the bytes lie in."""

    __slots__ = ("__array_interface__", "__weakref__", "_keep")

    def __init__(self, address: int, nbytes: int, keep: object) -> None:
        self.__array_interface__ = {"version": 3, "data": (address, False), "shape": (nbytes,), "typestr": "|u1"}
        self._keep = keep

    def array(self) -> Bytes:
        """Return the bytes as an array that keeps this object."""
        return np.asarray(self)


def _check_segment(fd: int, segment_id: int, nbytes: int) -> None:
    """Refuse memory that the worker could shrink later: reading it would then be a SIGBUS."""
    try:
        seals = fcntl.fcntl(fd, fcntl.F_GET_SEALS)
    except OSError:
        seals = 0
    if seals & NEEDED_SEALS != NEEDED_SEALS:
        raise DescriptorError(
            f"segment {segment_id} has seals {seals:#x}, expected at least {NEEDED_SEALS:#x}", segment_id=segment_id
        )
    _check_size(os.fstat(fd).st_size, segment_id, nbytes)


def _check_file(fd: int, segment_id: int, nbytes: int) -> None:
    """Refuse a file that another process could open by a name, and shrink."""
    found = os.fstat(fd)
    if not stat.S_ISREG(found.st_mode) or found.st_nlink:
        raise DescriptorError(
            f"segment {segment_id} was said to be a file of spilled rows, which has no name; this one has mode "
            f"{found.st_mode:#o} and {found.st_nlink} names",
            segment_id=segment_id,
        )
    _check_size(found.st_size, segment_id, nbytes)


def _check_size(actual: int, segment_id: int, nbytes: int) -> None:
    if actual != nbytes or not nbytes:
        raise DescriptorError(
            f"segment {segment_id} has {actual} bytes, and the worker said {nbytes}", segment_id=segment_id
        )

"""One segment: a piece of memory that the worker writes and that a client may map.

Runs in the engine worker; the client borrows `populate` and the names of the seals.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from vllm_tap.errors import TransportError

PAGE_BYTES = mmap.PAGESIZE

# From linux/fcntl.h; the fcntl module has the last of them since Python 3.13 only.
SEAL_SEAL = 0x1
SEAL_SHRINK = 0x2
SEAL_GROW = 0x4
SEAL_FUTURE_WRITE = 0x10

# From linux/mman.h; Python's mmap has the first of them since 3.13 only. The populating kinds came with Linux 5.14.
MAP_NORESERVE = 0x4000
MADV_DONTNEED = 4
_MADV_HUGEPAGE = 14
MADV_POPULATE_READ = 22
MADV_POPULATE_WRITE = 23

_POPULATE_CHUNK_BYTES = 16 << 20
_MAX_POPULATE_THREADS = 4  # more of them wait for one another: a file's pages are listed under one lock

_libc = ctypes.CDLL(None, use_errno=True)
_libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


class Segment:
    """One piece of memory, written by the worker.

    A shared segment is a memfd without a name anywhere, sealed so that nobody can resize it and no client can write
    into it; the kernel frees its pages when the last process that holds it is gone, in any order of crashes. One
    that is not shared is private anonymous memory.

    Attributes:
        segment_id: number of the segment in its pool.
        nbytes: size, a multiple of the page size.
        fd: the memfd, or None if the segment is not shared.
        address: where the segment is mapped in this process.
        view: the same bytes, writable.
        is_file: whether they lie in a file; see `spill`.
    """

    is_file = False

    def __init__(self, segment_id: int, mapping: mmap.mmap, fd: int | None) -> None:
        self.segment_id = segment_id
        self.nbytes = len(mapping)
        self.fd = fd
        self.address = address_of(mapping)
        self.view = memoryview(mapping)
        self._mapping: mmap.mmap | None = mapping

    @classmethod
    def create(cls, segment_id: int, nbytes: int, *, shared: bool, num_threads: int = 0) -> Segment:
        """Allocate a segment whose pages are all present.

        Args:
            segment_id: number of the segment in its pool.
            nbytes: size; rounded up to whole pages.
            shared: whether a client may map it.
            num_threads: threads that populate pages; 0 chooses by the cores of this process.

        Raises:
            TransportError: the kernel refuses shared memory, or there is not enough of it.

        Cost:
            About 0.25 s a GiB with two threads. Nothing faults or fails later.
        """
        nbytes = round_up(nbytes, PAGE_BYTES)
        try:
            if not shared:
                mapping = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
                _populate_for_writing(mapping, None, num_threads)
                return cls(segment_id, mapping, None)
            fd = os.memfd_create("vllm-tap", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
            try:
                return cls(segment_id, _map_and_seal(fd, nbytes, num_threads), fd)
            except BaseException:
                os.close(fd)
                raise
        except (OSError, AttributeError) as error:  # AttributeError: a system without memfd_create
            raise TransportError(_refusal(nbytes, shared, error), needed_bytes=nbytes) from error

    def close(self) -> None:
        """Let go of the memory; views that others still hold keep it mapped until they die."""
        mapping, self._mapping = self._mapping, None
        if mapping is None:
            return
        if self.fd is not None:
            os.close(self.fd)
            self.fd = None
        try:
            self.view.release()
            mapping.close()
        except BufferError:
            pass  # somebody's array still points into it: the last of them unmaps it


def _map_and_seal(fd: int, nbytes: int, num_threads: int) -> mmap.mmap:
    os.ftruncate(fd, nbytes)
    mapping = mmap.mmap(fd, nbytes)
    _populate_for_writing(mapping, fd, num_threads)
    # FUTURE_WRITE spares mappings that exist and forbids later ones: it has to come after the worker's own.
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, SEAL_SHRINK | SEAL_GROW | SEAL_FUTURE_WRITE | SEAL_SEAL)
    return mapping


def _populate_for_writing(mapping: mmap.mmap, fd: int | None, num_threads: int) -> None:
    """Allocate and map every page now, so that a shortage is an error here and never a SIGBUS in a copy.

    Populating does what `posix_fallocate` would do, and can do it from several threads: `posix_fallocate` holds the
    file's lock and needs 0.3 s a GiB before the first page is mapped. It is used where populating is not known.
    """
    address, nbytes = address_of(mapping), len(mapping)
    _libc.madvise(address, nbytes, _MADV_HUGEPAGE)  # a wish: refused where the system gives no huge pages
    try:
        populate(address, nbytes, MADV_POPULATE_WRITE, num_threads)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        if fd is not None:
            os.posix_fallocate(fd, 0, nbytes)
        np.frombuffer(mapping, np.uint8)[::PAGE_BYTES] = 0


def populate(address: int, nbytes: int, advice: int, num_threads: int = 0) -> None:
    """Have the kernel map every page of a range now, several threads at once.

    Raises:
        OSError: EINVAL on a kernel before 5.14, ENOMEM or EFAULT where there is no memory left.
    """
    chunks = [
        (address + start, min(_POPULATE_CHUNK_BYTES, nbytes - start))
        for start in range(0, nbytes, _POPULATE_CHUNK_BYTES)
    ]
    if not num_threads:
        num_threads = min(len(os.sched_getaffinity(0)), _MAX_POPULATE_THREADS)
    if len(chunks) == 1:
        advise(*chunks[0], advice)
        return
    with ThreadPoolExecutor(min(num_threads, len(chunks)), "vllm-tap-populate") as threads:
        for done in [threads.submit(advise, *chunk, advice) for chunk in chunks]:
            done.result()


def advise(address: int, nbytes: int, advice: int) -> None:
    """Tell the kernel what to do with a range of pages; `populate` does the same for many.

    Raises:
        OSError: The kernel refuses.
    """
    while _libc.madvise(address, nbytes, advice):
        code = ctypes.get_errno()
        if code not in (errno.EINTR, errno.EAGAIN):
            raise OSError(code, os.strerror(code))


def address_of(mapping: mmap.mmap) -> int:
    """Return where a mapping starts in this process."""
    return int(np.frombuffer(mapping, np.uint8).ctypes.data)


def round_up(value: int, multiple: int) -> int:
    """Return the smallest multiple of `multiple` that is not below `value`."""
    return -(-value // multiple) * multiple


def _refusal(nbytes: int, shared: bool, error: Exception) -> str:
    what = f"{'shared' if shared else 'private'} memory of {nbytes / 2**20:.0f} MiB was refused in the worker ({error})"
    if not shared:
        return f"{what}: lower budget_bytes."
    code = error.errno if isinstance(error, OSError) else None
    if code in (errno.ENOMEM, errno.ENOSPC, errno.EFAULT):
        return f'{what}: not enough free memory; lower budget_bytes, or use transport="inline".'
    if code in (errno.EMFILE, errno.ENFILE):
        return f'{what}: no file descriptor is free; raise `ulimit -n`, or use transport="inline".'
    return f'{what}: memfd_create with seals is needed; use transport="inline", or lower budget_bytes.'

"""Files for rows beyond the memory of a capture: segments that blocks are moved to, and that clients map as others.

Runs in the engine worker. The files have no name: the kernel frees them with the last process that holds them.
"""

from __future__ import annotations

import functools
import mmap
import os
import tempfile
import time
from typing import BinaryIO, Final, cast

from vllm_tap.errors import BudgetError
from vllm_tap.transport.segment.memory import Segment
from vllm_tap.transport.segment.pool import Block, SegmentPool

FILE_BYTES: Final = 1 << 30
"""Size of large files; the first are smaller, see `SegmentPool`."""


class FileSegment(Segment):
    """A file without a name, written through a descriptor and read through a mapping, here and by the client.

    The client gets a descriptor that cannot write. The blocks of the file are allocated when it is made, so a full disk
    is an error then. A disk that fails to read them later is a SIGBUS, as for any mapped file.
    """

    is_file = True

    def __init__(self, segment_id: int, nbytes: int, file: BinaryIO) -> None:
        self._file = file
        fd = os.open(f"/proc/self/fd/{file.fileno()}", os.O_RDONLY | os.O_CLOEXEC)
        try:
            mapping = mmap.mmap(fd, nbytes, prot=mmap.PROT_READ)
        except BaseException:
            os.close(fd)
            raise
        super().__init__(segment_id, mapping, fd)

    @classmethod
    def create_in(cls, folder: str, segment_id: int, nbytes: int) -> FileSegment:
        """Allocate a file in a folder.

        Raises:
            BudgetError: The folder takes no file of that size.
        """
        file = None
        try:
            file = cast(BinaryIO, tempfile.TemporaryFile(dir=folder, prefix="vllm-tap-", buffering=0))  # noqa: SIM115
            os.posix_fallocate(file.fileno(), 0, nbytes)
            return cls(segment_id, nbytes, file)
        except OSError as error:
            if file is not None:
                file.close()
            raise BudgetError(
                f"rows beyond budget_bytes need a file of {nbytes / 2**20:.0f} MiB in {folder}, which was refused "
                f"({error}): make room there, choose another folder with on_full=vllm_tap.Spill(folder), raise "
                "budget_bytes, or capture fewer layers or positions.",
                path=folder,
                needed_bytes=nbytes,
            ) from error

    def write(self, offset: int, data: memoryview) -> None:
        """Write bytes.

        Raises:
            BudgetError: The disk refuses.
        """
        done = 0
        try:
            while done < len(data):
                done += os.pwrite(self._file.fileno(), data[done:], offset + done)
        except OSError as error:
            raise BudgetError(f"rows beyond budget_bytes could not be written to a file: {error}.") from error

    def close(self) -> None:
        """Let go of the file."""
        super().close()
        self._file.close()


class SpillArea:
    """Files of one capture.

    Args:
        pool: The pool whose blocks are moved.
        folder: The folder of the files.
        most_bytes: The most that they may take together.

    Attributes:
        seconds: Time that moving has taken.
    """

    def __init__(self, pool: SegmentPool, folder: str, most_bytes: int) -> None:
        self._pool, self._folder, self._most_bytes = pool, folder, most_bytes
        self._files = pool.open_area(most_bytes, functools.partial(FileSegment.create_in, folder), FILE_BYTES)
        self.seconds = 0.0

    def move(self, block: Block, period: int) -> Block:
        """Move the bytes of a block to a file, and free it.

        Returns:
            Block: where they lie now. Its offset differs by a multiple of `period`.

        Raises:
            BudgetError: The files are full, or the disk is.
        """
        begin = time.perf_counter()
        kept = self._reserve(block.nbytes + period - 1)
        start = kept.offset + (block.offset - kept.offset) % period
        try:
            cast(FileSegment, self._files.segment(kept.segment_id)).write(start, self._pool.view(block))
        except BaseException:
            self._pool.release(kept.block_id)
            raise
        self._pool.release(block.block_id)
        self.seconds += time.perf_counter() - begin
        return Block(kept.segment_id, start, block.nbytes, kept.block_id)

    def _reserve(self, nbytes: int) -> Block:
        try:
            return self._files.reserve(nbytes)
        except BudgetError as error:
            if "path" in error.identity:
                raise
            raise BudgetError(
                f"spilled rows fill {self._most_bytes} bytes of files in {self._folder}, the most that they may take: "
                "pass on_full=vllm_tap.Spill(folder, most_bytes=...) with more, raise budget_bytes, capture fewer "
                "layers or positions, or let go of the tensors of earlier captures.",
                **error.identity,
            ) from error

    def close(self) -> None:
        """Move no more blocks; those that were stay until they are released."""
        self._pool.close_area(self._files)

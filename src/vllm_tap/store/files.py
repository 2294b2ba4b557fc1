"""Files of a draft: written in one thread, summed in a second one, made to last in a third. Wherever one is written."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import suppress
from typing import Any, Final, Protocol

from vllm_tap.errors import DatasetError
from vllm_tap.store import shard
from vllm_tap.store.checksum import crc32
from vllm_tap.store.dtypes import Bytes
from vllm_tap.store.facts import StreamFacts
from vllm_tap.store.manifest import FileFacts
from vllm_tap.store.place import Sink

CHUNK_BYTES: Final = 8 << 20
"""Rows are written in pieces of this size; those that lie in several blocks are gathered piece by piece."""

MAX_OPEN: Final = 32
"""Files that wait for the disk at the same time."""

HELD_CHUNKS: Final = 2
"""Chunks that are held at most, the one that is written included: a source may use the memory of older ones again."""


class StoppedError(Exception):
    """The writer was told to stop."""


class Thread(Protocol):
    """A thread that does one thing behind the other."""

    def submit(self, function: Callable[..., Any], /, *args: Any) -> Future[Any]:
        """Have it do something."""
        ...


class Folder(Protocol):
    """Folder that takes new files."""

    def create(self, name: str, nbytes: int) -> Sink:
        """Begin a file of so many bytes."""
        ...


class Files:
    """New files of a folder: written here, summed by one thread, made to last by another while the next is written."""

    def __init__(self, folder: Folder, adder: Thread, closer: Thread, is_stopped: Callable[[], bool]) -> None:
        self._folder, self._adder, self._closer, self._is_stopped = folder, adder, closer, is_stopped
        self._closing: list[tuple[str, int, Future[int]]] = []

    def write_shard(self, stream: StreamFacts, layer: int, num_rows: int, rows: Callable[[int, int], Bytes]) -> None:
        """Write the rows of a layer.

        Args:
            stream: What the header says of it.
            layer: The layer.
            num_rows: Rows in all.
            rows: Returns the bytes of rows `start` to `stop`, in memory that stays as it is for `HELD_CHUNKS` calls.

        Raises:
            DatasetError: The file cannot be written.
            StoppedError: The writer was told to stop.
        """
        head = shard.shard_header(stream, layer, num_rows)
        step = max(CHUNK_BYTES // stream.row_bytes, 1)
        pieces = ((start, min(start + step, num_rows)) for start in range(0, num_rows, step))
        chunks = (_checked(rows(*piece), stream, layer, *piece) for piece in pieces)
        self.write(shard.shard_name(stream.name, layer), head, chunks, num_rows * stream.row_bytes)

    def write(self, name: str, head: bytes, chunks: Iterator[Bytes], nbytes: int) -> None:
        """Write a file: a header, and chunks of so many bytes in all.

        Raises:
            DatasetError: It cannot be written.
            StoppedError: The writer was told to stop.
        """
        sink = self._folder.create(name, len(head) + nbytes)
        try:
            checksum = self._adder.submit(crc32, head)
            sink.write(head)
            for chunk in chunks:
                if self._is_stopped():
                    raise StoppedError
                before, checksum = checksum, self._adder.submit(_continued, chunk, checksum)
                sink.write(chunk.data)
                before.result()  # so that two chunks are held at most
        except BaseException:
            with suppress(DatasetError):
                sink.close()
            raise
        self._closing.append((name, len(head) + nbytes, self._closer.submit(_closed, sink, checksum)))
        if len(self._closing) > MAX_OPEN:
            self._closing[-MAX_OPEN][2].result()

    def done(self) -> list[FileFacts]:
        """Wait until the disk has all files; return what the manifest says of them."""
        return [FileFacts(name=name, nbytes=nbytes, crc32=closed.result()) for name, nbytes, closed in self._closing]


def _checked(data: Bytes, stream: StreamFacts, layer: int, start: int, stop: int) -> Bytes:
    if len(data) != (stop - start) * stream.row_bytes:
        raise DatasetError(
            f"{stream.name} of layer {layer}: {len(data)} bytes for {stop - start} rows of {stream.row_bytes}"
        )
    return data


def _continued(chunk: Bytes, before: Future[int]) -> int:
    # What comes before has been summed: the thread takes things in order.
    return crc32(chunk.data, before.result())


def _closed(sink: Sink, checksum: Future[int]) -> int:
    sink.close()
    return checksum.result()

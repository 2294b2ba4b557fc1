"""Writes one part: shards, labels, index, facts, and the manifest that makes it visible. In the process that writes.

The seam for writers that never see rows (workers that write from their own memory): whoever makes a file returns its
`FileFacts`, and a manifest is made of these alone.
"""

from __future__ import annotations

import datetime
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from typing import Any, Final

from vllm_tap.errors import DatasetError
from vllm_tap.store import facts as facts_file
from vllm_tap.store import index, manifest, shard
from vllm_tap.store.checksum import crc32
from vllm_tap.store.dtypes import Bytes, bytes_of
from vllm_tap.store.facts import Facts
from vllm_tap.store.manifest import FileFacts, Manifest
from vllm_tap.store.place import Draft, Place, Sink, part_name
from vllm_tap.store.source import RowSource, labels_of, texts_of

CHUNK_BYTES: Final = 8 << 20
"""Rows are written in pieces of this size; those that lie in several blocks are gathered piece by piece."""


MAX_OPEN: Final = 32
"""Files that wait for the disk at the same time."""


class StoppedError(Exception):
    """The writer was told to stop; its draft is removed."""


def write_part(
    place: Place,
    source: RowSource,
    facts: Facts,
    *,
    first_sample: int = 0,
    metadata: Sequence[Mapping[str, Any] | None] | None = None,
    prompts: str = "",
    is_stopped: Callable[[], bool] = lambda: False,
) -> Manifest:
    """Write all rows of a source as one part; it is there whole, or not at all.

    Args:
        place: Folder of the dataset.
        source: The rows.
        facts: Facts that the part states.
        first_sample: Number of the source's sample 0 in the dataset.
        metadata: The user's, one for each sample.
        prompts: Digest of the prompts.
        is_stopped: Asked between pieces; if it says so, `StoppedError` is raised.

    Raises:
        DatasetError: The part could not be written, or is there already.

    Cost:
        One pass over the rows for the file and one, in a second thread, for its checksum. Ends when the disk has them.
    """
    if not facts.streams:
        raise DatasetError("there is nothing to write: this capture has no stream, as of a model without experts.")
    labels = labels_of(source, first_sample)
    num_rows = len(labels.positions)
    encoded = index.encode(labels, texts_of(source, metadata))
    draft = place.draft(part_name(first_sample))
    try:
        with ThreadPoolExecutor(1) as adder, ThreadPoolExecutor(1) as closer:
            files = _Files(draft, adder, closer, is_stopped)
            for stream in facts.streams:
                for layer in stream.layers:
                    head = shard.shard_header(stream, layer, num_rows)
                    chunks = _chunks(source, stream.name, layer, num_rows, stream.row_bytes)
                    files.write(shard.shard_name(stream.name, layer), head, chunks, num_rows * stream.row_bytes)
            head = shard.label_header(len(labels.samples), num_rows)
            flat = [bytes_of(array) for array in labels]
            files.write(manifest.LABELS_NAME, head, iter(flat), sum(map(len, flat)))
            files.write(manifest.INDEX_NAME, b"", iter([encoded]), len(encoded))
            stated = facts_file.encode(facts)
            files.write(manifest.FACTS_NAME, stated, iter(()), 0)
            sealed = Manifest(
                format=facts_file.FORMAT,
                facts=facts_file.digest(stated),
                first_sample=first_sample,
                num_samples=len(source.outputs),
                num_sequences=len(labels.samples),
                num_rows=num_rows,
                prompts=prompts,
                created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
                files=tuple(sorted(files.done())),
            )
        draft.seal(manifest.encode(sealed))
    except BaseException:
        draft.discard()
        raise
    return sealed


def _chunks(source: RowSource, stream: str, layer: int, num_rows: int, row_bytes: int) -> Iterator[Bytes]:
    step = max(CHUNK_BYTES // row_bytes, 1)
    for start in range(0, num_rows, step):
        stop = min(start + step, num_rows)
        data = bytes_of(source.rows(stream, layer, start, stop))
        if len(data) != (stop - start) * row_bytes:
            raise DatasetError(f"{stream} of layer {layer}: {len(data)} bytes for {stop - start} rows of {row_bytes}")
        yield data


class _Files:
    """Files of a draft: written here, summed in a second thread, made to last in a third while the next is written."""

    def __init__(
        self, draft: Draft, adder: ThreadPoolExecutor, closer: ThreadPoolExecutor, is_stopped: Callable[[], bool]
    ) -> None:
        self._draft, self._adder, self._closer, self._is_stopped = draft, adder, closer, is_stopped
        self._closing: list[tuple[str, int, Future[int]]] = []

    def write(self, name: str, head: bytes, chunks: Iterator[Bytes], nbytes: int) -> None:
        """Write a file: a header, and chunks of so many bytes in all."""
        sink = self._draft.create(name, len(head) + nbytes)
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


def _continued(chunk: Bytes, before: Future[int]) -> int:
    # What comes before has been summed: the pool has one thread, and takes things in order.
    return crc32(chunk.data, before.result())


def _closed(sink: Sink, checksum: Future[int]) -> int:
    sink.close()
    return checksum.result()

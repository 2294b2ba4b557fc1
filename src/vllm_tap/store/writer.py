"""Writes one part: shards, labels, index, facts, and the manifest that makes it visible. In the process that writes.

Or without shards: whoever holds the rows may write these, as workers do from their own memory. Whoever makes a file
returns its `FileFacts`, and a manifest is made of these alone.
"""

from __future__ import annotations

import datetime
import functools
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from vllm_tap.errors import DatasetError
from vllm_tap.store import facts as facts_file
from vllm_tap.store import index, manifest, shard
from vllm_tap.store.dtypes import Bytes, bytes_of
from vllm_tap.store.facts import Facts, StreamFacts
from vllm_tap.store.files import Files
from vllm_tap.store.manifest import FileFacts, Manifest
from vllm_tap.store.place import Draft, Place, part_name
from vllm_tap.store.source import RowSource, labels_of, texts_of


def write_part(
    place: Place,
    source: RowSource,
    facts: Facts,
    *,
    first_sample: int = 0,
    metadata: Sequence[Mapping[str, Any] | None] | None = None,
    prompts: str = "",
    is_stopped: Callable[[], bool] = lambda: False,
    on_sealed: Callable[[], None] = lambda: None,
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
        on_sealed: Called when the part is there; what fails behind that does not undo it.

    Raises:
        DatasetError: The part could not be written, or is there already.
        StoppedError: The writer was told to stop; the draft is removed.

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
            files = Files(draft, adder, closer, is_stopped)
            head = shard.label_header(len(labels.samples), num_rows)
            flat = [bytes_of(array) for array in labels]
            files.write(manifest.LABELS_NAME, head, iter(flat), sum(map(len, flat)))
            files.write(manifest.INDEX_NAME, b"", iter([encoded]), len(encoded))
            stated = facts_file.encode(facts)
            files.write(manifest.FACTS_NAME, stated, iter(()), 0)
            others = _write_shards(files, draft, source, facts, num_rows, is_stopped)
            sealed = Manifest(
                format=facts_file.FORMAT,
                facts=facts_file.digest(stated),
                first_sample=first_sample,
                num_samples=len(source.outputs),
                num_sequences=len(labels.samples),
                num_rows=num_rows,
                prompts=prompts,
                created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
                files=tuple(sorted([*files.done(), *others])),
            )
        draft.seal(manifest.encode(sealed), on_sealed)
    except BaseException:
        draft.discard()
        raise
    return sealed


def _write_shards(
    files: Files, draft: Draft, source: RowSource, facts: Facts, num_rows: int, is_stopped: Callable[[], bool]
) -> list[FileFacts]:
    """Write the shards of a source, or have them written; return what is known of files that others wrote."""
    if source.shard_writer is not None:
        if draft.folder is None:
            raise DatasetError("workers write into folders alone, and this dataset is in none.")
        return source.shard_writer.write(draft.folder, facts.streams, num_rows, is_stopped)
    for stream in facts.streams:
        for layer in stream.layers:
            files.write_shard(stream, layer, num_rows, functools.partial(_rows, source, stream, layer))
    return []


def _rows(source: RowSource, stream: StreamFacts, layer: int, start: int, stop: int) -> Bytes:
    return bytes_of(source.rows(stream.name, layer, start, stop))

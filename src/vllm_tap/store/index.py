"""The Parquet index of a part: a row for each sequence. Where datasets are written, or asked for texts."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec

from vllm_tap.errors import DatasetDamagedError, DatasetError
from vllm_tap.store.checksum import crc32
from vllm_tap.store.dtypes import Bytes
from vllm_tap.store.manifest import FileFacts
from vllm_tap.store.source import Labels, Texts

if TYPE_CHECKING:
    import pyarrow as pa


def require_pyarrow() -> None:
    """Refuse to go on without the package that reads and writes Parquet.

    Raises:
        DatasetError: It is not installed.
    """
    try:
        import pyarrow.parquet  # noqa: F401
    except ImportError as error:
        raise DatasetError("the index of a dataset needs pyarrow: pip install 'vllm-tap[store]'.") from error


@functools.cache
def schema() -> pa.Schema:
    """Return the columns of an index."""
    import pyarrow as pa

    ids = pa.list_(pa.int32())
    return pa.schema(
        [
            pa.field("sample", pa.int64(), nullable=False),
            pa.field("completion", pa.int32(), nullable=False),
            pa.field("request_id", pa.string(), nullable=False),
            pa.field("row_start", pa.int64(), nullable=False),
            pa.field("row_stop", pa.int64(), nullable=False),
            pa.field("prompt", pa.string()),
            pa.field("text", pa.string()),
            pa.field("finish_reason", pa.string()),
            pa.field("metadata", pa.string()),
            pa.field("weight_versions", pa.string()),
            pa.field("positions", ids, nullable=False),
            pa.field("token_ids", ids, nullable=False),
            pa.field("prompt_token_ids", ids, nullable=False),
            pa.field("generated_token_ids", ids, nullable=False),
        ]
    )


class IndexRow(NamedTuple):
    """Entry of an index for a sequence; see docs/format.md. `metadata` is empty without any."""

    sample: int
    completion: int
    request_id: str
    row_start: int
    row_stop: int
    prompt: str | None
    text: str | None
    finish_reason: str | None
    metadata: dict[str, Any]
    weight_versions: list[tuple[str, int, int]] | None
    positions: list[int]
    token_ids: list[int]
    prompt_token_ids: list[int]
    generated_token_ids: list[int]


def rows_of(table: pa.Table) -> list[IndexRow]:
    """Return the rows of an index.

    Raises:
        DatasetDamagedError: A text is not UTF-8, or what is to be JSON is not.
    """
    import pyarrow as pa

    try:
        return [_row(row) for row in table.to_pylist()]
    except (pa.ArrowException, ValueError, RecursionError) as error:
        raise DatasetDamagedError(f"a row of an index cannot be read: {error}") from error


def _row(row: dict[str, Any]) -> IndexRow:
    read = {"metadata": _metadata(row["metadata"]), "weight_versions": _weight_versions(row["weight_versions"])}
    return IndexRow(**{**row, **read})


def _weight_versions(text: str | None) -> list[tuple[str, int, int]] | None:
    if text is None:
        return None
    return msgspec.json.decode(text, type=list[tuple[str, int, int]])


def _metadata(text: str | None) -> dict[str, Any]:
    found = json.loads(text) if text else {}
    if not isinstance(found, dict):
        raise ValueError(f"metadata are {text:.80}")
    return found


def encode(labels: Labels, texts: Sequence[Texts]) -> Bytes:
    """Return the file.

    Raises:
        DatasetError: Metadata that JSON cannot hold.
    """
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq

    def lists(flat: Any) -> pa.Array:
        return pa.ListArray.from_arrays(pa.array(labels.starts.astype(np.int32)), pa.array(flat, pa.int32()))

    columns: dict[str, Any] = {
        "sample": labels.samples,
        "completion": labels.completions,
        "row_start": labels.starts[:-1],
        "row_stop": labels.starts[1:],
        "positions": lists(labels.positions),
        "token_ids": lists(labels.token_ids),
        "metadata": [metadata_text(one.metadata) for one in texts],
        "weight_versions": [None if one.weight_versions is None else json.dumps(one.weight_versions) for one in texts],
    }
    for name in Texts._fields:
        columns.setdefault(name, [getattr(one, name) for one in texts])
    wanted = schema()
    table = pa.table({name: pa.array(columns[name], wanted.field(name).type) for name in wanted.names}, schema=wanted)
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd")
    return np.frombuffer(sink.getvalue(), np.uint8)


def metadata_text(metadata: Mapping[str, Any] | None) -> str | None:
    """Return metadata as an index has them.

    Raises:
        DatasetError: JSON does not hold them.
    """
    if metadata is None:
        return None
    try:
        text = json.dumps(dict(metadata), ensure_ascii=False, allow_nan=False)
        text.encode()
        return text
    except (TypeError, ValueError, RecursionError) as error:
        raise DatasetError(f"metadata {metadata!r:.200} cannot be kept as JSON: {error}") from error


def decode(data: Bytes, file: FileFacts, num_sequences: int, path: str) -> pa.Table:
    """Read an index, after its length and checksum have been found right.

    Raises:
        DatasetDamagedError: They are not, or the table is not one of an index.
    """
    require_pyarrow()
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq

    if crc32(data.data) != file.crc32:
        raise DatasetDamagedError(f"{path} has another checksum than its manifest states", path=path)
    try:
        # Memory of Arrow's own: its threads let go of it last, which for Python's they cannot as the interpreter ends.
        copied = pa.allocate_buffer(len(data))
        np.frombuffer(copied, np.uint8)[:] = data
        parquet = pq.ParquetFile(pa.BufferReader(copied))
        found = parquet.schema_arrow
        if found.names != schema().names or found.types != schema().types:
            raise DatasetDamagedError(f"{path} has other columns than an index", path=path)
        if parquet.metadata.num_rows != num_sequences:
            raise DatasetDamagedError(f"{path} has {parquet.metadata.num_rows} of {num_sequences} sequences", path=path)
        return parquet.read()
    except (pa.ArrowException, OSError, UnicodeError, MemoryError) as error:
        raise DatasetDamagedError(f"{path} cannot be read: {error}", path=path) from error

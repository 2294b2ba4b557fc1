"""Folders that `datasets.load_from_disk` reads, written with pyarrow alone. In any process.

Such a folder has an Arrow stream, `dataset_info.json` with the features, and `state.json` with the files' names.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt

from vllm_tap.store.index import require_pyarrow

if TYPE_CHECKING:
    import pyarrow as pa

DATA_NAME: Final = "data-00000-of-00001.arrow"
FLOATS: Final = ("float32", "float16")
"""Floating-point types of both numpy and Arrow that rows may be written in."""


class Feature(NamedTuple):
    """A column: what `datasets` calls its type, and Arrow's type and metadata of it."""

    description: dict[str, Any]
    arrow: pa.DataType
    metadata: dict[str, str] | None = None


def value(dtype: str) -> Feature:
    """Return a column of numbers or texts."""
    import pyarrow as pa

    return Feature({"dtype": dtype, "_type": "Value"}, getattr(pa, dtype)())


def numbers(dtype: str, length: int = -1) -> Feature:
    """Return a column of lists of numbers, all of one length unless that is -1."""
    import pyarrow as pa

    description = {"feature": {"dtype": dtype, "_type": "Value"}, "length": length, "_type": "Sequence"}
    return Feature(description, pa.list_(getattr(pa, dtype)(), length))


def matrix(dtype: str, num_rows: int | None, width: int) -> Feature:
    """Return a column of arrays [num_rows, width]; None for any number of rows."""
    import pyarrow as pa

    described = {"shape": [num_rows, width], "dtype": dtype, "_type": "Array2D"}
    named = {
        "ARROW:extension:name": "datasets.features.features.Array2DExtensionType",
        "ARROW:extension:metadata": json.dumps([[num_rows, width], dtype]),
    }
    return Feature(described, pa.list_(pa.list_(_element(dtype))), named)


def _element(dtype: str) -> pa.DataType:
    import pyarrow as pa

    return pa.from_numpy_dtype(np.dtype(dtype))


class ArrowFolder:
    """Writer of such a folder: batches of rows, then `close`.

    Args:
        folder: An empty folder, or none yet.
        features: {column: feature}, in order.
        as_torch: Whether a reader gets tensors without asking for them.
    """

    def __init__(self, folder: Path, features: Mapping[str, Feature], *, as_torch: bool = False) -> None:
        require_pyarrow()
        import pyarrow as pa

        folder.mkdir(exist_ok=True)
        described = {name: feature.description for name, feature in features.items()}
        info = {"citation": "", "description": "", "features": described, "homepage": "", "license": ""}
        state: dict[str, Any] = {
            "_data_files": [{"filename": DATA_NAME}],
            "_fingerprint": secrets.token_hex(8),
            "_format_columns": None,
            "_format_kwargs": {},
            "_format_type": "torch" if as_torch else None,
            "_output_all_columns": False,
            "_split": None,
        }
        (folder / "dataset_info.json").write_text(json.dumps(info, indent=2))
        (folder / "state.json").write_text(json.dumps(state, indent=2))
        fields = [pa.field(name, feature.arrow, metadata=feature.metadata) for name, feature in features.items()]
        self._schema = pa.schema(fields, {"huggingface": json.dumps({"info": {"features": described}})})
        self._file = pa.OSFile(str(folder / DATA_NAME), "wb")
        self._writer = pa.ipc.new_stream(self._file, self._schema)

    def write(self, columns: Mapping[str, Any]) -> None:
        """Append a batch: arrays of Arrow, or lists, by column."""
        import pyarrow as pa

        arrays = [_array(columns[field.name], field.type) for field in self._schema]
        self._writer.write_batch(pa.RecordBatch.from_arrays(arrays, schema=self._schema))

    def close(self) -> None:
        """End the stream."""
        self._writer.close()
        self._file.close()

    def __enter__(self) -> ArrowFolder:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _array(given: Any, kind: pa.DataType) -> pa.Array:
    import pyarrow as pa

    return given if isinstance(given, pa.Array) else pa.array(given, kind)


def matrices(rows: npt.NDArray[Any], lengths: Sequence[int]) -> pa.Array:
    """Return rows [N, D] as arrays of `lengths` rows each, one after the other."""
    import pyarrow as pa

    num_rows, width = rows.shape
    flat = pa.array(np.ascontiguousarray(rows).reshape(-1), _element(str(rows.dtype)))
    inner = pa.ListArray.from_arrays(pa.array(np.arange(num_rows + 1) * width, pa.int32()), flat)
    return pa.ListArray.from_arrays(pa.array(np.cumsum([0, *lengths]), pa.int32()), inner)

"""Rows as arrays of numpy and frames of pandas. In any process."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from vllm_tap.errors import SpecError
from vllm_tap.interchange import source as rows_of

LABELS = ("samples", "completions", "positions", "token_ids")


def array(source: Any, stream: str, layer: int) -> npt.NDArray[Any]:
    """Return the rows of a layer over all sequences, [N, D]; bfloat16 comes as float32, without loss.

    Args:
        source: A `Capture` or a `Dataset`.
        stream: Which stream.
        layer: Which layer.

    Raises:
        LayerError: The layer is not there.
        SpecError: The stream is not there.

    Cost:
        No copy of a capture's rows that lie in one block, or of a dataset's that lie in one part, but for bfloat16.
    """
    return rows_of.numpy_rows(source, stream, layer, 0, source.num_rows)


def labels(source: Any) -> dict[str, npt.NDArray[Any]]:
    """Return what each row of `array` is: arrays [N] by `samples`, `completions`, `positions` and `token_ids`."""
    return {name: rows_of.label(source, name) for name in LABELS}


def frame(source: Any, stream: str, layer: int) -> Any:
    """Return the rows of a layer as a `pandas.DataFrame`, a column for each element.

    The index has the levels sample, completion, position and token_id; samples with metadata of a dataset are read by
    `dataset.table()`.

    Raises:
        SpecError: pandas is not installed, or the stream is not there.
        LayerError: The layer is not there.
    """
    try:
        import pandas
    except ImportError as error:
        raise SpecError("a frame needs pandas: pip install pandas.") from error
    levels = [np.asarray(one) for one in labels(source).values()]
    index = pandas.MultiIndex.from_arrays(levels, names=["sample", "completion", "position", "token_id"])
    return pandas.DataFrame(array(source, stream, layer), index=index)

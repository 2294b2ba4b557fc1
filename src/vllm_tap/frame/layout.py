"""Layout of the arrays of a block. A pure function of the row count and the streams, used by worker and client alike.

A block holds the rows of one step: the label arrays, then for every stream one plane [num_rows, width] per layer. All
planes of a stream are adjacent. The start of a stream is a multiple of its row size, counted from the start of the
segment: a segment is then an array of rows, and rows of many blocks are one gather.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final, Generic, NamedTuple, TypeVar

import msgspec
import numpy as np
import numpy.typing as npt

from vllm_tap.errors import DescriptorError
from vllm_tap.labels import NUM_LABELS

ITEMSIZE: Final = {
    "bfloat16": 2,
    "float16": 2,
    "float32": 4,
    "float64": 8,
    "uint8": 1,
    "int16": 2,
    "int32": 4,
    "int64": 8,
}
"""The dtypes that may cross, and their sizes in bytes."""

CACHE_LINE: Final = 64

LABEL_BYTES: Final = 4
"""Of a label of a row: int32."""


class Stream(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """One stream as a rank ships it: `num_rows` rows of `width` elements for every layer."""

    name: str
    dtype: str
    width: int
    layers: tuple[int, ...]

    @property
    def row_bytes(self) -> int:
        """Bytes of one row of one layer."""
        if self.dtype not in ITEMSIZE:
            raise DescriptorError(f"stream {self.name!r}: dtype {self.dtype!r} is not one of {list(ITEMSIZE)}")
        if not 0 < self.width < 1 << 24:
            raise DescriptorError(f"stream {self.name!r}: width {self.width} is outside 1 to 2**24")
        return self.width * ITEMSIZE[self.dtype]

    @property
    def alignment(self) -> int:
        """The start of this stream in a segment is a multiple of this many bytes."""
        return math.lcm(self.row_bytes, CACHE_LINE)


IntArray = npt.NDArray[np.int64]
Offset = TypeVar("Offset", int, IntArray)


class Layout(NamedTuple, Generic[Offset]):
    """Byte offsets from the start of the segment; arrays when many blocks are placed at once."""

    labels: Offset
    streams: tuple[Offset, ...]
    end: Offset


def layout(offset: Offset, num_rows: Offset, streams: Sequence[Stream]) -> Layout[Offset]:
    """Place the arrays of a block that starts at `offset`, or of many blocks: then both arguments are arrays [B]."""
    end = offset + NUM_LABELS * LABEL_BYTES * num_rows
    starts = []
    for stream in streams:
        start = -(-end // stream.alignment) * stream.alignment
        starts.append(start)
        end = start + len(stream.layers) * num_rows * stream.row_bytes
    return Layout(offset, tuple(starts), end)


def block_bytes(num_rows: int, streams: Sequence[Stream]) -> int:
    """Return how many bytes to reserve for a block, wherever it starts."""
    return NUM_LABELS * LABEL_BYTES * num_rows + sum(
        stream.alignment + len(stream.layers) * num_rows * stream.row_bytes for stream in streams
    )

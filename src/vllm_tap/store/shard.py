"""Headers of shards: safetensors files whose header follows from what they hold. Where datasets are written or read.

A reader computes the header that must be there and compares it, byte for byte; it never parses one.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from typing import Final, NamedTuple

from vllm_tap.store.dtypes import dtype_of
from vllm_tap.store.facts import FORMAT, StreamFacts

ALIGNMENT: Final = 64
"""Data begins at a multiple of it, so that rows lie on their elements' alignment."""

ROWS: Final = "rows"
"""Name of the tensor of a shard."""


class Array(NamedTuple):
    """A tensor in a file: dtype and shape."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor."""
        return math.prod(self.shape) * dtype_of(self.dtype).itemsize


def shard_name(stream: str, layer: int) -> str:
    """Return the file of a stream's layer."""
    return f"{stream}.{layer:04d}.safetensors"


def header(arrays: Mapping[str, Array], metadata: Mapping[str, str]) -> bytes:
    """Return the first bytes of a safetensors file with these tensors, one behind the other.

    The length of the JSON as eight bytes, the JSON, and spaces up to a multiple of `ALIGNMENT`. Arrays whose sizes are
    multiples of their successors' element sizes stay aligned.
    """
    fields: dict[str, object] = {"__metadata__": dict(metadata)}
    start = 0
    for name, array in arrays.items():
        end = start + array.nbytes
        fields[name] = {"dtype": dtype_of(array.dtype).code, "shape": array.shape, "data_offsets": [start, end]}
        start = end
    text = json.dumps(fields, separators=(",", ":")).encode()
    padding = -(8 + len(text)) % ALIGNMENT
    return struct.pack("<Q", len(text) + padding) + text + b" " * padding


def shard_header(stream: StreamFacts, layer: int, num_rows: int) -> bytes:
    """Return the header of a shard: one tensor `rows` [num_rows, width]."""
    metadata = {"format": FORMAT, "stream": stream.name, "layer": str(layer)}
    return header({ROWS: Array(stream.dtype, (num_rows, stream.width))}, metadata)


def label_arrays(num_sequences: int, num_rows: int) -> dict[str, Array]:
    """Return the tensors of the file of labels: those of eight bytes first, so that all are aligned."""
    return {
        "starts": Array("int64", (num_sequences + 1,)),
        "samples": Array("int64", (num_sequences,)),
        "completions": Array("int32", (num_sequences,)),
        "prompt_lens": Array("int32", (num_sequences,)),
        "positions": Array("int32", (num_rows,)),
        "token_ids": Array("int32", (num_rows,)),
    }


def label_header(num_sequences: int, num_rows: int) -> bytes:
    """Return the header of the file of labels."""
    return header(label_arrays(num_sequences, num_rows), {"format": FORMAT})

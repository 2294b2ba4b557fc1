"""Rows that a worker has handed over, looked at where they lie: a few of them, to check what is said of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Final

import torch

from vllm_tap.frame import messages
from vllm_tap.frame.layout import layout

SOME_ROWS: Final = 64


def some_rows(
    descriptor: messages.Descriptor, memory_of: Callable[[int], memoryview], layer: int, names: Sequence[str]
) -> list[torch.Tensor]:
    """Return some rows of streams of a layer, the same ones of each, in the order of the names.

    Args:
        descriptor: Where the rows lie; they are held until its client has released them.
        memory_of: Returns the bytes of a segment.
        layer: A layer.
        names: Streams; those that were not captured are left out.

    Returns:
        Tensors [R, W] of the largest block, R at most 64: views of it.
    """
    table = descriptor.table()
    if not len(table):
        return []
    chunk, start, num_rows = table[table[:, 2].argmax()].tolist()
    memory = memory_of(descriptor.chunks[chunk].segment_id)
    found = {}
    for stream, begin in zip(descriptor.streams, layout(start, num_rows, descriptor.streams).streams, strict=True):
        if stream.name in names and layer in stream.layers:
            offset = begin + stream.layers.index(layer) * num_rows * stream.row_bytes
            shape = min(num_rows, SOME_ROWS), stream.width
            rows = torch.frombuffer(memory, dtype=getattr(torch, stream.dtype), count=math.prod(shape), offset=offset)
            found[stream.name] = rows.view(shape)
    return [found[name] for name in names if name in found]

"""Rows that a worker hands over, looked at where they lie: a few of them, or the labels of all. Worker process."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Final

import msgspec
import numpy as np
import torch

from vllm_tap.errors import CaptureError
from vllm_tap.frame import messages
from vllm_tap.frame.blocks import labels_of
from vllm_tap.frame.layout import LABEL_BYTES, layout
from vllm_tap.labels import NUM_LABELS
from vllm_tap.transport.segment.pool import SegmentPool

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


def with_labels(descriptor: messages.Descriptor, pool: SegmentPool) -> messages.Descriptor:
    """Return a descriptor that brings the labels of all rows, which stay where they are.

    Raises:
        CaptureError: One message does not hold so many.

    Cost:
        One copy of 12 bytes a row.
    """
    chunks, starts, counts = descriptor.table().T
    nbytes = NUM_LABELS * LABEL_BYTES * int(counts.sum())
    if nbytes > messages.MAX_MESSAGE_BYTES // 2:
        raise CaptureError(
            f"the labels of {counts.sum()} rows have {nbytes} bytes, more than a message takes: record fewer prompts "
            "at a time, by batch."
        )
    segments = np.array([chunk.segment_id for chunk in descriptor.chunks], np.int64)[chunks]
    labels = labels_of(segments, starts, counts, lambda number: np.frombuffer(pool.segment(number).view, np.uint8))
    return msgspec.structs.replace(descriptor, labels=labels.tobytes())

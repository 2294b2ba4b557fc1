"""Rows and labels of many blocks, found by their numbers. Pure numpy, used by worker and client alike."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from vllm_tap.frame.layout import LABEL_BYTES, IntArray
from vllm_tap.labels import NUM_LABELS

Bytes = npt.NDArray[np.uint8]


class Places(NamedTuple):
    """Places of rows: the block of each, and its number there."""

    blocks: IntArray
    rows: IntArray

    @classmethod
    def all(cls, counts: IntArray) -> Places:
        """Return the places of all rows of blocks that have so many each."""
        blocks = np.repeat(np.arange(len(counts)), counts)
        return cls(blocks, np.arange(len(blocks)) - np.repeat(np.cumsum(counts) - counts, counts))

    def at(self, index: IntArray | slice) -> Places:
        """Return some of the places."""
        return Places(self.blocks[index], self.rows[index])

    def numbers(self, starts: IntArray, counts: IntArray, plane: int, row_bytes: int) -> IntArray:
        """Return the numbers of the rows of a plane, counted from the start of the segment or region.

        Args:
            starts: Where a stream begins in each block, in bytes.
            counts: Rows of each block.
            plane: Place of the layer in the stream.
            row_bytes: Bytes of a row of the stream.
        """
        blocks, rows = self
        return starts[blocks] // row_bytes + plane * counts[blocks] + rows


def labels_of(
    regions: IntArray, starts: IntArray, counts: IntArray, memory_of: Callable[[int], Bytes]
) -> npt.NDArray[np.int32]:
    """Return the labels [3, R] of all blocks behind one another, copied.

    Args:
        regions: Region, or segment, of each block.
        starts: Where its labels begin there.
        counts: Its rows.
        memory_of: Returns the bytes of a region.

    Cost:
        Some numpy calls for each series of steps with as many rows, and one copy of 12 bytes a row.
    """
    series: list[_Series] = []
    for place in zip(regions.tolist(), starts.tolist(), counts.tolist(), strict=True):
        if not series or not series[-1].takes(*place):
            series.append(_Series(*place))
    memory = {number: memory_of(number) for number in {part.region for part in series}}
    out = np.empty((NUM_LABELS, int(counts.sum())), np.int32)
    end = 0
    for part in series:
        begin, end = end, end + part.num_blocks * part.num_rows
        shape = NUM_LABELS, part.num_blocks, part.num_rows
        strides = LABEL_BYTES * part.num_rows, part.distance, LABEL_BYTES
        labels = np.ndarray(shape, np.int32, memory[part.region], part.start, strides)
        out[:, begin:end].reshape(shape)[...] = labels
    return out


@dataclass(slots=True)
class _Series:
    """Blocks of a region that follow one another at the same distance, with as many rows: steps of a generation."""

    region: int
    start: int
    num_rows: int
    num_blocks: int = 1
    distance: int = 0

    def takes(self, region: int, start: int, num_rows: int) -> bool:
        """Take a block in if it is the next one; return whether it is."""
        distance = self.distance or start - self.start
        is_next = start == self.start + self.num_blocks * distance > self.start
        if (region, num_rows) != (self.region, self.num_rows) or not is_next:
            return False
        self.num_blocks, self.distance = self.num_blocks + 1, distance
        return True

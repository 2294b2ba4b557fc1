"""The bytes of one rank's blocks in this process: mapped from the worker, or fetched from it. Client process."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

from vllm_tap.errors import DescriptorError
from vllm_tap.frame.blocks import Bytes, labels_of
from vllm_tap.frame.layout import CACHE_LINE, IntArray, Layout, layout
from vllm_tap.frame.messages import Chunk, Descriptor
from vllm_tap.store.dtypes import new_tensor
from vllm_tap.transport.segment.pool import Block
from vllm_tap.transport.segment.reader import SegmentReader

FETCH_BYTES = 64 << 20
"""Most bytes of one inline call; the engine does nothing else while it copies them."""


class RankMemory(Protocol):
    """Source that `RankRows` reads from."""

    placed: Layout[IntArray]
    """Places of the arrays of each block, in bytes from the start of the region that holds the block."""

    def labels(self, num_rows: IntArray) -> npt.NDArray[np.int32]:
        """Return the labels [3, R] of all blocks behind one another, given the rows of each."""

    def view(self, block: int, offset: int, nbytes: int) -> torch.Tensor:
        """Return bytes of a block without a copy; the tensor keeps them."""

    def gather(
        self, blocks: IntArray, index: torch.Tensor, dtype: torch.dtype, width: int, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Return rows [R, width] by their numbers, counted in rows from the start of each block's region.

        They are copied into `out`, if it is given, which lies together.
        """


class _Regions:
    """Byte regions in which blocks lie, one number per block."""

    def __init__(self, placed: Layout[IntArray], region_of: IntArray) -> None:
        self.placed = placed
        self._region_of = region_of

    def _region(self, number: int) -> Bytes:
        raise NotImplementedError

    def labels(self, num_rows: IntArray) -> npt.NDArray[np.int32]:
        return labels_of(self._region_of, self.placed.labels, num_rows, self._region)

    def gather(
        self, blocks: IntArray, index: torch.Tensor, dtype: torch.dtype, width: int, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        regions = self._region_of[blocks]
        if out is None:
            out = new_tensor(str(dtype).removeprefix("torch."), len(index), width)
        for number in np.unique(regions):
            rows = self._rows(int(number), dtype, width)
            if (regions == number).all():
                return torch.index_select(rows, 0, index, out=out)
            at = torch.from_numpy(np.flatnonzero(regions == number))
            out[at] = rows[index[at]]
        return out

    def _rows(self, number: int, dtype: torch.dtype, width: int) -> torch.Tensor:
        region = self._region(number)
        row_bytes = width * dtype.itemsize
        num_rows = len(region) // row_bytes
        return torch.from_numpy(region[: num_rows * row_bytes]).view(dtype).view(num_rows, width)


class MappedMemory(_Regions):
    """Blocks in the worker's segments. A chunk is leased until the last tensor over it and this object are gone."""

    def __init__(self, descriptor: Descriptor, placed: Layout[IntArray], reader: SegmentReader) -> None:
        index, chunks = descriptor.table()[:, 0], descriptor.chunks
        super().__init__(placed, np.array([chunk.segment_id for chunk in chunks], np.int64)[index])
        self._held = reader.hold(
            [Block(chunk.segment_id, chunk.offset, chunk.nbytes, chunk.block_id) for chunk in chunks]
        )
        self._chunk_of = index
        self._segments = {number: reader.segment_array(number) for number in {chunk.segment_id for chunk in chunks}}

    def _region(self, number: int) -> Bytes:
        return self._segments[number]

    def view(self, block: int, offset: int, nbytes: int) -> torch.Tensor:
        lease = self._held.lease(int(self._chunk_of[block]))
        start = offset - lease.block.offset
        return torch.from_numpy(lease.array[start : start + nbytes])


FetchPart = Callable[[int, int, int], bytes]
"""(segment, offset, nbytes) to the bytes there."""

Fetch = Callable[[list[tuple[Chunk, Bytes]]], None]
"""Fills arrays with the first bytes of chunks."""


def by_calls(fetch: FetchPart) -> Fetch:
    """Return what fills arrays by calls that return bytes.

    Raises, when it is called:
        DescriptorError: A call returned fewer or more than it was asked for.
    """

    def fill(wanted: list[tuple[Chunk, Bytes]]) -> None:
        for chunk, target in wanted:
            for done in range(0, len(target), FETCH_BYTES):
                size = min(FETCH_BYTES, len(target) - done)
                data = fetch(chunk.segment_id, chunk.offset + done, size)
                if len(data) != size:
                    raise DescriptorError(f"segment {chunk.segment_id}: asked for {size} bytes, got {len(data)}")
                target[done : done + size] = np.frombuffer(data, np.uint8)

    return fill


class FetchedMemory(_Regions):
    """Copies of chunks in this process's own memory, brought by calls. The plain reference that always works."""

    def __init__(self, descriptor: Descriptor, placed: Layout[IntArray], fetch: Fetch) -> None:
        index, offset, num_rows = descriptor.table().T
        streams, chunks = descriptor.streams, descriptor.chunks
        ends = np.zeros(len(chunks), np.int64)
        np.maximum.at(ends, index, placed.end)
        # Chunks move by multiples of every stream's alignment, so that their blocks keep their layout.
        step = math.lcm(CACHE_LINE, *(stream.alignment for stream in streams))
        starts, total = [], 0
        for chunk, end in zip(chunks, ends.tolist(), strict=True):
            starts.append(-(-total // step) * step + chunk.offset % step)
            total = starts[-1] + max(end - chunk.offset, 0)
        shift = np.array(starts, np.int64) - np.array([chunk.offset for chunk in chunks], np.int64)
        super().__init__(layout(offset + shift[index], num_rows, streams), np.zeros(len(index), np.int64))
        self._bytes = np.empty(total, np.uint8)
        targets = [
            (chunk, self._bytes[start : start + max(end - chunk.offset, 0)])
            for chunk, start, end in zip(chunks, starts, ends.tolist(), strict=True)
        ]
        fetch([(chunk, target) for chunk, target in targets if len(target)])

    def _region(self, number: int) -> Bytes:
        return self._bytes

    def view(self, block: int, offset: int, nbytes: int) -> torch.Tensor:
        return torch.from_numpy(self._bytes[offset : offset + nbytes])

"""Rows of one stream and layer over all parts, as one array that is read on demand. In any process."""

from __future__ import annotations

import operator
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from vllm_tap.store.dtypes import DTYPES, WIDENED, Bytes, new_tensor, to_numpy, to_torch
from vllm_tap.store.facts import StreamFacts
from vllm_tap.store.part import Part

if TYPE_CHECKING:
    import torch


class Rows:
    """A view [N, D] of a layer's rows, sample after sample, over all shards; nothing is read before it is asked for.

    `rows[i]` is a tensor [D], `rows[a:b]` and `rows[[3, 1, 2]]` are tensors [n, D], in the stream's dtype, CPU. Slices
    within one part are views of mapped pages, copy-on-write: writing into them changes neither the file nor what others
    read.

    Attributes:
        shape: (N, D).
        dtype: Name of the elements' type.
        layer: Number of the layer, from the first on.
    """

    def __init__(self, parts: Sequence[Part], starts: Sequence[int], stream: StreamFacts, layer: int) -> None:
        self.shape = (starts[-1], stream.width)
        self.dtype, self.layer = stream.dtype, layer
        self._parts, self._starts, self._stream = parts, list(starts), stream
        self._tensors: list[Any] = [None] * len(parts)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, key: Any) -> torch.Tensor:
        """Return a row [D], or rows [n, D] of a slice or of row numbers.

        Raises:
            IndexError: There is no such row.

        Cost:
            No copy for a row or a slice of one part; else one gather.
        """
        if isinstance(key, int):  # the usual case, on a short way
            number = key
        elif isinstance(key, slice):
            start, stop, step = key.indices(len(self))
            return self._slice(start, stop) if step == 1 else self.take(np.arange(start, stop, step))
        else:
            try:
                number = operator.index(key)
            except TypeError:
                return self.take(key)
        size = self._starts[-1]
        if number < 0:
            number += size
        if not 0 <= number < size:
            raise IndexError(f"row {key} of {size}")
        part = bisect_right(self._starts, number) - 1
        tensor = self._tensors[part]
        row: torch.Tensor = (self._tensor(part) if tensor is None else tensor)[number - self._starts[part]]
        return row

    def _tensor(self, part: int) -> Any:
        tensor = self._tensors[part]
        if tensor is None:
            data = self._parts[part].rows(self._stream, self.layer, 0, self._starts[part + 1] - self._starts[part])
            tensor = self._tensors[part] = to_torch(data, self.dtype, self.shape[1])
        return tensor

    def _slice(self, start: int, stop: int) -> torch.Tensor:
        import torch

        pieces = [to_torch(data, self.dtype, self.shape[1]) for data in self._pieces(start, stop)]
        if len(pieces) == 1:
            only: torch.Tensor = pieces[0]
            return only
        empty = torch.empty(0, self.shape[1], dtype=getattr(torch, self.dtype))
        return torch.cat(pieces) if pieces else empty

    def _pieces(self, start: int, stop: int) -> Iterator[Bytes]:
        """Return the bytes of rows that lie in each of the parts."""
        part = bisect_right(self._starts, start) - 1
        while start < stop:
            begin, end = self._starts[part], min(self._starts[part + 1], stop)
            if end > start:
                yield self._parts[part].rows(self._stream, self.layer, start - begin, end - begin)
                start = end
            part += 1

    def take(self, numbers: Any) -> torch.Tensor:
        """Return rows by their numbers, in this order: a tensor [n, D] of its own.

        Raises:
            IndexError: There is no such row.

        Cost:
            One gather for each part that is met.
        """
        import torch

        wanted = self._checked(numbers)
        out = new_tensor(self.dtype, len(wanted), self.shape[1])
        parts = np.searchsorted(self._starts, wanted, side="right") - 1
        # Sorted numbers lie part after part: their rows are gathered right where they belong.
        is_sorted = bool((np.diff(parts) >= 0).all())
        for part in np.unique(parts):
            at = np.flatnonzero(parts == part)
            local = torch.from_numpy(wanted[at] - self._starts[part])
            if is_sorted:
                torch.index_select(self._tensor(int(part)), 0, local, out=out[at[0] : at[-1] + 1])
            else:
                out[torch.from_numpy(at)] = self._tensor(int(part))[local]
        return out

    def _checked(self, numbers: Any) -> npt.NDArray[np.int64]:
        given = np.asarray(numbers)
        if given.dtype == bool:
            if given.shape != (len(self),):
                raise IndexError(f"a mask of {given.shape} for {len(self)} rows")
            given = np.flatnonzero(given)
        if given.size and given.dtype.kind not in "iu":
            raise IndexError(f"rows are chosen by a number, a slice, numbers or a mask, got {type(numbers).__name__}")
        wanted = given.astype(np.int64).reshape(-1)
        wanted = np.where(wanted < 0, wanted + len(self), wanted)
        if len(wanted) and not (wanted.min() >= 0 and wanted.max() < len(self)):
            raise IndexError(f"rows {wanted.min()} to {wanted.max()} of {len(self)}")
        return wanted

    def numpy(self, start: int = 0, stop: int | None = None) -> npt.NDArray[Any]:
        """Return rows `start` to `stop` as an array [n, D], without torch; bfloat16 comes as float32, without loss.

        Cost:
            No copy where the rows lie in one part and have a type that numpy has.
        """
        start, stop, _ = slice(start, stop).indices(len(self))
        pieces = [to_numpy(data, self.dtype, self.shape[1]) for data in self._pieces(start, stop)]
        if len(pieces) == 1:
            return pieces[0]
        kind = np.dtype(np.float32 if self.dtype in WIDENED else DTYPES[self.dtype].numpy)
        return np.concatenate(pieces) if pieces else np.empty((0, self.shape[1]), kind)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> npt.NDArray[Any]:
        return np.asarray(self.numpy(), dtype)

    def blocks(self, num_rows: int = 8192) -> Iterator[npt.NDArray[Any]]:
        """Return all rows in order, as arrays [up to `num_rows`, D] as `numpy` returns them."""
        for start in range(0, len(self), num_rows):
            yield self.numpy(start, start + num_rows)

    def __repr__(self) -> str:
        return f"<Rows: {self._stream.name} of layer {self.layer}, {list(self.shape)} {self.dtype}>"

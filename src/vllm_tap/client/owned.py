"""Rows in a process's own memory: what a copy of a capture holds, wherever it is sent. Client process."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, Protocol

import numpy as np
import torch

Place = tuple[str, int]
"""(stream, layer)"""


class RowSource(Protocol):
    """Source that a capture reads rows from."""

    @property
    def places(self) -> Collection[Place]:
        """The streams and layers that it has."""
        ...

    def rows(self, stream: str, layer: int, start: int, stop: int) -> torch.Tensor:
        """Return rows `start` to `stop` of the wanted ones: a tensor [R, D]."""


class SomeRows:
    """Some streams and layers of a source."""

    def __init__(self, source: RowSource, places: Collection[Place]) -> None:
        self._source = source
        self.places: Collection[Place] = [place for place in source.places if place in places]

    def rows(self, stream: str, layer: int, start: int, stop: int) -> torch.Tensor:
        """Return rows `start` to `stop`, as the source does."""
        return self._source.rows(stream, layer, start, stop)


class OwnedRows:
    """Tensors by stream and layer. Copied and stored, they are plain arrays of bytes of their own."""

    def __init__(self, tensors: Mapping[Place, torch.Tensor]) -> None:
        self._tensors = dict(tensors)

    @property
    def places(self) -> Collection[Place]:
        """The streams and layers that there are."""
        return self._tensors.keys()

    def rows(self, stream: str, layer: int, start: int, stop: int) -> torch.Tensor:
        """Return rows `start` to `stop`, without a copy."""
        return self._tensors[stream, layer][start:stop]

    def __reduce__(self) -> Any:
        # numpy stores the bytes of a view alone, and any dtype as bytes; torch would store the whole memory below.
        return _restored, ({place: _packed(rows) for place, rows in self._tensors.items()},)


Packed = tuple[np.ndarray[Any, np.dtype[np.uint8]], str, tuple[int, ...]]


def _packed(rows: torch.Tensor) -> Packed:
    return rows.contiguous().view(-1).view(torch.uint8).numpy(), str(rows.dtype).removeprefix("torch."), rows.shape


def _restored(packed: Mapping[Place, Packed]) -> OwnedRows:
    return OwnedRows({place: _unpacked(*rows) for place, rows in packed.items()})


def _unpacked(data: np.ndarray[Any, np.dtype[np.uint8]], dtype: str, shape: tuple[int, ...]) -> torch.Tensor:
    # Whoever loads may have put the bytes into memory that nobody may write: tensors know no such thing.
    data = data if data.flags.writeable else data.copy()
    return torch.from_numpy(data).view(getattr(torch, dtype)).view(shape)

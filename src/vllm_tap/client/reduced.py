"""Rows made of those that came: one for each sequence, or all in another dtype. Client process.

They are computed from the rows of the final sequences, so chunks, preemption and rejected drafts change nothing.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection
from typing import Final

import numpy as np
import torch

from vllm_tap.client.owned import Place, RowSource
from vllm_tap.client.sequences import Ints, Sequences
from vllm_tap.spec import Spec

REDUCTIONS: Final[dict[str, Callable[[torch.Tensor], torch.Tensor]]] = {
    "last": lambda rows: rows[-1],
    "mean": lambda rows: rows.mean(0),
    "max": lambda rows: rows.amax(0),
    "sum": lambda rows: rows.sum(0),
}


def with_one_row_each(sequences: Sequences) -> Sequences:
    """Return sequences of which the last wanted row alone is wanted; none where there was none."""
    reduced = copy.copy(sequences)
    counts = np.diff(sequences.wanted_starts)
    reduced.wanted = sequences.wanted[sequences.wanted_starts[1:][counts > 0] - 1]
    reduced.wanted_starts = np.concatenate(([0], np.cumsum(counts > 0)))
    return reduced


def made_of(source: RowSource, spec: Spec, sequences: Sequences) -> RowSource:
    """Return the rows that a Spec asks for, made of those of a source."""
    if spec.reduce is not None:
        return ReducedRows(source, spec.reduce, spec.dtype, sequences.wanted_starts)
    return source if spec.dtype is None else CastRows(source, spec.dtype)


class CastRows:
    """Rows of a source in another dtype; integers as they are."""

    def __init__(self, source: RowSource, dtype: str) -> None:
        self._source, self._dtype = source, dtype

    @property
    def places(self) -> Collection[Place]:
        """The streams and layers of the source."""
        return self._source.places

    def rows(self, stream: str, layer: int, start: int, stop: int) -> torch.Tensor:
        """Return rows `start` to `stop`, in a copy where their dtype changes."""
        return _cast(self._source.rows(stream, layer, start, stop), self._dtype)


class ReducedRows:
    """One row for each sequence that has any, computed in float32.

    Args:
        source: Rows of all sequences, one behind the other.
        how: Name of the reduction.
        dtype: Of the result; that of the source if None.
        starts: Where the rows of each sequence begin in the source, and where the last one's end, [S + 1].
    """

    def __init__(self, source: RowSource, how: str, dtype: str | None, starts: Ints) -> None:
        self._source, self._how, self._dtype = source, how, dtype
        self._starts = np.concatenate((starts[:1], starts[1:][np.diff(starts) > 0]))

    @property
    def places(self) -> Collection[Place]:
        """The streams and layers of the source."""
        return self._source.places

    def rows(self, stream: str, layer: int, start: int, stop: int) -> torch.Tensor:
        """Return the rows of sequences `start` to `stop` of those that have any."""
        starts = self._starts[start : stop + 1].tolist() or [0]
        rows = self._source.rows(stream, layer, starts[0], starts[-1])
        dtype = self._dtype or str(rows.dtype).removeprefix("torch.")
        if len(starts) == 1:
            return _cast(rows, dtype)
        reduce = REDUCTIONS[self._how]
        exact = rows if self._how == "last" or not rows.is_floating_point() else rows.to(torch.float32)
        return _cast(torch.stack([reduce(part) for part in exact.split(np.diff(starts).tolist())]), dtype)


def _cast(rows: torch.Tensor, dtype: str) -> torch.Tensor:
    return rows.to(getattr(torch, dtype)) if rows.is_floating_point() else rows

"""Rows made of those that came: one for each sequence, or all in another dtype. Client process.

They are computed from the rows of the final sequences, so chunks, preemption and rejected drafts change nothing.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection
from typing import Final

import numpy as np
import torch

from vllm_tap.client.owned import OwnedRows, Place, RowSource
from vllm_tap.client.sequences import Sequences
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
    """Return the rows that a Spec asks for, made of those of a source; one for each sequence own their memory."""
    if spec.reduce is not None:
        lengths = np.diff(sequences.wanted_starts)
        return OwnedRows(
            {place: _reduced(source, place, spec, lengths[lengths > 0].tolist()) for place in source.places}
        )
    return source if spec.dtype is None else CastRows(source, spec.dtype)


def _reduced(source: RowSource, place: Place, spec: Spec, lengths: list[int]) -> torch.Tensor:
    """Return a row for each run of rows of these lengths, computed in float32."""
    rows = source.rows(*place, 0, sum(lengths))
    dtype = spec.dtype or str(rows.dtype).removeprefix("torch.")
    if not lengths:
        return _cast(rows, dtype)
    how = spec.reduce or "last"
    exact = rows if how == "last" or not rows.is_floating_point() else rows.to(torch.float32)
    return _cast(torch.stack([REDUCTIONS[how](part) for part in exact.split(lengths)]), dtype)


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


def _cast(rows: torch.Tensor, dtype: str) -> torch.Tensor:
    return rows.to(getattr(torch, dtype)) if rows.is_floating_point() else rows

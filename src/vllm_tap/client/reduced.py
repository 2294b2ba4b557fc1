"""Rows made of those that came: one for each sequence, or all in another dtype. Client process.

They are computed from the rows of the final sequences, so chunks, preemption and rejected drafts change nothing.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterable
from typing import Final

import numpy as np
import torch

from vllm_tap.client.owned import OwnedRows, Place, RowSource
from vllm_tap.client.sequences import Sequences
from vllm_tap.spec import Spec
from vllm_tap.streams import IN_FP8

REDUCTIONS: Final[dict[str, Callable[[torch.Tensor], torch.Tensor]]] = {
    "last": lambda rows: rows[-1],
    "mean": lambda rows: rows.mean(0),
    "max": lambda rows: rows.amax(0),
    "sum": lambda rows: rows.sum(0),
}

FP8: Final = "fp8"
LARGEST: Final = 448.0
"""Largest number of e4m3."""


NOTES: Final = {
    "hidden_states_fp8": "; in e4m3, to be multiplied by hidden_states_scale",
    "hidden_states_scale": "; what elements of hidden_states_fp8 are multiplied by",
}
"""Ends of the conventions of such streams, behind that of the rows they are made of."""


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
        owned = {place: _reduced(source, place, spec, lengths[lengths > 0].tolist()) for place in source.places}
        return ScaledRows(OwnedRows(owned)) if spec.dtype == FP8 else OwnedRows(owned)
    if spec.dtype == FP8:
        return ScaledRows(source)
    return source if spec.dtype is None else CastRows(source, spec.dtype)


def _reduced(source: RowSource, place: Place, spec: Spec, lengths: list[int]) -> torch.Tensor:
    """Return a row for each run of rows of these lengths, computed in float32."""
    rows = source.rows(*place, 0, sum(lengths))
    dtype = "float32" if spec.dtype == FP8 else spec.dtype or str(rows.dtype).removeprefix("torch.")
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


def streams_made(spec: Spec, streams: Iterable[str]) -> dict[str, str]:
    """Return the streams of a result, and of each which of the given ones it is made of."""
    return {name: stream for stream in streams for name in (IN_FP8[stream] if spec.dtype == FP8 else (stream,))}


class ScaledRows:
    """Rows of a source in e4m3, and their scales, in streams of their own."""

    def __init__(self, source: RowSource) -> None:
        self._source = source

    @property
    def places(self) -> Collection[Place]:
        """The streams and layers: two for each of the source."""
        return [(name, layer) for stream, layer in self._source.places for name in IN_FP8[stream]]

    def rows(self, stream: str, layer: int, start: int, stop: int) -> torch.Tensor:
        """Return rows `start` to `stop`: elements [R, D], or scales [R, 1]."""
        whole, parts = next((whole, parts) for whole, parts in IN_FP8.items() if stream in parts)
        return to_fp8(self._source.rows(whole, layer, start, stop))[parts.index(stream)]


def to_fp8(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return rows in e4m3 and their scales: float8_e4m3fn [R, D] and float32 [R, 1], whose product they are again.

    The largest element of a row becomes 448, the largest number of e4m3. What is not finite becomes NaN, and does not
    count for the scale.
    """
    exact = rows.to(torch.float32)
    sizes = exact.abs()
    is_finite = sizes.isfinite()
    largest = torch.where(is_finite, sizes, 0).amax(1, keepdim=True)
    # Not below the smallest normal number: of smaller ones the last bits are missing.
    scales = (largest / LARGEST).clamp_min(torch.finfo(torch.float32).tiny)
    return torch.where(is_finite, exact / scales, torch.nan).to(torch.float8_e4m3fn), scales


def _cast(rows: torch.Tensor, dtype: str) -> torch.Tensor:
    return rows.to(getattr(torch, dtype)) if rows.is_floating_point() else rows

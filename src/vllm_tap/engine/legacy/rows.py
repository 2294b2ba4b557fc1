"""Captured rows of all requests, put in order: request after request, positions ascending. Worker process."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from vllm_tap.engine.capture.session import Session
from vllm_tap.errors import RowsMissingError
from vllm_tap.frame.entry import raw_entry
from vllm_tap.frame.layout import IntArray, layout
from vllm_tap.labels import NUM_LABELS, Mark
from vllm_tap.transport.segment.pool import SegmentPool
from vllm_tap.vllm.runner import Batch


class Met(NamedTuple):
    """A request by its number, and whether it was met at its beginning."""

    number: int
    is_new: bool


class AllRequestsSession(Session):
    """A session that takes the rows of every request, in the order in which `known` numbers them."""

    def __init__(self, *args: Any, known: dict[str, Met]) -> None:
        super().__init__(*args)
        self.known = known

    @property
    def request_ids(self) -> list[str]:
        """The requests whose rows were taken."""
        return [request.request_id for request in self._table]

    def scheduled(self, request_id: str) -> None:
        self.known.setdefault(request_id, Met(len(self.known), True))

    def before_forward(self, batch: Batch) -> None:
        """Before a forward pass: take what runs, also requests that were under way before this session."""
        for request_id in batch.request_ids:
            if request_id not in self._selector:
                met = self.known.setdefault(request_id, Met(len(self.known), False))
                self.meet(request_id, Mark(self.start.capture_id, met.number, 1), 0)
        super().before_forward(batch)


class Part(NamedTuple):
    """Blocks that one session has filled, and where each row of them belongs.

    `segment_of` and `counts` [B] say where a block lies and how many rows it has, `starts` [B] for each stream of the
    session where its planes begin; `numbers` and `positions` [R] say which request a row is of, and where in it.
    """

    session: AllRequestsSession
    pool: SegmentPool
    segment_of: IntArray
    counts: IntArray
    starts: tuple[IntArray, ...]
    numbers: IntArray
    positions: IntArray


def read_part(session: AllRequestsSession, pool: SegmentPool) -> Part:
    """Wait for the rows of a session and read their labels.

    Raises:
        TapError: What ended the session early.
    """
    described = session.finish()
    index, offset, counts = described.table().T
    placed = layout(offset, counts, described.streams)
    segment_of = np.array([chunk.segment_id for chunk in described.chunks], np.int64)[index]
    labels = [
        np.frombuffer(pool.segment(int(segment)).view, np.int32, NUM_LABELS * count, start).reshape(NUM_LABELS, count)
        for segment, start, count in zip(segment_of, placed.labels.tolist(), counts.tolist(), strict=True)
    ]
    rows = np.concatenate(labels, axis=1) if labels else np.empty((NUM_LABELS, 0), np.int32)
    # Rows carry the session's number of their request; requests keep one number over all sessions.
    overall = np.array([request.sample for request in described.requests], np.int64)
    numbers = overall[rows[0]] if len(overall) else np.empty(0, np.int64)
    return Part(session, pool, segment_of, counts, placed.streams, numbers, rows[1].astype(np.int64))


class Ordered:
    """The rows of one stream over several parts, in order; a position that was computed twice counts as computed last.

    Raises:
        RowsMissingError: Rows of a request that did not go through the model, or not while rows were taken.
    """

    def __init__(self, parts: Sequence[Part], stream: str, known: dict[str, Met], since: int) -> None:
        self._parts = parts
        self._places = [[s.name for s in part.session.streams].index(stream) for part in parts]
        self._stream = parts[0].session.streams[self._places[0]]
        numbers = np.concatenate([part.numbers for part in parts])
        positions = np.concatenate([part.positions for part in parts])
        order = np.lexsort((np.arange(len(numbers)), positions, numbers))
        later = (np.diff(numbers[order]) == 0) & (np.diff(positions[order]) == 0)
        self._order: IntArray = order[np.concatenate((~later, [True]))] if len(order) else order
        self._is_in_order = bool((np.diff(self._order) == 1).all()) and len(order) == len(self._order)
        self._check(numbers[self._order], positions[self._order], known, since)

    def __len__(self) -> int:
        return len(self._order)

    @property
    def layers(self) -> tuple[int, ...]:
        """The layers of which there are rows."""
        return self._stream.layers

    def _check(self, numbers: IntArray, positions: IntArray, known: dict[str, Met], since: int) -> None:
        first = np.diff(numbers, prepend=-1) != 0
        is_whole = np.array([met.is_new and met.number >= since for met in known.values()], np.bool_)[numbers]
        wrong = np.flatnonzero(np.where(first, is_whole & (positions > 0), np.diff(positions, prepend=0) != 1))
        if not len(wrong):
            return
        at = int(wrong[0])
        start = 0 if first[at] else int(positions[at - 1]) + 1
        request_id = list(known)[int(numbers[at])]
        raise RowsMissingError(
            f"{self._stream.name}: request {request_id} has no rows for positions {start} to {positions[at] - 1}: they "
            "came from the prefix cache, or ran while nothing was captured. Start the engine with "
            "enable_prefix_caching=False, or use vllm_tap.capture, whose requests do not read the cache.",
            request_id=request_id,
        )

    def entry(self, layer: int) -> dict[str, Any]:
        """Return one layer's rows as plain values.

        Cost: one copy where all rows lie together, else two.
        """
        pieces = [self._rows(part, place, layer) for part, place in zip(self._parts, self._places, strict=True)]
        rows = torch.cat(pieces) if len(pieces) > 1 else pieces[0]
        if not self._is_in_order:
            rows = rows.index_select(0, torch.from_numpy(self._order))
        plain = rows.view(torch.uint8).numpy().tobytes()
        return raw_entry(layer, f"torch.{self._stream.dtype}", (len(self), self._stream.width), plain)

    def _rows(self, part: Part, place: int, layer: int) -> torch.Tensor:
        """Return the rows of a layer in the order in which a part took them: a view where it has a single block."""
        stream = self._stream
        plane, dtype = stream.layers.index(layer), getattr(torch, stream.dtype)
        views = [
            torch.frombuffer(
                part.pool.segment(segment).view,
                dtype=dtype,
                count=count * stream.width,
                offset=start + plane * count * stream.row_bytes,
            ).view(count, stream.width)
            for segment, start, count in zip(
                part.segment_of.tolist(), part.starts[place].tolist(), part.counts.tolist(), strict=True
            )
        ]
        return torch.cat(views) if len(views) > 1 else views[0]

"""Counts of rows of captures, under way and ended. Worker process."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, NamedTuple

from vllm_tap.engine.capture.session import Session

MOST_COUNTED: Final = 256
"""Captures that have ended whose rows are still known."""


class Count(NamedTuple):
    """Rows of captures, their bytes, and seconds for which the engine waited for files of them."""

    num_rows: int
    num_bytes: int
    stalled_seconds: float


class Tally:
    """Remembers the counts of captures that have ended, of the last ones."""

    def __init__(self) -> None:
        self._ended: dict[str, Count] = {}

    def end(self, session: Session) -> None:
        """Keep the count of a capture."""
        name = session.start.capture_id
        self._ended.pop(name, None)
        self._ended[name] = _count(session)
        if len(self._ended) > MOST_COUNTED:
            del self._ended[next(iter(self._ended))]

    def count(self, sessions: Mapping[str, Session], capture_id: str = "") -> Count:
        """Return the count of a capture; of all under way, or of the last that ended, unless one is named."""
        under_way = {name: _count(session) for name, session in sessions.items()}
        if capture_id:
            return {**self._ended, **under_way}.get(capture_id, Count(0, 0, 0.0))
        counts = list(under_way.values()) or list(self._ended.values())[-1:]
        return Count(sum(c.num_rows for c in counts), sum(c.num_bytes for c in counts),
                     sum(c.stalled_seconds for c in counts))  # fmt: skip


def _count(session: Session) -> Count:
    return Count(session.num_rows, session.num_bytes, session.stalled_seconds)

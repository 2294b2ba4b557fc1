"""Places in a ring of staging memory, each free again once the copy out of it is done. Worker process."""

from __future__ import annotations

from typing import Any


class Ring:
    """Hands out places in order. Copies out of them must all be queued on one stream, in the same order."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._head = 0
        self._busy: list[tuple[int, int, Any]] = []

    def take(self, size: int, stream: Any) -> int:
        """Return the start of a free place; `stream` waits for the copies that still read from it."""
        assert size <= self.capacity
        if self._head + size > self.capacity:
            self._head = 0
        start, stop = self._head, self._head + size
        self._head = stop
        last = max((i for i, (a, b, _) in enumerate(self._busy) if a < stop and start < b), default=-1)
        if last >= 0:
            # Copies end in the order in which they were queued: waiting for one is waiting for all before it.
            stream.wait_event(self._busy[last][2])
            del self._busy[: last + 1]
        return start

    def busy(self, start: int, size: int, done: Any) -> None:
        """Keep a place until an event."""
        self._busy.append((start, start + size, done))

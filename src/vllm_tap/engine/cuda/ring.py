"""Places in a ring of staging memory, each free again once the copy out of it is done. Worker process."""

from __future__ import annotations

from collections import deque

from vllm_tap.engine.cuda.driver import Event, Events


class Ring:
    """Hands out places in order. Copies out of them must all be queued on one stream, in the same order."""

    def __init__(self, capacity: int, events: Events) -> None:
        self.capacity = capacity
        self._events = events
        self._head = 0
        # In the order in which they were taken: what lies ahead of the head comes first.
        self._busy: deque[tuple[int, int, Event]] = deque()

    def take(self, size: int, stream: int) -> int:
        """Return the start of a free place; `stream` waits for the copies that still read from it.

        Cost: grows with the places that are free again, not with those that are busy.
        """
        assert size <= self.capacity
        done = None
        if self._head + size > self.capacity:
            while self._busy and self._busy[0][0] >= self._head:
                done = self._free_first()
            self._head = 0
        start, self._head = self._head, self._head + size
        while self._busy and self._busy[0][0] < self._head and start < self._busy[0][1]:
            done = self._free_first()
        if done is not None:
            # Copies end in the order in which they were queued: waiting for one is waiting for all before it.
            done.wait(stream)
        return start

    def release_after(self, start: int, size: int, stream: int) -> None:
        """Keep a place until what is queued on a stream has been done."""
        self._busy.append((start, start + size, self._events.recorded(stream)))

    def close(self) -> None:
        """Give up all places."""
        while self._busy:
            self._free_first()

    def _free_first(self) -> Event:
        event = self._busy.popleft()[2]
        self._events.give(event)
        return event

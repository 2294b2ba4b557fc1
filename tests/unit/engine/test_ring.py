"""The ring of staging places: what is handed out is never what a copy still reads."""

from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from vllm_tap.engine.cuda.ring import Ring


class Event:
    """The copy with this number has ended; holding a stream covers the copies queued before it."""

    def __init__(self, events: Events, number: int) -> None:
        self._events, self._number = events, number

    def wait(self, stream: int) -> None:
        assert stream == MAIN
        self._events.waited_for = max(self._events.waited_for, self._number)


class Events:
    """The events of copies, numbered in the order in which they are queued, and what the main stream waited for."""

    def __init__(self) -> None:
        self.waited_for = -1
        self.num_copies = self.num_given = 0

    def recorded(self, stream: int) -> Event:
        assert stream == SIDE
        self.num_copies += 1
        return Event(self, self.num_copies - 1)

    def give(self, event: Event) -> None:
        self.num_given += 1


MAIN, SIDE = 1, 2


@given(st.integers(1, 40), st.lists(st.integers(1, 40), max_size=60))
def test_a_place_is_free_of_copies_that_were_not_waited_for(capacity: int, sizes: list[int]) -> None:
    """Whatever the sizes, a new place overlaps only places whose copies the stream has waited for."""
    events = Events()
    ring = Ring(capacity, events)
    copies: list[tuple[int, int]] = []
    for size in sizes:
        size = min(size, capacity)
        start = ring.take(size, MAIN)
        assert 0 <= start <= capacity - size
        for number, (a, b) in enumerate(copies):
            if a < start + size and start < b:
                assert number <= events.waited_for
        copies.append((start, start + size))
        ring.release_after(start, size, SIDE)


def test_a_ring_that_is_large_enough_never_waits() -> None:
    """No wait before the first place comes round again."""
    events = Events()
    ring = Ring(100, events)
    for _ in range(10):
        ring.release_after(ring.take(10, MAIN), 10, SIDE)
    assert events.waited_for == -1
    ring.take(10, MAIN)
    assert events.waited_for == 0


def test_many_busy_places_cost_nothing() -> None:
    """A long ring of small places: what is looked at is what comes round again, not all that is busy."""

    class Places(list[int]):
        """A place [begin, end, event] that counts how often it is looked at."""

        looks = 0

        def __getitem__(self, key: Any) -> Any:
            Places.looks += 1
            return super().__getitem__(key)

    events = Events()
    ring = Ring(1000, events)
    for _ in range(3000):
        start = ring.take(1, MAIN)
        ring.release_after(start, 1, SIDE)
        ring._busy[-1] = Places(ring._busy[-1])  # type: ignore[call-overload]
    assert Places.looks < 5 * 3000
    assert events.waited_for == 1999


def test_all_events_are_given_back() -> None:
    """Those of places that came round again, and at the end those of all others."""
    events = Events()
    ring = Ring(100, events)
    for _ in range(25):
        ring.release_after(ring.take(10, MAIN), 10, SIDE)
    assert events.num_given == 15
    ring.close()
    ring.close()
    assert events.num_given == events.num_copies == 25

"""The ring of staging places: what is handed out is never what a copy still reads."""

from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from vllm_tap.engine.ring import Ring


class Stream:
    """A stream that remembers which events it has waited for; waiting for one covers the copies queued before it."""

    def __init__(self) -> None:
        self.waited_for = -1

    def wait_event(self, event: int) -> None:
        self.waited_for = max(self.waited_for, event)


@given(st.integers(1, 40), st.lists(st.integers(1, 40), max_size=60))
def test_a_place_is_free_of_copies_that_were_not_waited_for(capacity: int, sizes: list[int]) -> None:
    """Whatever the sizes, a new place overlaps only places whose copies the stream has waited for."""
    ring, stream = Ring(capacity), Stream()
    copies: list[tuple[int, int]] = []
    for size in sizes:
        size = min(size, capacity)
        start = ring.take(size, stream)
        assert 0 <= start <= capacity - size
        for number, (a, b) in enumerate(copies):
            if a < start + size and start < b:
                assert number <= stream.waited_for
        copies.append((start, start + size))
        ring.busy(start, size, len(copies) - 1)


def test_a_ring_that_is_large_enough_never_waits() -> None:
    """No wait before the first place comes round again."""
    ring, stream = Ring(100), Stream()
    for number in range(10):
        ring.busy(ring.take(10, stream), 10, number)
    assert stream.waited_for == -1
    ring.take(10, stream)
    assert stream.waited_for == 0


def test_many_busy_places_cost_nothing() -> None:
    """A long ring of small places: what is looked at is what comes round again, not all that is busy."""

    class Places(list[int]):
        """A place [begin, end, event] that counts how often it is looked at."""

        looks = 0

        def __getitem__(self, key: Any) -> Any:
            Places.looks += 1
            return super().__getitem__(key)

    ring, stream = Ring(1000), Stream()
    for number in range(3000):
        start = ring.take(1, stream)
        ring.busy(start, 1, number)
        ring._busy[-1] = Places(ring._busy[-1])  # type: ignore[call-overload]
    assert Places.looks < 5 * 3000
    assert stream.waited_for == 1999

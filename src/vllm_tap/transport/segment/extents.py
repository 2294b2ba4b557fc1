"""The free parts of a pool's segments, kept so that taking and giving back stay cheap with many blocks.

Runs in the engine worker, under the pool's lock.
"""

from __future__ import annotations

from bisect import bisect_left, insort

from vllm_tap.transport.segment.memory import round_up


class FreeExtents:
    """Free runs of bytes, at most one between two taken ones.

    A request takes the smallest run that holds it, and of these the first: one bisection, where walking the runs by
    address would take as many steps as there are holes, on every step of the engine.
    """

    def __init__(self) -> None:
        self._by_size: list[tuple[int, int, int]] = []  # (nbytes, segment_id, start), sorted
        self._nbytes_at_start: dict[tuple[int, int], int] = {}
        self._nbytes_at_end: dict[tuple[int, int], int] = {}
        self.total_bytes = 0

    def add(self, segment_id: int, start: int, nbytes: int) -> None:
        """Give a run back, joined with the free runs on either side of it."""
        before = self._nbytes_at_end.get((segment_id, start), 0)
        after = self._nbytes_at_start.get((segment_id, start + nbytes), 0)
        if before:
            self._remove(segment_id, start - before, before)
        if after:
            self._remove(segment_id, start + nbytes, after)
        self._insert(segment_id, start - before, before + nbytes + after)

    def take(self, nbytes: int, align: int) -> tuple[int, int] | None:
        """Take `nbytes` at a multiple of `align`; return (segment_id, offset), or None where no run is long enough."""
        for index in range(bisect_left(self._by_size, (nbytes,)), len(self._by_size)):
            size, segment_id, start = self._by_size[index]
            offset = round_up(start, align)
            if offset + nbytes <= start + size:
                self._remove(segment_id, start, size)
                self._insert(segment_id, start, offset - start)
                self._insert(segment_id, offset + nbytes, start + size - offset - nbytes)
                return segment_id, offset
        return None

    def room_for(self, nbytes: int) -> int:
        """Return how many bytes blocks of `nbytes` find room for, all of them taken together."""
        first = bisect_left(self._by_size, (nbytes,))
        return sum(size // nbytes * nbytes for size, _, _ in self._by_size[first:])

    def is_free(self, segment_id: int, nbytes: int) -> bool:
        """Tell whether a segment of `nbytes` is free from its first byte to its last."""
        return self._nbytes_at_start.get((segment_id, 0)) == nbytes

    def drop(self, segment_id: int, nbytes: int) -> None:
        """Forget a segment that is free from its first byte to its last."""
        self._remove(segment_id, 0, nbytes)

    def _insert(self, segment_id: int, start: int, nbytes: int) -> None:
        if not nbytes:
            return
        insort(self._by_size, (nbytes, segment_id, start))
        self._nbytes_at_start[segment_id, start] = nbytes
        self._nbytes_at_end[segment_id, start + nbytes] = nbytes
        self.total_bytes += nbytes

    def _remove(self, segment_id: int, start: int, nbytes: int) -> None:
        del self._by_size[bisect_left(self._by_size, (nbytes, segment_id, start))]
        del self._nbytes_at_start[segment_id, start]
        del self._nbytes_at_end[segment_id, start + nbytes]
        self.total_bytes -= nbytes

"""Rows that leave a CUDA device together: those of a step, or of small ones that follow one another. Worker process.

A copy of 2 MiB reaches 0.85 of the rate of the bus, one of 8 MiB 0.97 and one of 16 MiB 0.99, and each costs the host
some 50 microseconds in a step (one H100). Blocks of consecutive steps lie side by side in their segment, so rows that
lie side by side in the staging as well can go in one copy.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from vllm_tap.frame.layout import CACHE_LINE


class Transfer(NamedTuple):
    """A copy of `nbytes` from an address in the staging to one in a segment."""

    target: int
    source: int
    nbytes: int


class Burst:
    """Copies that are to be made; blocks of later steps may join the last of them.

    Args:
        copies: Of the step that comes first.
        place, size: What they take of the ring of staging.
        limit: Where in the segment that ends which the staging has room for; 0 if nothing may join.

    Attributes:
        is_full: Whether it has no room for another block as large as the last.
    """

    def __init__(self, copies: Sequence[Transfer], place: int, size: int, limit: int = 0) -> None:
        self.place, self.size = place, size
        *self._whole, (self._begin, source, last_bytes) = copies
        self._end, self._limit = self._begin + last_bytes, limit
        self._shift = source - self._begin
        self.is_full = self._end + CACHE_LINE + last_bytes > limit

    def join(self, target: int, nbytes: int) -> int:
        """Take a block in that comes next in the segment; return where it is to be staged, or 0 if it has to wait."""
        end = target + nbytes
        if not 0 <= target - self._end < CACHE_LINE or end > self._limit:
            return 0
        self._end = end
        self.is_full = end + CACHE_LINE + nbytes > self._limit
        return target + self._shift

    @property
    def copies(self) -> list[Transfer]:
        """Copies that are due by now."""
        return [*self._whole, Transfer(self._begin, self._begin + self._shift, self._end - self._begin)]

"""Room that requests of an event loop wait for: bytes of rows that have not been read. Client process."""

from __future__ import annotations

import asyncio
from typing import Final

PART_OF_BUDGET: Final = 3
"""Running requests may need one part in so many of the budget: workers reserve ahead, and memory is free again when the
last row in it has been read."""


class Room:
    """Bytes that requests take before they run and give back when their reader has taken what came of them.

    Args:
        budget_bytes: Most bytes of all rows; None for no bound.
    """

    def __init__(self, budget_bytes: int | None) -> None:
        self._most = None if budget_bytes is None else budget_bytes // PART_OF_BUDGET
        self._used = 0
        self._changed = asyncio.Event()

    def has(self, nbytes: int) -> bool:
        """Tell whether there is room for so many bytes, or nobody else has any."""
        return self._most is None or not self._used or self._used + nbytes <= self._most

    async def enter(self, nbytes: int) -> None:
        """Wait until there is room for so many bytes, or nobody else has any."""
        while not self.has(nbytes):
            await self._changed.wait()
        self._used += nbytes

    def leave(self, nbytes: int) -> None:
        """Give bytes back."""
        self._used -= nbytes
        self._changed.set()
        self._changed = asyncio.Event()

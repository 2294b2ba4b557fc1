"""Room that requests of an event loop wait for: bytes of rows that have not been read. Client process."""

from __future__ import annotations

import asyncio
import time
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

    async def enter(self, nbytes: int) -> float:
        """Wait until there is room for so many bytes, or nobody else has any; return for how many seconds."""
        begin = None
        while self._most is not None and self._used and self._used + nbytes > self._most:
            begin = begin or time.monotonic()
            await self._changed.wait()
        self._used += nbytes
        return time.monotonic() - begin if begin else 0.0

    def leave(self, nbytes: int) -> None:
        """Give bytes back."""
        self._used -= nbytes
        self._changed.set()
        self._changed = asyncio.Event()

"""Results by their names, in whichever API process they are; readers may wait. In an API process's event loop."""

from __future__ import annotations

import asyncio
import time
from typing import Final, NamedTuple

from vllm_tap.serve.peers import Name, Peers, RemoteResult
from vllm_tap.serve.results import Result, Results

POLL_S: Final = 0.05
REST: Final = 4
"""Times as long as a round took, the next one waits: many readers take a fifth of a thread."""

MOST_LETTERS: Final = 1024
"""Of a name; none of a longer one is found."""

AnyResult = Result | RemoteResult


class Waiting(NamedTuple):
    """A reader that waits for a result until some time."""

    name: Name
    deadline: float
    found: asyncio.Future[AnyResult | None]


class Finder:
    """Looks for results here and in the other processes; for all readers that wait at once.

    Args:
        results: Of this process.
        peers: The other ones.
    """

    def __init__(self, results: Results, peers: Peers) -> None:
        self._results, self._peers = results, peers
        self._waiting: list[Waiting] = []
        self._polling: asyncio.Task[None] | None = None

    async def find(self, key: str, name: str, wait_s: float) -> AnyResult | None:
        """Return a result that is there, or comes within some seconds."""
        if len(name) > MOST_LETTERS:
            return None
        deadline = time.monotonic() + wait_s
        found = (await self._look([(key, name)])).get((key, name))
        if found is not None or not time.monotonic() < deadline:  # also for NaN
            return found
        waiting = Waiting((key, name), deadline, asyncio.get_running_loop().create_future())
        self._waiting.append(waiting)
        if self._polling is None or self._polling.done():
            self._polling = asyncio.create_task(self._poll())
        return await waiting.found

    async def _poll(self) -> None:
        """Look for what is waited for until nobody waits. A failure is that of who waits."""
        pause = POLL_S
        while self._waiting:
            await asyncio.sleep(pause)
            begin = time.monotonic()
            try:
                found = await self._look([one.name for one in self._waiting])
            except Exception as error:
                failed, self._waiting = self._waiting, []
                for one in failed:
                    if not one.found.done():
                        one.found.set_exception(error)
                return
            now = time.monotonic()
            self._waiting = [one for one in self._waiting if not _is_over(one, found.get(one.name), now)]
            pause = max(POLL_S, REST * (now - begin))

    async def _look(self, names: list[Name]) -> dict[Name, AnyResult]:
        here = {name: result for name in names if (result := self._results.find(*name)) is not None}
        missing = [name for name in dict.fromkeys(names) if name not in here]
        return {**here, **(await self._peers.find(missing) if missing else {})}


def _is_over(waiting: Waiting, found: AnyResult | None, now: float) -> bool:
    """Tell a reader of its result, or that its time is over; return whether it waits no more."""
    if found is None and now < waiting.deadline and not waiting.found.cancelled():
        return False
    if not waiting.found.done():
        waiting.found.set_result(found)
    return True

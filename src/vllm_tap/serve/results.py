"""Results that wait to be read: frames by id, within limits. In each API process, in its event loop."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections import Counter, OrderedDict
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable
from typing import Final

from vllm_tap.errors import BudgetError
from vllm_tap.frame import body
from vllm_tap.serve.settings import Settings

MARGIN_S: Final = 0.05
"""Seconds after the end of a result's time at which it is let go of if nobody asks."""

ASKS_S: Final = 1.0
"""Seconds within which another process that reads a result asks for frames again, many times over."""

Frame = bytes | body.Encoded


class Result:
    """Rows of one HTTP request.

    Attributes:
        id: Random; whoever has it and the API key may read.
        names: Other names of it, such as the X-Request-Id that the client chose.
        is_named: Whether its client chose a name.
        frames: What there is, each encoded; none changes.
        asked: When another process asked for frames.
    """

    def __init__(self, key: str, names: Iterable[str], is_named: bool = False) -> None:
        self.key, self.is_named = key, is_named
        self.id = f"tap-{secrets.token_urlsafe(18)}"
        self.names = list(names)
        self.frames: list[Frame] = []
        self.num_bytes = 0
        self.has_ended = False
        self.expires: float | None = None
        self.asked = float("-inf")
        self._num_readers = 0
        self._changed = asyncio.Event()

    @property
    def total_bytes(self) -> int | None:
        """Bytes of all frames; None while more may come."""
        return sum(map(len, self.frames)) if self.has_ended else None

    @property
    def has_readers(self) -> bool:
        """Tell whether somebody reads it, here or in another process."""
        return self._num_readers > 0 or time.monotonic() - self.asked < ASKS_S

    def wake(self) -> None:
        """Wake its readers."""
        self._changed.set()
        self._changed = asyncio.Event()

    async def read(self) -> AsyncGenerator[body.Piece, None]:
        """Yield all frames, as they come, to the end, in pieces."""
        self._num_readers += 1
        try:
            async for frame in self._read():
                for piece in frame.pieces if isinstance(frame, body.Encoded) else (frame,):
                    yield piece
        finally:
            self._num_readers -= 1

    async def _read(self) -> AsyncIterator[Frame]:
        number = 0
        sent: Frame = b""
        while True:
            changed = self._changed
            while number < len(self.frames):
                sent = self.frames[number]
                yield sent
                number += 1
            if self.has_ended:
                if sent is not self.frames[-1]:  # rows fell away
                    yield self.frames[-1]
                return
            await changed.wait()


class Results:
    """Results by the names that they have for each API key."""

    def __init__(self, settings: Settings, now: Callable[[], float] = time.monotonic) -> None:
        self._settings, self._now = settings, now
        self._by_name: dict[tuple[str, str], Result] = {}
        self._by_id: dict[str, Result] = {}
        self._ended: OrderedDict[str, Result] = OrderedDict()  # in the order in which their times are over
        self._num_by_key: Counter[str] = Counter()
        self._bytes_by_key: Counter[str] = Counter()
        self.num_bytes = 0

    def __len__(self) -> int:
        return len(self._by_id)

    def open(self, key: str, names: Iterable[str], is_named: bool = False) -> Result:
        """Return a new result.

        Raises:
            BudgetError: There are as many as there may be.
            ValueError: One of the names is that of another result.
        """
        self.sweep()
        most = self._settings.max_results
        mine = self._settings.max_results_per_key or most
        if len(self) >= most or self._num_by_key[key] >= mine:
            raise BudgetError(
                f"this server keeps {min(most, mine)} results at a time, and all wait to be read: DELETE those that "
                f"you have read, or try again in {self._settings.ttl_s:g} s."
            )
        result = Result(key, names, is_named)
        for name in result.names:
            if (key, name) in self._by_name:
                raise ValueError(f"there are rows of a request {name!r} already: choose another X-Request-Id.")
        self._by_id[result.id] = result
        self._num_by_key[key] += 1
        self._by_name.update({(key, name): result for name in (result.id, *result.names)})
        return result

    def find(self, key: str, name: str) -> Result | None:
        """Return the result that an API key knows by a name."""
        result = self.peek(key, name)
        if result is not None and self._is_over(result):
            self._drop(result)
            return None
        return result

    def peek(self, key: str, name: str) -> Result | None:
        """Return what `find` does, in any thread."""
        return self._by_name.get((key, name))

    def add(self, result: Result, frame: Frame) -> None:
        """Add a frame.

        Raises:
            BudgetError: There is no room.
        """
        if result.has_ended:
            return
        if result.id in self._by_id:
            mine = self._settings.max_bytes_per_key or self._settings.max_bytes
            if (
                self.num_bytes + len(frame) > self._settings.max_bytes
                or self._bytes_by_key[result.key] + len(frame) > mine
            ):
                raise BudgetError(
                    f"this server keeps {min(mine, self._settings.max_bytes)} bytes of rows, and they are in use: "
                    "DELETE results that you have read, or ask for fewer positions or layers."
                )
            self._count(result, len(frame))
        elif not result.has_readers:  # it was deleted: readers under way get the rest, nobody else will
            return
        result.frames.append(frame)
        result.wake()

    def end(self, result: Result, error: str = "") -> None:
        """Say that nothing more comes; with an error, rows that there are fall away."""
        if result.has_ended:
            return
        if error:
            self._count(result, -result.num_bytes)
            result.frames[1:] = []
        result.frames.append(body.encode("error", message=error) if error else body.encode("end"))
        result.has_ended = True
        result.expires = self._now() + self._settings.ttl_s
        if result.id in self._by_id:
            self._ended[result.id] = result
        asyncio.get_running_loop().call_later(self._settings.ttl_s + MARGIN_S, self.sweep)
        result.wake()

    def delete(self, key: str, name: str) -> bool:
        """Let go of a result; return whether there was one."""
        result = self._by_name.get((key, name))
        if result is not None:
            self._drop(result)
        return result is not None

    def sweep(self) -> None:
        """Let go of results whose time is over."""
        while self._ended and self._is_over(first := next(iter(self._ended.values()))):
            self._drop(first)

    def _is_over(self, result: Result) -> bool:
        return result.expires is not None and result.expires <= self._now()

    def _drop(self, result: Result) -> None:
        del self._by_id[result.id]
        self._ended.pop(result.id, None)
        self._num_by_key[result.key] -= 1
        for name in (result.id, *result.names):
            del self._by_name[result.key, name]
        self._count(result, -result.num_bytes)
        self._num_by_key, self._bytes_by_key = +self._num_by_key, +self._bytes_by_key

    def _count(self, result: Result, num_bytes: int) -> None:
        result.num_bytes += num_bytes
        self.num_bytes += num_bytes
        self._bytes_by_key[result.key] += num_bytes

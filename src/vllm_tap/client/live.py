"""A capture that many requests of one event loop share. Client process.

Calls to workers block, so they run in threads of the event loop; a lock orders them. What is cancelled here goes on
there to its end.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import itertools
import threading
import time
from collections.abc import Callable, Collection
from typing import Any, Final, NamedTuple, TypeVar

from vllm_tap.client.bounds import at_the_end, read_budget, room_of
from vllm_tap.client.collector import Collector
from vllm_tap.client.connection import Connection
from vllm_tap.client.recording import Recording
from vllm_tap.client.result import Capture
from vllm_tap.client.room import Room
from vllm_tap.client.tasks import Tasks
from vllm_tap.errors import TapError
from vllm_tap.spec import Spec, takes_generated
from vllm_tap.vllm import asynchronous

T = TypeVar("T")

REST_S: Final = 0.25
"""Seconds for which rows of a request that nobody waits for stay in the workers."""

SHARE: Final = 8
"""Part of the budget that rows which nobody waits for may fill: this one of so many."""

MOST_LATE_S: Final = 0.05
"""Seconds after which the rows of a request that was left are let go of, if nobody has had rows taken by then."""

POLL_S: Final = 0.25
"""Seconds between two tries to begin a capture for which there is no place yet."""


class Request:
    """A request that is captured.

    Attributes:
        params: Its sampling parameters, marked.
    """

    def __init__(self, live: Live, params: Any) -> None:
        self._live = live
        self.sample = live.new_sample()
        self.params = live.recording.mark(params, self.sample)
        self._is_whole = live.spec.needs_end or live.spec.reduce is not None
        self._most_bytes = 0  # of its rows, for which it has taken room
        self._sent = 0  # rows of positions before have been handed out
        self._wanted = asyncio.Event()

    def has_room(self, most_rows: int) -> bool:
        """Tell whether it need not wait for room for so many rows."""
        return self._live.room.has(most_rows * self._live.row_bytes)

    async def begin(self, most_rows: int) -> None:
        """Wait for room for so many rows."""
        nbytes = most_rows * self._live.row_bytes
        await self._live.room.enter(nbytes)
        self._most_bytes = nbytes

    def left(self) -> None:
        """Give the room back: the reader has what came of the request, or none wants it."""
        nbytes, self._most_bytes = self._most_bytes, 0
        if nbytes:
            self._live.room.leave(nbytes)

    @property
    def has_all(self) -> bool:
        """True if all rows have been handed out, or are about to be: those of a prompt are when a token follows it."""
        return self._sent > 0 and not takes_generated(self._live.spec.positions)

    def has_more(self, tokens: asynchronous.Tokens) -> bool:
        """Tell whether `rows` may return some before the request has ended."""
        return not (self.has_all or self._is_whole) and any(one.token_ids for one in tokens.outputs)

    async def rest(self) -> None:
        """Wait until rows are taken for others too, which costs as much as for one; or until somebody wants them."""
        self._live.rest(self._wanted)
        await self._wanted.wait()
        self._wanted.clear()

    def hurry(self) -> None:
        """End the rest of this request, or the next one: somebody waits for its rows."""
        self._wanted.set()

    def is_crowded(self, tokens: asynchronous.Tokens) -> bool:
        """Tell whether the rows of this request, if others have as many, fill too much of the workers' memory."""
        num_rows = len(tokens.prompt_token_ids) + sum(len(one.token_ids) for one in tokens.outputs) - self._sent
        return num_rows * self._live.row_bytes * self._live.num_users * SHARE > self._live.budget_bytes

    async def rows(self, tokens: asynchronous.Tokens) -> Capture | None:
        """Return the rows that are final and have not been returned; None for none. For requests of one completion.

        Raises:
            TapError: What ended the capture early.
        """
        completions = tokens.outputs
        generated = len(completions[0].token_ids) if completions else 0
        end = len(tokens.prompt_token_ids) + generated - 1
        has_all = self.has_all
        if not generated or (not tokens.finished and (self._is_whole or has_all or end <= self._sent)):
            return None
        begin, self._sent = self._sent, end
        result = await self._live.ask(
            lambda collector: collector.rows_until(self.sample, tokens, begin, end), takes=not has_all
        )
        return result if result.num_rows or tokens.finished else None

    async def result(self, output: Any) -> Capture:
        """Return all rows of a request that has ended.

        Raises:
            TapError: What ended the capture early, or rows are missing.
        """
        return await self._live.ask(lambda collector: collector.result(self.sample, output))


class Live:
    """A capture under way, as long as requests use it, and for a while after.

    Args:
        connection: To the workers.
        spec: What is captured.
        options: As `Recording` takes them.
        tasks: Runs what goes on when nobody waits for it.
        after: Captures that are to have ended before this one begins.
        patience_s: Seconds for which it waits for a place where the engine has none left.
    """

    def __init__(
        self,
        connection: Connection,
        spec: Spec,
        options: dict[str, Any],
        tasks: Tasks,
        after: Collection[asyncio.Task[None]] = (),
        patience_s: float = 0.0,
    ) -> None:
        self.spec, self.num_users, self.error = spec, 0, None
        self.idle_since = 0.0
        self._ending: asyncio.TimerHandle | None = None
        self._has_ended = False
        self._connection, self._tasks = connection, tasks
        self._lock = threading.Lock()
        self._wishes: list[_Wish] = []
        self._asking: asyncio.Task[None] | None = None
        self._resting: list[asyncio.Event] = []
        self._numbers = itertools.count()
        on_full = options.get("on_full", "fail")
        self._options = {**options, "on_full": at_the_end(on_full)}
        self.budget_bytes = read_budget(options.get("budget_bytes"))
        self.room = Room(None if on_full == "fail" else room_of(self.budget_bytes, on_full))
        self._dropped: list[int] = []  # samples of which the workers may have rows yet
        self._starting = tasks.run(self._begin(after, patience_s))

    error: BaseException | None
    recording: Recording
    row_bytes: int

    async def _begin(self, after: Collection[asyncio.Task[None]], patience_s: float) -> None:
        if after:
            await asyncio.wait(after)
        end = time.monotonic() + patience_s
        while True:
            try:
                await asyncio.to_thread(self._start)
            except Exception as error:
                if "places" not in getattr(error, "identity", ()) or time.monotonic() > end:
                    self.error = error
                    raise
            else:
                return
            await asyncio.sleep(POLL_S)

    def _start(self) -> None:
        if self._connection.may_change:
            self._connection.greet()
        self.recording = Recording(self._connection, self.spec, **self._options)
        self.row_bytes = self.recording.row_bytes
        self._collector = Collector(self.recording)

    async def started(self) -> None:
        """Wait until the workers have begun.

        Raises:
            TapError: They could not.
        """
        await asyncio.shield(self._starting)

    def use(self) -> None:
        """Take note of one more request."""
        self.num_users += 1
        self.stay()

    def stay(self) -> None:
        """Have nothing end it later."""
        if self._ending is not None:
            self._ending.cancel()
            self._ending = None

    def end_later(self, seconds: float, end: Callable[[Live], None]) -> None:
        """Have it ended when so many seconds have gone by without a request."""
        self.idle_since = time.monotonic()
        self._ending = asyncio.get_running_loop().call_later(seconds, end, self)

    def new_sample(self) -> int:
        """Return a number that no other request has."""
        return next(self._numbers)

    async def ask(self, function: Callable[[Collector], T], *, takes: bool = True) -> T:
        """Have the rows taken that there are now, if they are to be; then return what a function of them returns.

        Requests that ask at the same time share a call to the workers, and a thread.

        Raises:
            TapError: What ended the capture early, or what the function raises.
        """
        wish = _Wish(function, takes, asyncio.get_running_loop().create_future())
        self._wishes.append(wish)
        if self._asking is None or self._asking.done():
            self._asking = self._tasks.run(self._ask())
        answer: T = await wish.answer
        return answer

    def rest(self, ended: asyncio.Event) -> None:
        """Have an event set in a while, which begins with the first who rests: all of them then ask together."""
        if not self._resting:
            asyncio.get_running_loop().call_later(REST_S, self._end_rest)
        self._resting.append(ended)

    def _end_rest(self) -> None:
        resting, self._resting = self._resting, []
        for ended in resting:
            ended.set()

    async def _ask(self) -> None:
        """Answer until nobody asks."""
        while self._wishes:
            wishes, self._wishes = self._wishes, []
            takes = any(wish.takes for wish in wishes)
            dropped: list[int] = []
            if takes:
                dropped, self._dropped = self._dropped, []
            answers = await self.locked(functools.partial(_answers, wishes, takes, dropped))
            for wish, answer in zip(wishes, answers, strict=True):
                if isinstance(answer, _Failed) and answer.ended:
                    self.error = answer.error
                if wish.answer.done():  # whoever asked was cancelled
                    continue
                if isinstance(answer, _Failed):
                    wish.answer.set_exception(answer.error)
                else:
                    wish.answer.set_result(answer)

    async def locked(self, function: Callable[[Collector], T]) -> T:
        """Run a function of the collector in a thread, one at a time, and return what it returns."""

        def run() -> T:
            with self._lock:
                return function(self._collector)

        return await asyncio.shield(self._tasks.run(asyncio.to_thread(run)))

    def drop(self, request: Request) -> None:
        """Let go of a request, wherever it is: with the rows that are taken next, which may be of it."""
        self.recording.forget_marked(request.sample)
        self._dropped.append(request.sample)
        if len(self._dropped) == 1:
            asyncio.get_running_loop().call_later(MOST_LATE_S, self._take_dropped)

    def _take_dropped(self) -> None:
        """Have rows taken where nobody has since; not when the capture ends, and they go with it."""
        if self._dropped and self.error is None and not self._has_ended:
            self._tasks.run(self.ask(lambda collector: None))

    async def close(self) -> None:
        """End the capture."""
        self._has_ended = True
        with contextlib.suppress(TapError):
            await asyncio.shield(self._starting)
            try:
                await self.locked(lambda collector: self.recording.stop())
            finally:
                await self.locked(Collector.close)


class _Wish(NamedTuple):
    """A function of a collector, whether it wants the rows of now, and who waits for the answer."""

    function: Callable[[Collector], Any]
    takes: bool
    answer: asyncio.Future[Any]


class _Failed(NamedTuple):
    """The error of a wish, and whether it ended the capture of all."""

    error: Exception
    ended: bool = False


def _answers(wishes: list[_Wish], takes: bool, dropped: list[int], collector: Collector) -> list[Any]:
    """Answer wishes in a thread, behind one another."""
    failed = None
    try:
        if takes:
            collector.take()
        for sample in dropped:
            collector.drop(sample)
    except Exception as error:
        failed = _Failed(error, isinstance(error, TapError))
    return [failed if failed and wish.takes else _answer(wish, collector) for wish in wishes]


def _answer(wish: _Wish, collector: Collector) -> Any:
    try:
        return wish.function(collector)
    except Exception as error:
        return _Failed(error)

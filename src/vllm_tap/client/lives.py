"""The captures of one event loop in an engine, by their Spec: when each begins and ends. Client process."""

from __future__ import annotations

import asyncio
import contextlib
import sys
import time
from collections.abc import AsyncIterator, Collection, Iterator
from typing import Any

from vllm_tap.client.connection import Connection
from vllm_tap.client.live import Live, Request
from vllm_tap.client.tasks import Tasks
from vllm_tap.errors import SpecError, TapError
from vllm_tap.spec import Spec


class Lives:
    """Captures by their Spec.

    Args:
        connection: To the workers.
        linger_s: Seconds for which a capture stays when its last request has ended: to begin one takes steps' time. It
            ends before that where another needs its place.
        most: Captures up to which some may stay so: the places of an engine that its API processes share.
        engine: Number of the engine, where there are several.
        **options: As `Recording` takes them.

    Attributes:
        num_requests: Under way, captured here.
        failed: When the engine last could not capture a request.
    """

    def __init__(
        self, connection: Connection, *, linger_s: float = 0.0, most: int = sys.maxsize, engine: int = 0, **options: Any
    ) -> None:
        self.connection, self.engine, self._options = connection, engine, options
        self.num_requests = 0
        self.failed = float("-inf")
        self._linger_s, self._most = linger_s, most
        self._by_spec: dict[Spec, Live] = {}
        self._tasks = Tasks()
        self._closing: set[asyncio.Task[None]] = set()

    def __len__(self) -> int:
        """Return how many captures requests use."""
        return sum(spec in self for spec in self._by_spec)

    async def idle(self) -> None:
        """Wait until captures that are to end have ended."""
        await asyncio.shield(asyncio.gather(*self._closing, return_exceptions=True))

    def __contains__(self, spec: object) -> bool:
        """Tell whether requests use a capture of a Spec."""
        live = self._by_spec.get(spec)  # type: ignore[call-overload]
        return live is not None and live.num_users > 0 and live.error is None

    @contextlib.contextmanager
    def counted(self, num_requests: int) -> Iterator[None]:
        """Count requests for the block."""
        self.num_requests += num_requests
        try:
            yield
        finally:
            self.num_requests -= num_requests

    @contextlib.contextmanager
    def blamed(self, but: type[TapError] = SpecError) -> Iterator[None]:
        """Note where the block ends by what is the engine's fault, which errors of the user and some kind are not."""
        try:
            yield
        except (SpecError, but):
            raise
        except TapError:
            self.failed = time.monotonic()
            raise

    @contextlib.asynccontextmanager
    async def request(self, spec: Spec, params: Any) -> AsyncIterator[Request]:
        """Mark a request for the block, beside others of the same Spec. At the end of the block it has ended.

        Raises:
            TapError: It cannot be captured.
        """
        live = self._of(spec)
        live.use()
        request = None
        try:
            with self.counted(1), self.blamed():
                await live.started()
                request = Request(live, params)
                yield request
        finally:
            if request is not None:
                live.drop(request)
            live.num_users -= 1
            if not live.num_users:
                if self._linger_s and live.error is None and len(self._by_spec) <= self._most:
                    live.end_later(self._linger_s, self._end)
                else:
                    self._end(live)

    def _of(self, spec: Spec) -> Live:
        """Return the capture of a Spec, which begins if there is none."""
        live = self._by_spec.get(spec)
        if live is not None and live.error is not None and not live.num_users:
            self._end(live)
        if live is None or live.error is not None:
            after = self._make_place()
            live = Live(self.connection, spec, self._options, self._tasks, after, 2 * self._linger_s)
            self._by_spec[spec] = live
        return live

    def _make_place(self) -> Collection[asyncio.Task[None]]:
        """Have captures end that nobody uses, if their places are needed; return what a new one is to wait for."""
        idle = sorted((one for one in self._by_spec.values() if not one.num_users), key=lambda one: one.idle_since)
        for live in idle[: max(0, len(self._by_spec) + 1 - self._most)]:
            self._end(live)
        return set(self._closing) if len(self._by_spec) + len(self._closing) >= self._most else ()

    def _end(self, live: Live) -> None:
        live.stay()
        if self._by_spec.get(live.spec) is live:
            del self._by_spec[live.spec]
        closing = self._tasks.run(live.close())
        self._closing.add(closing)
        closing.add_done_callback(self._closing.discard)

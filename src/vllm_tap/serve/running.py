"""A captured prompt while it runs: its rows go into the reply as they come. In an API process's event loop."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Iterator
from typing import Any

from vllm_tap.client.tasks import Tasks
from vllm_tap.errors import TapError
from vllm_tap.serve.metrics import Metrics
from vllm_tap.serve.reply import ABORTED, Replies
from vllm_tap.vllm.asynchronous import Tokens, is_delta

logger = logging.getLogger("vllm_tap")


class Running:
    """A prompt of a reply, from its request to its end.

    Args:
        reply: Of the HTTP request.
        params: Sampling parameters.
        metrics: Count what becomes of it.
        tasks: Run what goes on beside the tokens.

    Attributes:
        error: Sentence on what keeps its rows from the client.
    """

    def __init__(self, reply: Replies, params: Any, metrics: Metrics, tasks: Tasks) -> None:
        self._reply, self._metrics, self._tasks = reply, metrics, tasks
        self._number = reply.expect()
        self._tokens = Tokens(is_delta(params))
        self._is_one = (params.n or 1) == 1
        self._taking: asyncio.Task[None] | None = None
        self._has_begun = self._has_ended = self._has_all = self._has_left = False
        self.error = ""

    def begin(self) -> None:
        """Count a capture that has begun."""
        self._has_begun = True
        self._metrics.requests.inc()

    @contextlib.contextmanager
    def stall(self) -> Iterator[None]:
        """Count a wait for room in the workers."""
        self._metrics.stalls.inc()
        begin = time.monotonic()
        try:
            yield
        finally:
            self._metrics.stalled_seconds.inc(time.monotonic() - begin)

    async def take(self, request: Any, output: Any) -> None:
        """Take an output, and the rows that there are; the last one gets the handle of the reply.

        Tokens wait for no rows but the last.
        """
        self._tokens.add(output)
        if not output.finished:
            self._take_along(request)
            return
        if self._taking is not None:
            request.hurry()
            await asyncio.shield(self._taking)
        if not (self.error or self._has_all):
            await self._take(request, self._tokens)
        self._has_ended = True
        self.error = self._reply.end(self._number, self._tokens, self.error)
        (self._metrics.failures if self.error else self._metrics.completed).inc()
        output.kv_transfer_params = {**(output.kv_transfer_params or {}), **self._reply.fields}

    def _take_along(self, request: Any) -> None:
        """Have rows taken while tokens come: now and then, or now where somebody reads them or they are many."""
        if self._taking is None:
            if not self._is_one or not request.has_more(self._tokens):
                return
            self._taking = self._tasks.run(self._take_rest_by_rest(request))
        if self._reply.has_readers or request.is_crowded(self._tokens):
            request.hurry()

    async def _take_rest_by_rest(self, request: Any) -> None:
        while not (self.error or self._has_all or self._has_left):
            await request.rest()
            if not self._has_left:
                await self._take(request, self._tokens.copy())

    async def _take(self, request: Any, tokens: Tokens) -> None:
        """Put rows that there are into the reply, or keep what kept them from it."""
        try:
            captured = await (request.rows(tokens) if self._is_one else request.result(tokens))
            if captured is None or self._has_left:
                return
            request.left()
            self._has_all = tokens.finished or request.has_all
            num_rows, num_bytes = await self._reply.add(self._number, captured, self._has_all)
            self._metrics.rows.inc(num_rows)
            self._metrics.bytes.inc(num_bytes)
        except TapError as error:
            self.error = self.error or str(error)
        except Exception as error:
            logger.exception("vllm-tap: rows of a request were lost")
            self.error = self.error or f"unexpected {type(error).__name__}: {error}"

    def leave(self) -> None:
        """End what has not ended: the client left, or the request failed."""
        self._has_left = True
        if not self._has_ended:
            self._reply.end(self._number, self._tokens, self.error or ABORTED)
            self._metrics.aborts.inc(self._has_begun)

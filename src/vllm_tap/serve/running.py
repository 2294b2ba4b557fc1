"""A captured prompt while it runs: its rows go into the reply as they come. In an API process's event loop."""

from __future__ import annotations

from typing import Any

from vllm_tap.errors import TapError
from vllm_tap.serve.metrics import Metrics
from vllm_tap.serve.reply import ABORTED, Replies
from vllm_tap.vllm.asynchronous import Tokens, is_delta


class Running:
    """A prompt of a reply, from its request to its end.

    Args:
        reply: Of the HTTP request.
        params: Sampling parameters.
        metrics: Count what becomes of it.

    Attributes:
        error: Sentence on what keeps its rows from the client.
    """

    def __init__(self, reply: Replies, params: Any, metrics: Metrics) -> None:
        self._reply, self._metrics = reply, metrics
        self._number = reply.expect()
        self._tokens = Tokens(is_delta(params))
        self._is_one = (params.n or 1) == 1
        self._has_begun = self._has_ended = False
        self.error = ""

    def begin(self) -> None:
        """Count a capture that has begun."""
        self._has_begun = True
        self._metrics.requests.inc()

    async def take(self, request: Any, output: Any) -> None:
        """Take an output, and the rows that there are; the last one gets the handle of the reply."""
        self._tokens.add(output)
        if not self.error:
            self.error = await self._take(request)
        if output.finished:
            self._has_ended = True
            self.error = self._reply.end(self._number, self._tokens, self.error)
            (self._metrics.failures if self.error else self._metrics.completed).inc()
            output.kv_transfer_params = {**(output.kv_transfer_params or {}), **self._reply.fields}

    async def _take(self, request: Any) -> str:
        """Put rows that there are into the reply; return what kept them from it."""
        try:
            captured = None
            if not self._is_one:
                captured = await request.result(self._tokens) if self._tokens.finished else None
            elif self._reply.has_readers or request.is_due(self._tokens):
                captured = await request.rows(self._tokens)
            if captured is not None:
                await request.left()
                num_rows, num_bytes = await self._reply.add(self._number, captured, self._tokens.finished)
                self._metrics.rows.inc(num_rows)
                self._metrics.bytes.inc(num_bytes)
        except TapError as error:
            return str(error)
        return ""

    def leave(self) -> None:
        """End what has not ended: the client left, or the request failed."""
        if not self._has_ended:
            self._reply.end(self._number, self._tokens, self.error or ABORTED)
            self._metrics.aborts.inc(self._has_begun)

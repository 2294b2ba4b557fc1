"""The worker calls of the former interface: take the rows of every request while enabled, hand them over as bytes.

Runs in the worker process. `get_...` returns `{layer: entry}` with each row once: requests one after another in the
order in which they were first scheduled, positions ascending, whatever the scheduler did with them. A step that ran
beyond a stop token (asynchronous scheduling) leaves a row past the end: the worker does not know the end, clients do.

Tensor-parallel ranks hold the same rows, so the first rank of each pipeline stage returns its layers and the others
return nothing: without pipeline stages the first reply has all layers.

A method must not raise: vLLM stops at the first failed reply and leaves the others in their queues, where the next call
finds them. A failure is the reply `{"error": "Name: message"}`, of the call that failed and of the `get_...` after it.
"""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable, Iterable
from typing import Any, Final, TypeVar

from vllm_tap.engine.legacy.rows import AllRequestsSession, Met, Ordered, Part, read_part
from vllm_tap.engine.model.residual import SUM, WHOLE
from vllm_tap.engine.model.stack import dtype_name
from vllm_tap.engine.worker import TapWorker
from vllm_tap.errors import CaptureError, EngineUnsupportedError, TapError
from vllm_tap.frame import messages
from vllm_tap.frame.layout import Stream
from vllm_tap.transport.segment.pool import SegmentPool

logger = logging.getLogger("vllm_tap")

MAX_BUDGET_BYTES: Final = 8 << 30
NAME: Final = "by worker calls"
OWNER: Final = (NAME,)
"""Of the memory for the rows; no client's number and no capture's name is the same."""

HIDDEN: Final = "hidden_states"
ROUTER: Final = "router_logits"

Call = TypeVar("Call", bound=Callable[..., Any])


def _telling(function: Call) -> Call:
    """Turn a method into one that returns what went wrong."""

    @functools.wraps(function)
    def call(self: LegacyCalls, *args: Any) -> Any:
        try:
            return function(self, *args)
        except TapError as error:
            return {"error": f"{type(error).__name__}: {error}"}
        except Exception as error:
            logger.exception("vllm-tap: %s failed", function.__name__)
            return {"error": f"CaptureError: unexpected {type(error).__name__}: {error}"}

    return call  # type: ignore[return-value]


class Taken:
    """Rows that have been taken of one stream, and since when.

    Attributes:
        enabled: Whether rows are taken now.
        since: Requests numbered from here on must have rows from their first position.
        parts: What earlier sessions took.
        error: What ended one of them early.
    """

    def __init__(self) -> None:
        self.enabled = False
        self.since = 0
        self.parts: list[Part] = []
        self.error: TapError | None = None


class LegacyCalls:
    """The calls of the former interface, answered with one more capture of a worker beside those of clients.

    While a stream is enabled, an `AllRequestsSession` is under way. When what is enabled changes, the next one begins;
    the parts are put together when they are asked for.
    """

    def __init__(self, worker: TapWorker) -> None:
        self._worker = worker
        self._streams_taken = {HIDDEN: Taken(), ROUTER: Taken()}
        self._every: AllRequestsSession | None = None
        self._known: dict[str, Met] = {}
        self._own_pool: SegmentPool | None = None
        self._is_guess = False

    # ---------------------------------------------------------------------------------------------------- the calls

    @_telling
    def enable_hidden_states_capture(self) -> None:
        """Take hidden states from now on."""
        self._enable(HIDDEN)

    @_telling
    def disable_hidden_states_capture(self) -> None:
        """Take no more hidden states; those that were taken stay until they are cleared."""
        self._disable(HIDDEN)

    @_telling
    def get_captured_hidden_states(self) -> dict[int, dict[str, Any]]:
        """Return the hidden states that were taken, by layer; they stay until they are cleared."""
        return self._payload(HIDDEN)

    @_telling
    def clear_hidden_states(self) -> None:
        """Forget the hidden states that were taken."""
        self._clear(HIDDEN)

    @_telling
    def get_hidden_states_debug_info(self) -> dict[str, Any]:
        """Say what has been taken, in plain values."""
        return self._info(HIDDEN)

    @_telling
    def enable_moe_router_logits_capture(self) -> None:
        """Take router logits from now on."""
        self._enable(ROUTER)

    @_telling
    def disable_moe_router_logits_capture(self) -> None:
        """Take no more router logits; those that were taken stay until they are cleared."""
        self._disable(ROUTER)

    @_telling
    def get_moe_router_logits(self) -> dict[int, dict[str, Any]]:
        """Return the router logits that were taken, by layer; they stay until they are cleared."""
        return self._payload(ROUTER)

    @_telling
    def clear_moe_router_logits(self) -> None:
        """Forget the router logits that were taken."""
        self._clear(ROUTER)

    @_telling
    def get_moe_debug_info(self) -> dict[str, Any]:
        """Say what has been taken, in plain values."""
        return self._info(ROUTER)

    # -------------------------------------------------------------------------------------------------- what they do

    def _enable(self, stream: str) -> None:
        taken = self._streams_taken[stream]
        if taken.enabled:
            return
        try:
            self._check(stream)
        except TapError as error:
            taken.error = error
            raise
        self._end_session()
        taken.enabled, taken.since = True, len(self._known)
        self._begin_session()

    def _disable(self, stream: str) -> None:
        self._end_session()
        self._streams_taken[stream].enabled = False
        self._begin_session()

    def _clear(self, stream: str) -> None:
        self._end_session()
        taken = self._streams_taken[stream]
        dropped, taken.parts = taken.parts, []
        taken.error, taken.since = None, len(self._known)
        self._release_unless_used(dropped)
        self._begin_session()

    def _payload(self, stream: str) -> dict[int, dict[str, Any]]:
        taken = self._streams_taken[stream]
        self._end_session()
        self._begin_session()
        if taken.error is not None:
            raise taken.error
        if not taken.parts:
            return {}
        ordered = Ordered(taken.parts, stream, self._known, taken.since)
        return {layer: ordered.entry(layer) for layer in ordered.layers}

    def _info(self, stream: str) -> dict[str, Any]:
        taken = self._streams_taken[stream]
        sessions = [part.session for part in taken.parts]
        if self._every is not None and taken.enabled:
            sessions.append(self._every)
        layers = sorted({layer for s in sessions for st in s.streams if st.name == stream for layer in st.layers})
        return {
            "capture_enabled": taken.enabled,
            "num_rows": sum(session.num_rows for session in sessions),
            "num_requests": len({request_id for session in sessions for request_id in session.request_ids}),
            "num_layers": len(layers),
            "layer_ids": layers,
            "error": str(taken.error or ""),
        }

    # ------------------------------------------------------------------------------------------------------ sessions

    def _check(self, stream: str) -> None:
        """Refuse hidden states where it is not known, or cannot be seen later, what a layer returns."""
        verdict = self._worker.ready_taps().residual()
        if stream != HIDDEN or verdict.convention or verdict.wants_rows:
            return
        raise EngineUnsupportedError(
            f"hidden_states cannot be captured from this model: {verdict.reason}"
            if verdict.reason
            else "worker calls cannot take hidden_states from an engine with pipeline stages: use vllm_tap.capture"
        )

    def _begin_session(self) -> None:
        if not any(taken.parts for taken in self._streams_taken.values()):
            self._known = {}  # a server meets requests for ever; those that run are met again, as not new
            for taken in self._streams_taken.values():
                taken.since = 0
        streams = tuple(self._wanted())
        if not streams:
            return
        start = messages.Start(
            capture_id=NAME,
            streams={stream.name: stream.layers for stream in streams},
            positions="all",
            residual=self._convention(),
            shared=False,
            clients={},
            budget_bytes=_budget_bytes(),
            staging="auto",
            expected_rows=0,
        )
        self._pool_of_rows()
        begin = functools.partial(AllRequestsSession, known=self._known)
        self._every = self._worker.begin(start, streams, OWNER, begin)

    def _wanted(self) -> Iterable[Stream]:
        if not self._worker.is_first_rank():
            return
        for name, taken in self._streams_taken.items():
            places = self._worker.ready_taps().by_place.items()
            held = [tap for (stream, _), tap in places if stream == name and tap.width]
            if taken.enabled and held:
                yield Stream(name, dtype_name(held[0]), held[0].width, tuple(tap.layer for tap in held))

    def _convention(self) -> str:
        """Say what the layers return; where only padding has been seen, the next rows will show."""
        verdict = self._worker.ready_taps().residual()
        self._is_guess = verdict.wants_rows
        return verdict.convention

    def _end_session(self) -> None:
        """Keep what the session under way has taken, and what went wrong with it."""
        session = self._every
        if session is None:
            return
        self._every = None
        taken = [self._streams_taken[stream.name] for stream in session.streams]
        part = None
        try:
            part = read_part(session, self._pool_of_rows())
        except Exception as error:
            for stream in taken:
                stream.error = (
                    error if isinstance(error, TapError) else CaptureError(f"{type(error).__name__}: {error}")
                )
        finally:
            self._worker.end(session, OWNER)
        if part is None or not len(part.numbers):
            session.release()
            return
        for stream in taken:
            stream.parts.append(part)
        if self._is_guess and self._streams_taken[HIDDEN] in taken:
            self._check_guess()

    def _check_guess(self) -> None:
        verdict = self._worker.ready_taps().residual()
        if verdict.convention == SUM or (verdict.convention == WHOLE and not verdict.has_residual):
            return
        self._streams_taken[HIDDEN].error = CaptureError(
            "it was not known yet what the layers of this model return: call vllm_tap.capture once, then enable again"
        )

    def _release_unless_used(self, parts: Iterable[Part]) -> None:
        used = {part.session for taken in self._streams_taken.values() for part in taken.parts}
        for session in {part.session for part in parts} - used:
            session.release()
        if not used:
            self._pool_of_rows().trim()

    def _pool_of_rows(self) -> SegmentPool:
        if self._own_pool is None:
            self._own_pool = self._worker.new_memory(OWNER)
        return self._own_pool


def _budget_bytes() -> int:
    """Return a quarter of this machine's RAM, at most 8 GiB, as captures have by default."""
    return min(MAX_BUDGET_BYTES, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 4)

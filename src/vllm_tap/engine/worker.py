"""The tap of one worker: what clients reach through `collective_rpc`, and what the runner reports to.

Runs in the worker process. Calls take and return bytes or plain values, so that vLLM's secure serialisation carries
them, and never raise: a failure is a reply.
"""

from __future__ import annotations

import functools
import logging
import os
import weakref
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Final

import torch
from msgspec import structs

from vllm_tap.engine.capture.closing import Closable, close_all, weakly
from vllm_tap.engine.capture.cpu import CpuBackend
from vllm_tap.engine.capture.idle import PoolKeeper
from vllm_tap.engine.capture.interfaces import Backend, Sink
from vllm_tap.engine.capture.look import some_rows
from vllm_tap.engine.capture.profile import DMA, FORWARD, HOST, Figures, ForwardProfile, Profile
from vllm_tap.engine.capture.session import Session
from vllm_tap.engine.model.install import ModelTaps
from vllm_tap.engine.model.residual import MODES, NO_ROWS, UNKNOWN
from vllm_tap.engine.model.stack import by_shape
from vllm_tap.engine.model.tap import ADD, PROBE_ROWS
from vllm_tap.errors import CaptureError, TapError
from vllm_tap.frame import messages
from vllm_tap.frame.layout import Stream, block_bytes
from vllm_tap.frame.routing import Routing
from vllm_tap.labels import Mark
from vllm_tap.streams import ROUTER_STREAMS, SOURCES
from vllm_tap.transport.calls import CallServer
from vllm_tap.transport.segment.pool import SegmentPool
from vllm_tap.transport.segment.server import SegmentServer
from vllm_tap.vllm import facts
from vllm_tap.vllm import model as vllm_model
from vllm_tap.vllm import runner as vllm_runner
from vllm_tap.vllm.runner import Batch

logger = logging.getLogger("vllm_tap")

PATIENCE_SECONDS: Final = 1.0
"""Seconds that a step with requests of an unknown capture waits for calls that have come and are not handled."""

SLACK: Final = 16
"""One part in so many is prepared beyond what is expected: for what blocks leave unused at the ends of segments."""


def _replying(function: Callable[..., messages.Message]) -> Callable[..., bytes]:
    """Turn a method into one that replies in bytes, also when it fails."""

    @functools.wraps(function)
    def call(self: TapWorker, *args: Any) -> bytes:
        try:
            reply = function(self, *args)
        except TapError as error:
            reply = messages.Failure(
                rank=self.rank, error=type(error).__name__, message=str(error), identity=error.identity
            )
        except Exception as error:
            logger.exception("vllm-tap: %s failed", function.__name__)
            reply = messages.Failure(
                rank=self.rank, error="CaptureError", message=f"unexpected {type(error).__name__}: {error}"
            )
        return messages.encode(reply)

    return call


class TapWorker(vllm_runner.Recorder):
    """The taps of a worker's model, its pools of segments, and the capture under way, if any."""

    def __init__(self, worker: Any) -> None:
        super().__init__()
        self._worker = worker
        self.rank: int = worker.rank
        self.refusal = ""
        self._backend: Backend | None = None
        self._taps: ModelTaps | None = None
        self._session: Session | None = None
        self._counts = 0, 0
        self._pools: dict[bool, SegmentPool] = {}
        self._every_pool: list[SegmentPool] = []
        self._keeper: PoolKeeper | None = None
        self._server: SegmentServer | None = None
        self._calls: CallServer | None = None
        self._profile: Profile | None = None
        self._closing: list[Closable] = []

    @classmethod
    def install(cls, worker: Any) -> TapWorker:
        """Put taps into the model that a worker has just loaded; if they do not fit, keep the reason."""
        self = cls(worker)
        try:
            model = vllm_model.find_model(worker)
            self._backend = choose_backend(worker, self.lock)
            self._keeper = PoolKeeper(self._every_pool, self._backend.is_quiet)
            # In a process that outlives the engine; the end of a process does the same faster.
            weakref.finalize(self, close_all, self._closing, self._backend).atexit = False
            self._taps = ModelTaps(model, worker.device, self._backend.rows)
            vllm_runner.watch_runner(worker.model_runner, self)
        except Exception as error:
            self.refusal = str(error) if isinstance(error, TapError) else f"{type(error).__name__}: {error}"
            logger.warning("vllm-tap cannot capture from this engine, plain generation goes on: %s", self.refusal)
        return self

    @property
    def taps(self) -> ModelTaps | None:
        """The taps of the model; None if they do not fit."""
        return self._taps

    # ------------------------------------------------------------------------------------------ the runner's reports

    def expect(self, marks: Sequence[Mark]) -> None:
        # A client sends the start of a capture before its requests, and need not have waited for it to be handled.
        session = self._session
        known = session.start.capture_id if session is not None else ""
        if self._calls is not None and any(mark.capture_id != known for mark in marks):
            self._calls.settle(PATIENCE_SECONDS)

    def meet(self, request_id: str, mark: Mark, prompt_len: int, generates: bool) -> None:
        if self._session is not None:
            self._session.meet(request_id, mark, prompt_len, generates)

    def ended(self, request_ids: Iterable[str]) -> None:
        if self._session is not None:
            self._session.forget(request_ids)

    def arm(self, batch: Batch) -> None:
        if self._session is not None:
            if self._session.is_new:
                self._note_routers(self._session)
            self._session.arm(batch)

    def drain(self) -> None:
        if self._session is not None:
            self._session.drain()
        if self._taps is not None:
            self._taps.end_pass()

    def sampled(self) -> None:
        if self._session is not None:
            self._session.send()

    def rest(self) -> None:
        if self._session is not None:
            self._session.rest()

    def disarm(self) -> None:
        if self._taps is not None:
            self._taps.rows.clear()
            self._taps.end_pass()

    def _note_routers(self, session: Session) -> None:
        """Before the first step of a capture, when the weights are those that it runs with."""
        session.is_new = False
        try:
            assert self._taps is not None
            session.biases = self._taps.routers.biases()
        except Exception as error:
            session.fail(error)

    # ----------------------------------------------------------------------------------------------- what clients call

    @_replying
    def open(self) -> messages.Hello:
        """Say what can be captured here."""
        refusal, taps, worker = self.refusal, self._taps, self._worker
        if self._backend is not None:
            self._backend.note_stream()
        verdict, reasons, routing = UNKNOWN, dict[str, str](), dict[int, Routing]()
        streams: tuple[messages.StreamInfo, ...] = ()
        if taps is not None and not refusal:
            self._pass_dummy_rows(taps)
            refusal = self._backend.refusal if self._backend else ""
            verdict, reasons, routing = taps.residual(), taps.reasons(), taps.routing()
            streams = tuple(self._streams(taps, verdict.convention, reasons))
        rank = vllm_runner.read_rank(worker)
        wants_rows = verdict.wants_rows or any(found.reason == NO_ROWS for found in routing.values())
        return messages.Hello(
            rank=rank,
            pid=os.getpid(),
            engine=facts.vllm_version(),
            runner=vllm_runner.runner_name(worker.model_runner),
            device=worker.device.type,
            num_layers=taps.num_layers if taps else 0,
            streams=streams,
            residual=verdict.convention,
            reasons=reasons,
            routing=self._share_of(routing),
            routing_version=taps.routers.version if taps else 0,
            wants_rows=self._eager_rows() if wants_rows else 0,
            may_change=wants_rows or bool(streams and taps and taps.may_change),
            address="" if refusal else self._shared_server().address,
            calls="" if refusal else self._call_server().address,
            refusal=refusal,
        )

    def _pass_dummy_rows(self, taps: ModelTaps) -> None:
        """Have the taps learn shapes, if they have seen nothing yet.

        Not in data parallel engines, which run in step: a forward pass of one alone waits for the others. There, and
        where dummy rows tell nothing, the client sends a request.
        """
        if not taps.seen and not vllm_runner.runs_in_step(self._worker):
            vllm_runner.run_dummy(self._worker.model_runner)

    def _eager_rows(self) -> int:
        """Return of how many tokens a step is that replays no CUDA graph, in which taps learn nothing."""
        graph_rows = vllm_runner.graph_rows(self._worker) if self._worker.device.type == "cuda" else 0
        return max(graph_rows + 1, PROBE_ROWS)

    def _streams(self, taps: ModelTaps, residual: str, reasons: dict[str, str]) -> Iterable[messages.StreamInfo]:
        places = {place: tap for place, tap in taps.by_place.items() if tap.width and place[0] not in reasons}
        for (stream, dtype, width), numbers in by_shape(places).items():
            source = residual if stream == "hidden_states" else SOURCES[stream]
            yield messages.StreamInfo(stream, dtype, width, tuple(numbers), source)

    def call(self, data: bytes) -> bytes:
        """Do what a message asks for, in the engine's thread or that of a socket; return the reply."""
        with self.lock, self._backend.on_stream() if self._backend else nullcontext():
            return self._answer(data)

    @_replying
    def _answer(self, data: bytes) -> messages.Message:
        message = messages.decode_call(data)
        if isinstance(message, messages.Start):
            return self.start(message)
        if isinstance(message, messages.Take):
            return self.take(message)
        return self.finish(message) if isinstance(message, messages.Finish) else self.stop(message)

    def start(self, start: messages.Start) -> messages.Started:
        """Begin a capture: take what memory it needs and let marked requests through."""
        if self._session is not None:
            raise CaptureError(
                f"capture {self._session.start.capture_id} is under way: an engine serves one capture at a time. "
                "Wait for it to end, or stop the Recording that it is of."
            )
        if start.shared and not self._shared_server().is_connected(start.clients.get(self.rank, 0)):
            raise CaptureError(f"rank {self.rank}: the client of capture {start.capture_id} is not connected any more.")
        assert self._keeper is not None
        self._keeper.keep()
        try:
            self._session = self._new_session(start)
        except Exception:
            self._keeper.linger()
            raise
        self._closing.append(self._session)
        # Last: the driver may let nobody else in while it pins memory.
        self._grow_ahead(self._session)
        return messages.Started(rank=self.rank, streams=self._session.streams)

    def _new_session(self, start: messages.Start) -> Session:
        assert self._taps is not None
        streams = tuple(self._share(start))
        for (stream, _), place in self._taps.by_place.items():
            place.mode = MODES.get(start.residual, ADD) if stream == "hidden_states" else ADD
        pool = self._pool(start.shared)
        pool.budget_bytes = start.budget_bytes
        sink = self._sink(start, streams, pool)
        return Session(start, self.rank, streams, sink, pool, self._taps.rows)

    def _grow_ahead(self, session: Session) -> None:
        """Have memory for all rows that are expected prepared in the background."""
        start, streams = session.start, session.streams
        expected = block_bytes(start.expected_rows, streams)
        largest = block_bytes(min(start.expected_rows, vllm_runner.max_rows(self._worker)), streams)
        self._pool(start.shared).grow_ahead(expected + expected // SLACK, largest)

    def _sink(self, start: messages.Start, streams: tuple[Stream, ...], pool: SegmentPool) -> Sink:
        assert self._taps is not None
        assert self._backend is not None
        return self._backend.new_sink(streams, self._taps.by_place, pool, start.staging)

    def _share(self, start: messages.Start) -> Iterable[Stream]:
        """Choose the layers that this rank ships: tensor-parallel ranks hold the same rows and share the layers out."""
        assert self._taps is not None
        rank = vllm_runner.read_rank(self._worker)
        mine = {
            (stream, layer): tap
            for (stream, layer), tap in self._taps.by_place.items()
            if layer in start.streams.get(stream, ()) and layer % rank.tp_size == rank.tp_rank
        }
        for (stream, dtype, width), layers in by_shape(mine).items():
            yield Stream(stream, dtype, width, tuple(layers))

    def finish(self, finish: messages.Finish) -> messages.Descriptor:
        """End a capture and hand its blocks over."""
        session = self._require(finish.capture_id)
        try:
            descriptor = self._with_routing(session, session.finish())
            if session.start.shared:
                self._shared_server().publish(session.client, session.block_ids)
        except Exception:
            self._abandon(session)
            raise
        self._close(session)
        return descriptor

    def take(self, take: messages.Take) -> messages.Descriptor:
        """Hand over what a capture has taken since the last time; it goes on."""
        session = self._require(take.capture_id)
        try:
            block_ids = session.block_ids
            descriptor = self._with_routing(session, session.take())
            if session.start.shared:
                self._shared_server().publish(session.client, block_ids)
        except Exception:
            self._abandon(session)
            raise
        return descriptor

    def _with_routing(self, session: Session, descriptor: messages.Descriptor) -> messages.Descriptor:
        """Add how routers choose, as it holds for the rows of a capture, unless the client knows it."""
        assert self._taps is not None
        pool = self._pool(session.start.shared)

        def rows_of(layer: int) -> list[torch.Tensor]:
            return some_rows(descriptor, lambda number: pool.segment(number).view, layer, ROUTER_STREAMS)

        version, routing = self._taps.routers.check(session.biases, rows_of)
        if version == session.start.routing_versions.get(self.rank):
            return descriptor
        return structs.replace(descriptor, routing_version=version, routing=self._share_of(routing))

    def _share_of(self, routing: dict[int, Routing]) -> dict[int, Routing]:
        """Return what this rank says: tensor-parallel ranks share the layers out as they do their rows."""
        rank = vllm_runner.read_rank(self._worker)
        return {layer: found for layer, found in routing.items() if layer % rank.tp_size == rank.tp_rank}

    def stop(self, stop: messages.Stop) -> messages.Stopped:
        """Abandon a capture, if it is the one under way."""
        if self._session is not None and self._session.start.capture_id == stop.capture_id:
            self._abandon(self._session)
        return messages.Stopped(rank=self.rank)

    def fetch(self, rank: int, segment_id: int, offset: int, nbytes: int) -> bytes:
        """Return bytes of an inline block; nothing if it is that of another rank, or there is none."""
        if rank != self.rank:
            return b""
        try:
            return bytes(self._pool(False).segment(segment_id).view[offset : offset + nbytes])
        except TapError:
            logger.exception("vllm-tap: fetch failed")
            return b""

    @_replying
    def release(self, rank: int, block_ids: list[int]) -> messages.Stopped:
        """Free inline blocks."""
        for block_id in block_ids if rank == self.rank else ():
            self._pool(False).release(block_id)
        return messages.Stopped(rank=self.rank)

    def status(self) -> dict[str, int | str]:
        """Say what this worker holds, in plain values.

        Rows and their bytes are those of the capture under way, or of the last one that ended.
        """
        stats = [pool.stats() for pool in self._every_pool]
        num_rows, num_bytes = (self._session.num_rows, self._session.num_bytes) if self._session else self._counts
        return {
            "rank": self.rank,
            "pid": os.getpid(),
            "capture_id": self._session.start.capture_id if self._session else "",
            "num_rows": num_rows,
            "num_bytes": num_bytes,
            "capacity_bytes": sum(s.capacity_bytes for s in stats),
            "used_bytes": sum(s.used_bytes for s in stats),
            "num_graph_nodes": self._taps.rows.num_graph_nodes if self._taps else 0,
            "staging_bytes": self._taps.rows.staging_bytes if self._taps else 0,
            "num_blocks": sum(s.num_blocks for s in stats),
            "is_preparing": self._taps.rows.is_preparing if self._taps else False,
        }

    def profile(self, kind: str) -> Figures:
        """Begin to time parts of this worker: "host" for its methods in seconds, "dma" for copies of a CUDA engine.

        "forward" says when forward passes are launched and run; see `profile`.

        Returns:
            What the profile that was on until now has collected: {label: figures}. Any other `kind` only ends it.
        """
        figures = self._profile.stop() if self._profile else {}
        self._profile = self._host_profile() if kind == HOST else None
        if kind == DMA and self._backend is not None:
            self._profile = self._backend.copy_profile()
        if kind == FORWARD:
            self._profile = ForwardProfile(self, self._worker.device.type == "cuda")
        return figures

    def _host_profile(self) -> Profile:
        profile = Profile()
        for name in ("start", "finish", "arm", "drain", "sampled", "rest"):
            profile.watch(self, name)
        profile.watch(self, "_sink", "start: sink")
        profile.watch(Session, "finish", "finish: settle")
        profile.watch(Session, "close", "finish: close")
        if self._backend is not None:
            self._backend.watch(profile)
        return profile

    # ------------------------------------------------------------------------------------------------------- the rest

    def _require(self, capture_id: str) -> Session:
        if self._session is None or self._session.start.capture_id != capture_id:
            raise CaptureError(f"capture {capture_id} is not under way here: it was ended or never started")
        return self._session

    def _close(self, session: Session) -> None:
        self._session = None
        self._counts = session.num_rows, session.num_bytes
        if session in self._closing:
            self._closing.remove(session)
        assert self._keeper is not None
        self._keeper.linger()
        session.close()

    def _abandon(self, session: Session) -> None:
        self._close(session)
        pool = self._pool(session.start.shared)
        for block_id in session.block_ids:
            pool.release(block_id)

    def _pool(self, shared: bool) -> SegmentPool:
        if shared not in self._pools:
            self._pools[shared] = self._new_pool(shared)
        return self._pools[shared]

    def _new_pool(self, shared: bool) -> SegmentPool:
        assert self._backend is not None
        pool = self._backend.new_pool(shared)
        self._every_pool.append(pool)
        self._closing.append(pool)
        return pool

    def _shared_server(self) -> SegmentServer:
        if self._server is None:
            self._server = SegmentServer(self._pool(True))
            self._server.on_disconnect = weakly(self._client_gone)
            self._closing.append(self._server)
        return self._server

    def _client_gone(self, client: int) -> None:
        assert self._backend is not None
        with self.lock, self._backend.on_stream():
            session = self._session
            if session is not None and session.start.shared and session.client == client:
                self._abandon(session)

    def _call_server(self) -> CallServer:
        if self._calls is None:
            self._calls = CallServer(weakly(self.call))
            self._closing.append(self._calls)
        return self._calls


def choose_backend(worker: Any, step_lock: AbstractContextManager[Any]) -> Backend:
    """Return the backend of a worker whose model has been loaded; the lock is held during each of its steps."""
    if worker.device.type != "cuda":
        return CpuBackend()
    from vllm_tap.engine.cuda.backend import DeviceBackend

    return DeviceBackend(worker, step_lock)

"""The tap of one worker: what clients reach through `collective_rpc`, and what the runner reports to.

Runs in the worker process. Calls take and return bytes or plain values, so that vLLM's secure serialisation carries
them, and never raise: a failure is a reply.
"""

from __future__ import annotations

import functools
import itertools
import logging
import os
import weakref
from collections.abc import Callable, Hashable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Final, TypeVar

import torch
from msgspec import structs

from vllm_tap.engine.capture.closing import Closable, close_all, weakly
from vllm_tap.engine.capture.cpu import CpuBackend
from vllm_tap.engine.capture.interfaces import Backend, Sink
from vllm_tap.engine.capture.look import some_rows
from vllm_tap.engine.capture.memory import Pools
from vllm_tap.engine.capture.profile import DMA, FORWARD, HOST, Figures, ForwardProfile, Profile
from vllm_tap.engine.capture.session import Session
from vllm_tap.engine.model.install import ModelTaps
from vllm_tap.engine.model.residual import MODES, NO_ROWS, UNKNOWN
from vllm_tap.engine.model.stack import by_shape
from vllm_tap.engine.model.tap import ADD, PROBE_ROWS
from vllm_tap.errors import CaptureError, EngineUnsupportedError, TapError
from vllm_tap.frame import messages
from vllm_tap.frame.layout import Stream, block_bytes
from vllm_tap.frame.routing import Routing
from vllm_tap.labels import Mark
from vllm_tap.streams import ROUTER_STREAMS
from vllm_tap.transport.calls import CallServer
from vllm_tap.transport.segment.pool import SegmentPool
from vllm_tap.transport.segment.server import SegmentServer
from vllm_tap.transport.tcp import settings
from vllm_tap.transport.tcp.address import host_id
from vllm_tap.transport.tcp.server import NetworkServer
from vllm_tap.vllm import facts
from vllm_tap.vllm import model as vllm_model
from vllm_tap.vllm import runner as vllm_runner
from vllm_tap.vllm.runner import Batch

logger = logging.getLogger("vllm_tap")

PATIENCE_SECONDS: Final = 1.0
"""Seconds that a step with requests of an unknown capture waits for calls that have come and are not handled."""

MOST_COUNTED: Final = 256
"""Captures that have ended whose rows are still known to `status`."""

SLACK: Final = 16
"""One part in so many is prepared beyond what is expected: for what blocks leave unused at the ends of segments."""


S = TypeVar("S", bound=Session)


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
    """The taps of a worker's model, its pools of segments, and the captures under way.

    Attributes:
        rank: Of the worker in its engine.
        refusal: Why nothing can be captured here, or an empty string.
    """

    def __init__(self, worker: Any) -> None:
        super().__init__()
        self._worker = worker
        self.rank: int = worker.rank
        self.refusal = ""
        self._backend: Backend | None = None
        self._taps: ModelTaps | None = None
        self._sessions: dict[str, Session] = {}
        self._counts: dict[str, tuple[int, int]] = {}  # rows and bytes of captures that have ended
        self._pools: Pools | None = None
        self._server: SegmentServer | None = None
        self._calls: CallServer | None = None
        self._network: NetworkServer | None = None
        self._no_network = "it was started without VLLM_TAP_LISTEN=host:port"
        self._new_secret = ""
        self._client_numbers = itertools.count(1)
        self._profile: Profile | None = None
        self._closing: list[Closable] = []

    @classmethod
    def install(cls, worker: Any) -> TapWorker:
        """Put taps into the model that a worker has just loaded; if they do not fit, keep the reason."""
        self = cls(worker)
        try:
            model = vllm_model.find_model(worker)
            self._backend = choose_backend(worker, self.lock)
            self._pools = Pools(self._backend)
            self._closing.append(self._pools)
            # In a process that outlives the engine; the end of a process does the same faster.
            weakref.finalize(self, close_all, self._closing, self._backend).atexit = False
            self._taps = ModelTaps(model, worker.device, self._backend.rows)
            vllm_runner.watch_runner(worker.model_runner, self)
            self._listen()
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
        if self._calls is not None and any(mark.capture_id not in self._sessions for mark in marks):
            self._calls.settle(PATIENCE_SECONDS)

    def scheduled(self, request_id: str) -> None:
        for session in self._sessions.values():
            session.scheduled(request_id)

    def meet(self, request_id: str, mark: Mark, prompt_len: int, generates: bool) -> None:
        session = self._sessions.get(mark.capture_id)
        if session is not None:
            session.meet(request_id, mark, prompt_len, generates)

    def ended(self, request_ids: Iterable[str]) -> None:
        for session in self._sessions.values():
            session.forget(request_ids)

    def arm(self, batch: Batch) -> None:
        for session in self._sessions.values():
            if session.is_new:
                self._note_routers(session)
            session.arm(batch)

    def drain(self) -> None:
        for session in self._sessions.values():
            session.drain()
        if self._taps is not None:
            self._taps.end_pass()

    def sampled(self) -> None:
        for session in self._sessions.values():
            session.send()

    def rest(self) -> None:
        for session in self._sessions.values():
            session.rest()

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
        """Say what can be captured here; in the engine's own thread."""
        if self._backend is not None:
            self._backend.note_stream()
        if self._taps is not None and not self.refusal:
            self._pass_dummy_rows(self._taps)
        return structs.replace(self._hello(), secret=self._new_secret)

    def _hello(self) -> messages.Hello:
        """Say what can be captured here, as far as the forward passes until now have shown."""
        refusal, taps, worker = self.refusal, self._taps, self._worker
        verdict, reasons, routing = UNKNOWN, dict[str, str](), dict[int, Routing]()
        streams: tuple[messages.StreamInfo, ...] = ()
        if taps is not None and not refusal:
            refusal = self._backend.refusal if self._backend else ""
            verdict, reasons, routing = taps.residual(), taps.reasons(), taps.routing()
            streams = tuple(self._streams(taps, reasons))
        rank = vllm_runner.read_rank(worker)
        wants_rows = (
            verdict.wants_rows
            or (taps is not None and taps.wants_rows)
            or any(found.reason == NO_ROWS for found in routing.values())
        )
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
            wants_rows=self._eager_rows() if wants_rows and vllm_runner.takes_tokens_alone(worker) else 0,
            may_change=taps is not None and not refusal and (wants_rows or taps.may_change),
            address="" if refusal else self._shared_server().address,
            calls="" if refusal else self._call_server().address,
            network=self._network.address if self._network is not None else "",
            no_network=self._no_network if self._network is None else "",
            host=host_id().hex(),
            refusal=refusal,
        )

    def ready_taps(self) -> ModelTaps:
        """Return the taps, which have seen a forward pass.

        Raises:
            EngineUnsupportedError: Nothing can be captured here, or no forward pass has gone through yet.
        """
        if self.refusal or self._taps is None:
            raise EngineUnsupportedError(f"rank {self.rank} cannot capture: {self.refusal}")
        self._pass_dummy_rows(self._taps)
        if not self._taps.seen:
            raise EngineUnsupportedError("no forward pass has gone through this engine yet: send it a request first.")
        return self._taps

    def is_first_rank(self) -> bool:
        """Tell whether this is the first of the tensor-parallel ranks, which hold the same rows."""
        return not vllm_runner.read_rank(self._worker).tp_rank

    def new_memory(self, owner: Hashable) -> SegmentPool:
        """Return memory for an owner in this process, whose rows are read here."""
        return self._memory().add(owner, shared=False)

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

    def _streams(self, taps: ModelTaps, reasons: dict[str, str]) -> Iterable[messages.StreamInfo]:
        conventions = taps.conventions()
        places = {place: tap for place, tap in taps.by_place.items() if tap.width and place[0] not in reasons}
        for (stream, dtype, width), numbers in by_shape(places).items():
            yield messages.StreamInfo(stream, dtype, width, tuple(numbers), conventions[stream])

    def call(self, data: bytes) -> bytes:
        """Do what a message asks for, in the engine's thread or that of a socket; return the reply."""
        with self.lock, self._backend.on_stream() if self._backend else nullcontext():
            return self._answer(data)

    @_replying
    def _answer(self, data: bytes) -> messages.Message:
        message = messages.decode_call(data)
        if isinstance(message, messages.Greet):
            # No forward pass: ranks would run it at different times, and wait for each other in different steps.
            return self._hello()
        if isinstance(message, messages.Start):
            return self.start(message)
        if isinstance(message, messages.Take):
            return self.take(message)
        return self.finish(message) if isinstance(message, messages.Finish) else self.stop(message)

    def start(self, start: messages.Start) -> messages.Started:
        """Begin a capture beside those under way: take what memory it needs and let marked requests through."""
        self._require_new(start.capture_id)
        if not start.shared:
            self._memory().add(start.capture_id, shared=False)
        else:
            self._server_of(start.clients.get(self.rank, 0))
        try:
            session = self.begin(start, tuple(self._share(start)), self._owner(start), Session)
        except Exception:
            if not start.shared:
                self._memory().drop(start.capture_id)
            raise
        # Last: the driver may let nobody else in while it pins memory.
        self._grow_ahead(session)
        return messages.Started(rank=self.rank, streams=session.streams)

    def begin(
        self, start: messages.Start, streams: tuple[Stream, ...], owner: Hashable, new_session: Callable[..., S]
    ) -> S:
        """Begin a capture of these streams, in memory of an owner; see `memory`.

        Raises:
            TapError: It cannot begin; nothing has been taken.
        """
        self._require_new(start.capture_id)
        start.choice()  # before anything is taken
        pools = self._memory()
        pool = pools.of(owner)
        pools.keep(owner)
        try:
            sink = self._sink(start, streams, pool)
        except Exception:
            pools.linger(owner)
            raise
        drafts = vllm_runner.request_rows(self._worker) > 1
        session = new_session(start, self.rank, streams, sink, pool.open_account(start.budget_bytes), drafts)
        self._sessions[start.capture_id] = session
        self._closing.append(session)
        return session

    def _require_new(self, capture_id: str) -> None:
        if capture_id in self._sessions:
            raise CaptureError(f"capture {capture_id} is under way already: each needs a name of its own.")

    def _memory(self) -> Pools:
        if self._pools is None:
            raise EngineUnsupportedError(f"rank {self.rank} cannot capture: {self.refusal}")
        return self._pools

    def _owner(self, start: messages.Start) -> Hashable:
        """Return whose memory the rows of a capture lie in."""
        return start.clients[self.rank] if start.shared else start.capture_id

    def _grow_ahead(self, session: Session) -> None:
        """Have memory for all rows that are expected prepared in the background."""
        start, streams = session.start, session.streams
        expected = block_bytes(start.expected_rows, streams)
        largest = block_bytes(min(start.expected_rows, vllm_runner.max_rows(self._worker)), streams)
        session.account.pool.grow_ahead(expected + expected // SLACK, largest)

    def _sink(self, start: messages.Start, streams: tuple[Stream, ...], pool: SegmentPool) -> Sink:
        assert self._taps is not None
        assert self._backend is not None
        modes = {"hidden_states": MODES.get(start.residual, ADD)}
        return self._backend.new_sink(streams, self._taps.by_place, modes, pool, start.staging)

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
                self._server_of(session.client).publish(session.client, session.block_ids)
        except Exception:
            self._abandon(session)
            raise
        self.end(session)
        return descriptor

    def take(self, take: messages.Take) -> messages.Descriptor:
        """Hand over what a capture has taken since the last time; it goes on."""
        session = self._require(take.capture_id)
        try:
            block_ids = session.block_ids
            descriptor = self._with_routing(session, session.take())
            if session.start.shared:
                self._server_of(session.client).publish(session.client, block_ids)
        except Exception:
            self._abandon(session)
            raise
        return descriptor

    def _with_routing(self, session: Session, descriptor: messages.Descriptor) -> messages.Descriptor:
        """Add how routers choose, as it holds for the rows of a capture, unless the client knows it."""
        assert self._taps is not None
        pool = session.account.pool

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
        """Abandon a capture, if it is under way, and let go of what it sends through calls."""
        session = self._sessions.get(stop.capture_id)
        if session is not None:
            self._abandon(session)
        elif self._pools is not None:
            self._pools.drop(stop.capture_id)
        return messages.Stopped(rank=self.rank)

    def fetch(self, rank: int, capture_id: str, segment_id: int, offset: int, nbytes: int) -> bytes:
        """Return bytes of an inline block of a capture; nothing if it is that of another rank, or there is none."""
        if rank != self.rank:
            return b""
        try:
            return bytes(self._memory().of(capture_id).segment(segment_id).view[offset : offset + nbytes])
        except TapError:
            logger.exception("vllm-tap: fetch failed")
            return b""

    @_replying
    def release(self, rank: int, capture_id: str, block_ids: list[int]) -> messages.Stopped:
        """Free inline blocks of a capture; all of its memory with the last ones, if it has ended."""
        if rank == self.rank:
            pool = self._memory().of(capture_id)
            for block_id in block_ids:
                pool.release(block_id)
            if capture_id not in self._sessions and not pool.stats().num_blocks:
                self._memory().drop(capture_id)
        return messages.Stopped(rank=self.rank)

    def status(self, capture_id: str = "") -> dict[str, Any]:
        """Say what this worker holds, in plain values.

        Rows and their bytes are those of a capture, under way or ended not long ago; of all under way, or of the last
        that ended, unless one is named.
        """
        stats = self._pools.stats() if self._pools is not None else []
        num_rows, num_bytes = self._count(capture_id)
        return {
            "rank": self.rank,
            "pid": os.getpid(),
            "captures": list(self._sessions),
            "num_rows": num_rows,
            "num_bytes": num_bytes,
            "capacity_bytes": sum(s.capacity_bytes for s in stats),
            "used_bytes": sum(s.used_bytes for s in stats),
            "num_graph_nodes": self._taps.rows.num_graph_nodes if self._taps else 0,
            "staging_bytes": self._taps.rows.staging_bytes if self._taps else 0,
            "num_blocks": sum(s.num_blocks for s in stats),
            "is_preparing": self._taps.rows.is_preparing if self._taps else False,
        }

    def _count(self, capture_id: str) -> tuple[int, int]:
        under_way = {name: (session.num_rows, session.num_bytes) for name, session in self._sessions.items()}
        if capture_id:
            return {**self._counts, **under_way}.get(capture_id, (0, 0))
        counts = list(under_way.values()) or list(self._counts.values())[-1:]
        return sum(rows for rows, _ in counts), sum(nbytes for _, nbytes in counts)

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
        if capture_id not in self._sessions:
            raise CaptureError(f"capture {capture_id} is not under way here: it was ended or never started")
        return self._sessions[capture_id]

    def end(self, session: Session, owner: Hashable | None = None) -> None:
        """End a capture, whose blocks stay; by default in the memory of its client."""
        name = session.start.capture_id
        self._sessions.pop(name, None)
        self._counts.pop(name, None)
        self._counts[name] = session.num_rows, session.num_bytes
        if len(self._counts) > MOST_COUNTED:
            del self._counts[next(iter(self._counts))]
        if session in self._closing:
            self._closing.remove(session)
        self._memory().linger(self._owner(session.start) if owner is None else owner)
        session.close()

    def _abandon(self, session: Session) -> None:
        self.end(session)
        session.release()
        if not session.start.shared:
            self._memory().drop(session.start.capture_id)

    def _shared_server(self) -> SegmentServer:
        if self._server is None:
            self._server = SegmentServer(self._memory().add_client, self._client_numbers)
            self._server.on_disconnect = weakly(self._client_gone)
            self._closing.append(self._server)
        return self._server

    def _listen(self) -> None:
        """Serve clients of a network, if this worker is to; where it cannot, generation goes on."""
        try:
            given = settings.read(os.environ, self._worker.local_rank)
            if given is None:
                return
            pools = self._memory()
            new_pool = functools.partial(pools.add, shared=False)
            self._network = NetworkServer(given, new_pool, self._call_server(), self._client_numbers)
        except TapError as error:
            self._no_network = str(error)
            logger.error("vllm-tap: rank %d serves no network: %s", self.rank, error)
            return
        self._network.on_disconnect = weakly(self._client_gone)
        self._closing.append(self._network)
        self._new_secret = given.secret.decode() if given.is_random else ""
        how = "within TLS" if given.tls else "in the clear"
        logger.info("vllm-tap: rank %d serves %s %s", self.rank, self._network.address, how)

    def _server_of(self, client: int) -> SegmentServer | NetworkServer:
        """Return the server that a client is connected to.

        Raises:
            CaptureError: None.
        """
        for server in (self._shared_server(), self._network):
            if server is not None and server.is_connected(client):
                return server
        raise CaptureError(f"rank {self.rank}: client {client} is not connected any more: connect again.")

    def _client_gone(self, client: int) -> None:
        assert self._backend is not None
        with self.lock, self._backend.on_stream():
            for session in list(self._sessions.values()):
                if session.start.shared and session.client == client:
                    self._abandon(session)
        self._memory().drop(client)

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

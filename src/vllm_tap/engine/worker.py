"""The tap of one worker: what clients reach through `collective_rpc`, and what the runner reports to.

Runs in the worker process. Calls take and return bytes or plain values, so that vLLM's secure serialisation carries
them, and never raise: a failure is a reply.
"""

from __future__ import annotations

import functools
import hmac
import logging
import os
import time
import weakref
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Final, TypeVar

import torch
from msgspec import structs

from vllm_tap.engine import offer
from vllm_tap.engine.capture.closing import Closable, close_all, weakly
from vllm_tap.engine.capture.cpu import CpuBackend
from vllm_tap.engine.capture.interfaces import Backend, Sink
from vllm_tap.engine.capture.look import some_rows, with_labels
from vllm_tap.engine.capture.memory import Pools
from vllm_tap.engine.capture.profile import DMA, FORWARD, HOST, LABELS, Figures, ForwardProfile, Profile
from vllm_tap.engine.capture.session import Session, Taking
from vllm_tap.engine.capture.tally import Tally
from vllm_tap.engine.model.install import ModelTaps
from vllm_tap.engine.model.residual import MODES
from vllm_tap.engine.model.tap import ADD
from vllm_tap.engine.servers import Servers
from vllm_tap.engine.writing.jobs import Writers
from vllm_tap.errors import CaptureError, EngineUnsupportedError, TapError
from vllm_tap.frame import messages
from vllm_tap.frame.layout import Stream, block_bytes
from vllm_tap.labels import Mark
from vllm_tap.streams import ROUTER_STREAMS
from vllm_tap.transport.segment.pool import SegmentPool
from vllm_tap.transport.segment.server import SegmentServer
from vllm_tap.transport.tcp.server import NetworkServer
from vllm_tap.vllm import model as vllm_model
from vllm_tap.vllm import runner as vllm_runner
from vllm_tap.vllm.runner import Batch

logger = logging.getLogger("vllm_tap")

PATIENCE_SECONDS: Final = 1.0
"""Seconds that a step with requests of an unknown capture waits for calls that have come and are not handled."""

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


class TapWorker(vllm_runner.StepListener):
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
        self._tally = Tally()
        self._pools: Pools | None = None
        self._servers: Servers | None = None
        self._profile: Profile | None = None
        self._writers = Writers(self.rank)
        self._closing: list[Closable] = []

    @classmethod
    def install(cls, worker: Any) -> TapWorker:
        """Put taps into the model that a worker has just loaded; if they do not fit, keep the reason."""
        self = cls(worker)
        try:
            model = vllm_model.find_model(worker)
            self._backend = choose_backend(worker, self.lock)
            self._pools = Pools(self._backend)
            self._closing += [self._pools, self._writers]
            # In a process that outlives the engine; the end of a process does the same faster.
            weakref.finalize(self, close_all, self._closing, self._backend).atexit = False
            self._taps = ModelTaps(model, worker.device, self._backend.rows)
            vllm_runner.watch_runner(worker.model_runner, self)
            self._servers = Servers(self.rank, self._pools, weakly(self.call), weakly(self._client_gone), self._closing)
            self._servers.listen(worker.local_rank)
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
        if self._servers is not None and any(mark.capture_id not in self._sessions for mark in marks):
            self._servers.settle(PATIENCE_SECONDS)

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

    def before_forward(self, batch: Batch) -> None:
        for session in self._sessions.values():
            if session.is_new:
                self._note_routers(session)
            session.before_forward(batch)

    def after_forward(self) -> None:
        for session in self._sessions.values():
            session.after_forward()
        if self._taps is not None:
            self._taps.end_pass()

    def after_sampling(self) -> None:
        for session in self._sessions.values():
            session.after_sampling()

    def on_idle(self) -> None:
        for session in self._sessions.values():
            session.on_idle()

    def skip(self) -> None:
        if self._taps is not None:
            self._taps.rows.clear()
            self._taps.end_pass()

    def _note_routers(self, session: Session) -> None:
        """Before a step from which on all rows of a capture come, when the weights are those that it runs with."""
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
            offer.pass_dummy_rows(self._worker, self._taps)
        return structs.replace(self._hello(), secret=self._servers.new_secret if self._servers is not None else "")

    def _hello(self) -> messages.Hello:
        """Say what can be captured here, as far as the forward passes until now have shown."""
        refusal = self.refusal or (self._backend.refusal if self._backend is not None else "")
        if refusal or self._taps is None or self._servers is None:
            return offer.refused(self._worker, refusal)
        return offer.hello(self._worker, self._taps, self._servers.addresses())

    def ready_taps(self) -> ModelTaps:
        """Return the taps, which have seen a forward pass.

        Raises:
            EngineUnsupportedError: Nothing can be captured here, or no forward pass has gone through yet.
        """
        if self.refusal or self._taps is None:
            raise EngineUnsupportedError(f"rank {self.rank} cannot capture: {self.refusal}")
        offer.pass_dummy_rows(self._worker, self._taps)
        if not self._taps.seen:
            raise EngineUnsupportedError("no forward pass has gone through this engine yet: send it a request first.")
        return self._taps

    def is_first_rank(self) -> bool:
        """Tell whether this is the first of the tensor-parallel ranks, which hold the same rows."""
        return not vllm_runner.read_rank(self._worker).tp_rank

    def new_memory(self, owner: Hashable) -> SegmentPool:
        """Return memory for an owner in this process, whose rows are read here."""
        return self._memory().add(owner, shared=False)

    @_replying
    def call(self, data: bytes) -> messages.Message:
        """Do what a message asks for, in the engine's thread or that of a socket; return the reply."""
        message = messages.decode_call(data)
        if isinstance(message, messages.Write):  # of rows that were handed over: steps go on
            return self.write(message)
        if isinstance(message, messages.Report):
            return self._writers.report(message.capture_id)
        if isinstance(message, messages.Take):
            return self.take(message)
        with self._between_steps():
            return self._answer(message)

    @contextmanager
    def _between_steps(self) -> Iterator[None]:
        with self.lock, self._backend.on_stream() if self._backend else nullcontext():
            yield

    def _answer(self, message: messages.Call) -> messages.Message:
        if isinstance(message, messages.Greet):
            # No forward pass: ranks would run it at different times, and wait for each other in different steps.
            return self._hello()
        if isinstance(message, messages.Start):
            return self.start(message)
        if isinstance(message, messages.Finish):
            return self.finish(message)
        assert isinstance(message, messages.Stop)
        return self.stop(message)

    def start(self, start: messages.Start) -> messages.Started:
        """Begin a capture beside those under way: take what memory it needs and let marked requests through."""
        self._require_new(start.capture_id)
        if not start.shared:
            self._memory().add(start.capture_id, shared=False)
        else:
            self._require_folder(start)
        try:
            session = self.begin(start, self._share(start), self._owner(start), Session)
        except Exception:
            if not start.shared:
                self._memory().drop(start.capture_id)
            raise
        # Last: the driver may let nobody else in while it pins memory.
        self._grow_ahead(session)
        return messages.Started(rank=self.rank, streams=session.streams)

    def _require_folder(self, start: messages.Start) -> None:
        """Refuse a client that is gone, and one of a network that names a folder for spilled rows."""
        is_remote = self._required_servers().is_remote(start.clients.get(self.rank, 0))
        if start.spill is not None and is_remote:
            raise CaptureError("rows are spilled to files for clients of this host alone: leave on_full out.")

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

    def finish(self, finish: messages.Finish) -> messages.Descriptor:
        """End a capture and hand its blocks over."""
        session = self._require(finish.capture_id)
        try:
            descriptor = self._with_routing(session, session.biases, session.finish())
            if finish.labels:
                descriptor = with_labels(descriptor, session.account.pool)
            if session.start.shared:
                self._served_by(session.client).publish(session.client, session.block_ids)
        except Exception:
            self._abandon(session)
            raise
        self.end(session)
        return descriptor

    def take(self, take: messages.Take) -> messages.Descriptor:
        """Hand over what a capture has taken since the last time; it goes on, and so do steps while rows arrive."""
        with self._between_steps():
            session = self._require(take.capture_id)
            try:
                taking = session.begin_take()
            except Exception:
                self._abandon(session)
                raise
        begin = time.perf_counter()
        try:
            taking.settling.wait()
            with self._between_steps():
                return self._taken(session, taking, time.perf_counter() - begin)
        except Exception:
            with self._between_steps():
                for chunk in taking.descriptor.chunks:  # nobody knows of them
                    session.account.pool.release(chunk.block_id)
                if self._sessions.get(take.capture_id) is session:
                    self._abandon(session)
            raise

    def _taken(self, session: Session, taking: Taking, wait_seconds: float) -> messages.Descriptor:
        """Return what the client is told of rows that lie in their blocks now, which it may map from here on."""
        if self._sessions.get(session.start.capture_id) is not session:
            raise CaptureError(f"capture {session.start.capture_id} ended while its rows were taken.")
        taking.settling.check()
        descriptor = taking.descriptor
        descriptor = structs.replace(descriptor, wait_seconds=descriptor.wait_seconds + wait_seconds)
        descriptor = self._with_routing(session, taking.biases, descriptor)
        if session.start.shared:
            block_ids = [chunk.block_id for chunk in descriptor.chunks]  # may have moved to files
            self._served_by(session.client).publish(session.client, block_ids)
        return descriptor

    def _with_routing(
        self, session: Session, biases: torch.Tensor | None, descriptor: messages.Descriptor
    ) -> messages.Descriptor:
        """Add how routers choose, as it holds for the rows of a capture, unless the client knows it."""
        assert self._taps is not None
        pool = session.account.pool

        def rows_of(layer: int) -> list[torch.Tensor]:
            return some_rows(descriptor, lambda number: pool.segment(number).view, layer, ROUTER_STREAMS)

        version, routing = self._taps.routers.check(biases, rows_of)
        if version == session.start.routing_versions.get(self.rank):
            return descriptor
        return structs.replace(descriptor, routing_version=version, routing=offer.share_of(self._worker, routing))

    def stop(self, stop: messages.Stop) -> messages.Stopped:
        """Abandon a capture, if it is under way, or the writing of its rows; let go of what it sends through calls."""
        self._writers.stop(stop.capture_id)
        session = self._sessions.get(stop.capture_id)
        if session is not None:
            self._abandon(session)
        elif self._pools is not None:
            self._pools.drop(stop.capture_id)
        return messages.Stopped(rank=self.rank)

    def write(self, write: messages.Write) -> messages.Written:
        """Begin to write rows that a client holds into shards of its dataset; no step waits."""
        below = self._required_servers().folder_of(write.client)
        pool = self._memory().of(write.client)
        if not hmac.compare_digest(pool.pool_id, write.pool):
            raise CaptureError(f"the memory of client {write.client} has another name.")
        return self._writers.begin(write, pool, below)

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
        count = self._tally.count(self._sessions, capture_id)
        return {
            "rank": self.rank,
            "pid": os.getpid(),
            "captures": list(self._sessions),
            "num_rows": count.num_rows,
            "num_bytes": count.num_bytes,
            "capacity_bytes": sum(s.capacity_bytes for s in stats),
            "used_bytes": sum(s.used_bytes for s in stats),
            "num_graph_nodes": self._taps.rows.num_graph_nodes if self._taps else 0,
            "staging_bytes": self._taps.rows.staging_bytes if self._taps else 0,
            "num_blocks": sum(s.num_blocks for s in stats),
            "spilled_bytes": self._pools.spilled_bytes if self._pools is not None else 0,
            "stalled_seconds": count.stalled_seconds,
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
        for name, label in {"start": "start", "finish": "finish", **LABELS}.items():
            profile.watch(self, name, label)
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
        self._sessions.pop(session.start.capture_id, None)
        self._tally.end(session)
        if session in self._closing:
            self._closing.remove(session)
        self._memory().linger(self._owner(session.start) if owner is None else owner)
        session.close()

    def _abandon(self, session: Session) -> None:
        self.end(session)
        session.release()
        if not session.start.shared:
            self._memory().drop(session.start.capture_id)

    def _share(self, start: messages.Start) -> tuple[Stream, ...]:
        assert self._taps is not None
        return tuple(offer.share_of_streams(self._worker, self._taps, start))

    def _served_by(self, client: int) -> SegmentServer | NetworkServer:
        return self._required_servers().of(client)

    def _required_servers(self) -> Servers:
        if self._servers is None:
            raise EngineUnsupportedError(f"rank {self.rank} cannot capture: {self.refusal}")
        return self._servers

    def _client_gone(self, client: int) -> None:
        self._writers.stop_client(client)
        with self._between_steps():
            for session in list(self._sessions.values()):
                if session.start.shared and session.client == client:
                    self._abandon(session)
        self._memory().drop(client)


def choose_backend(worker: Any, step_lock: AbstractContextManager[Any]) -> Backend:
    """Return the backend of a worker whose model has been loaded; the lock is held during each of its steps."""
    if worker.device.type != "cuda":
        return CpuBackend()
    from vllm_tap.engine.cuda.backend import DeviceBackend

    return DeviceBackend(worker, step_lock)

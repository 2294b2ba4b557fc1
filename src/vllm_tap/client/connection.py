"""The client's line to the workers of one engine: calls by name, and a segment reader per rank. Client process."""

from __future__ import annotations

import itertools
import os
import secrets
import ssl
import sys
import threading
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

from vllm_tap.client.identity import model_facts
from vllm_tap.client.left import LeftMemory
from vllm_tap.client.memory import FetchedMemory, MappedMemory, RankMemory, by_calls
from vllm_tap.client.replies import GONE, LOST, exchange, expect, explain, not_loaded
from vllm_tap.client.ways import Ways
from vllm_tap.errors import (
    CaptureError,
    EngineDiedError,
    EngineUnsupportedError,
    PluginNotLoadedError,
    SpecError,
    TransportError,
)
from vllm_tap.frame import messages
from vllm_tap.frame.blocks import Bytes
from vllm_tap.frame.layout import ITEMSIZE, IntArray, Layout
from vllm_tap.transport import AUTO, INLINE, NETWORKS, OTHER_NAMES, SEGMENT, TRANSPORTS
from vllm_tap.transport.segment.reader import SegmentReader
from vllm_tap.transport.tcp.access import Access, read_secret
from vllm_tap.transport.tcp.address import is_network
from vllm_tap.transport.tcp.fetching import Piece
from vllm_tap.transport.tcp.reader import NetworkReader
from vllm_tap.vllm import frontend

PROBE_TOKENS = range(1, 17)
"""Repeated, a prompt for the one forward pass that an engine may want before it can say what its layers return."""

HandedOver = list[tuple[messages.Descriptor, RankMemory]]

T = TypeVar("T", bound=messages.Message)


class Connection:
    """All workers of an engine, greeted once, and again while forward passes may let them say more.

    Attributes:
        ways: Sockets to the workers.
        model: What is known of the model: see `model_facts`; empty in a process that has no engine object.
        routing: How the routers choose, by layer, as of the last capture; empty for a model without experts.
        routing_versions: Of what each rank said of it.

    Raises:
        PluginNotLoadedError: The workers do not know this package.
        EngineUnsupportedError: They know it and cannot capture.
        EngineDiedError: They do not answer.
    """

    def __init__(self, llm: Any) -> None:
        self._prepare(weakref.ref(llm))
        self.model |= model_facts(llm)
        self.greet()
        if self.wants_rows:
            self._pass_rows(llm, self.wants_rows)
            self.greet()
        require_able(self.hellos)

    @classmethod
    def at(
        cls,
        addresses: Sequence[str],
        *,
        secret: str | bytes | None = None,
        tls: bool | ssl.SSLContext | None = None,
        codec: str = "auto",
    ) -> Connection:
        """Return a connection for a process without the engine object, which has `addresses` of one that has it.

        Its captures begin, end and hand rows over through sockets alone. Whoever sends requests to the engine marks
        those that are to be captured.

        Args:
            addresses: Of all workers: `addresses` on their host and as their user, `network_addresses` from elsewhere.
            secret: What workers on a network were started with; by default VLLM_TAP_SECRET.
            tls: By default rows leave a host within TLS only, with a certificate that the secret vouches for; False for
                a network in the clear; a context of your own may check the certificate as well.
            codec: For rows from a network: "auto" goes by the measured rates of link and cores, or a codec's name.

        Raises:
            TransportError: Nothing answers there, or something of another user, or of who does not know the secret.
            SpecError: No secret, or an address that is none.
            EngineUnsupportedError: The workers cannot capture.
        """
        access = Access(read_secret(secret), tls, codec) if any(map(is_network, addresses)) else None
        self = cls.__new__(cls)
        self._prepare(None, access)
        self._met(self.ways.greet_at(addresses))
        require_able(self.hellos)
        return self

    def _prepare(self, llm: weakref.ref[Any] | None, access: Access | None = None) -> None:
        self._llm = llm
        self.model: dict[str, str] = {}
        self.ways = Ways(access)
        self._under_way: dict[str, tuple[weakref.ref[Any], str]] = {}

    @property
    def addresses(self) -> list[str]:
        """The sockets of the workers, for `at` in another process of this host and user."""
        return [hello.calls for hello in self.hellos]

    @property
    def network_addresses(self) -> list[str]:
        """Network addresses of workers that were started with VLLM_TAP_LISTEN; for `at`, with their secret."""
        return [hello.network for hello in self.hellos if hello.network]

    def _pass_rows(self, llm: Any, num_tokens: int) -> None:
        """Send prompts of so many tokens through the model."""
        frontend.require_no_others(llm, "make a Recording, which asks the workers, before you add any")
        longest = max(llm.model_config.max_model_len - 1, 1)
        if num_tokens > longest:
            num_tokens *= 3  # the first step may begin with the first of several prompts; one of the next ones is full
        lengths = [min(longest, num_tokens - begin) for begin in range(0, num_tokens, longest)]
        fields = {} if frontend.pools(llm) else {"max_tokens": 1, "temperature": 0.0}
        params = frontend.new_params(llm, fields)
        params.skip_reading_prefix_cache = True
        prompts = [{"prompt_token_ids": list(itertools.islice(itertools.cycle(PROBE_TOKENS), n))} for n in lengths]
        frontend.generate(llm, prompts, [params] * len(prompts), use_tqdm=False)

    def greet(self) -> None:
        """Ask all workers what can be captured, which they may know better when rows have gone through the model."""
        if self._llm is None:
            self._met(self.ways.greet_again())
            return
        try:
            hellos = self.call(messages.Hello, "open")
        except PluginNotLoadedError as error:
            raise not_loaded(str(error)) from error.__cause__
        self._met(hellos)

    def _met(self, hellos: Iterable[messages.Hello]) -> None:
        self.hellos = self.ways.hellos = sorted(hellos, key=lambda hello: hello.rank.rank)
        self.routing = {layer: found for hello in self.hellos for layer, found in hello.routing.items()}
        self.routing_versions = {hello.rank.rank: hello.routing_version for hello in self.hellos}

    @property
    def may_change(self) -> bool:
        """True if forward passes since the greeting may let the workers say more."""
        return any(hello.may_change for hello in self.hellos)

    def _learn(self, descriptors: Iterable[messages.Descriptor]) -> None:
        """Take over what the workers of a capture say of the routers, where it is not what they said before."""
        for descriptor in descriptors:
            if descriptor.routing is not None:
                self.routing |= descriptor.routing
                self.routing_versions[descriptor.rank] = descriptor.routing_version

    @property
    def wants_rows(self) -> int:
        """Tokens of a forward pass that the workers want before they can say everything; 0 for none."""
        return max(hello.wants_rows for hello in self.hellos)

    @property
    def num_layers(self) -> int:
        """Decoder layers of the model."""
        return max(hello.num_layers for hello in self.hellos)

    @property
    def residual(self) -> str:
        """The convention of the decoder layers, from the stage that holds the final norm."""
        return next((hello.residual for hello in self.hellos if hello.residual), "")

    def available(self, stream: str) -> list[int]:
        """Return the layers in which the model has a stream."""
        return sorted(
            {layer for h in self.hellos for info in h.streams if info.name == stream for layer in info.layers}
        )

    def why_not(self, stream: str) -> str:
        """Return why a stream is missing, or an empty string."""
        return next((h.reasons[stream] for h in self.hellos if stream in h.reasons), "")

    def ask(self, kind: type[T], call: messages.Call, way: str) -> Callable[[], list[T]]:
        """Send a call to all workers; return a function that waits for their replies and returns these.

        Workers handle a call before any request that is sent to the engine after it, also when nobody has waited. That
        function raises a `TapError`, the first failure that came back, or what kept the workers from answering.

        Args:
            kind: The reply that is expected.
            call: What is asked for.
            way: What `choose_transport` returned. Where no socket reaches the workers, the call itself takes as long as
                they do.

        Raises:
            TapError: What kept the call from being sent.
        """
        wait, name = self._send(call, way), type(call).__name__
        if way:
            return lambda: expect(kind, wait(), name)
        replies = wait()
        return lambda: expect(kind, replies, name)

    def call(self, kind: type[T], name: str, *args: Any) -> list[T]:
        """Call a method of all workers through vLLM and return their replies.

        Raises:
            TapError: The first failure that came back, or what kept the workers from answering.
        """
        return expect(kind, self._replies(name, *args), f"vllm_tap_{name}")

    def _send(self, call: messages.Call, way: str) -> Callable[[], list[messages.Reply]]:
        """Send a call to all workers; return a function that waits for the replies.

        Straight to each worker where there is a socket: vLLM's own calls pass through several threads, which takes
        more than a millisecond when they are asleep.
        """
        data = messages.encode(call)
        if not way:
            return lambda: self._replies("call", data)
        self._require_alive()
        callers = self.ways.callers(way)
        return exchange(callers, [data] * len(callers))

    def ask_each(self, calls: Mapping[int, messages.Call], way: str) -> list[messages.Reply]:
        """Send some of the workers a call each, by their ranks, and return their replies in that order; see `expect`.

        Raises:
            EngineDiedError: A worker is gone, or silent.
        """
        self._require_alive()
        callers = dict(zip((hello.rank.rank for hello in self.hellos), self.ways.callers(way), strict=True))
        return exchange([callers[rank] for rank in calls], [messages.encode(call) for call in calls.values()])()

    def hand_over(self, call: messages.Finish | messages.Take, way: str) -> Callable[[], HandedOver]:
        """Have all workers hand over what a capture has; return a function that takes hold of it.

        It is to be called until it returns or raises a `TapError`: what is handed over and not taken stays in use.

        Raises:
            TapError: A worker failed; what the others handed over is free again.
        """
        wait, capture_id = self._send(call, way), call.capture_id

        def take() -> HandedOver:
            replies = wait()
            descriptors = [reply for reply in replies if isinstance(reply, messages.Descriptor)]
            placed = [descriptor.validate(capture_id, sys.byteorder) for descriptor in descriptors]
            # Held before anything is checked: what is let go of here is free in the worker.
            held = [
                (descriptor, self._memory(descriptor, where, way))
                for descriptor, where in zip(descriptors, placed, strict=True)
            ]
            expect(messages.Descriptor, replies, type(call).__name__)
            self._learn(descriptors)
            return held

        return take

    def expect_end(self, recording: Any, start: messages.Start, way: str) -> None:
        """Remember that a capture is to be ended by this object, which is not kept."""
        self._under_way[start.capture_id] = weakref.ref(recording), way

    def ended(self, capture_id: str) -> None:
        """Forget a capture that has ended."""
        self._under_way.pop(capture_id, None)

    def stop_lost(self) -> None:
        """Stop captures that nobody can end any more: they would hold memory for ever."""
        for capture_id, (recording, way) in list(self._under_way.items()):
            if recording() is None:
                try:
                    self.choose_transport(way or INLINE)  # which connects again where that was lost
                    self.ask(messages.Stopped, messages.Stop(capture_id=capture_id), way)()
                except (EngineDiedError, TransportError):
                    if not self.ways.goes_over_network(way):
                        raise  # else it has ended with the session, as the worker was lost or is silent
                self.ended(capture_id)

    def status(self, capture_id: str = "") -> list[dict[str, Any]]:
        """Return what every worker says it holds, in plain values; its rows are those of a capture if one is named."""
        return self._rpc("status", capture_id)

    def _replies(self, name: str, *args: Any) -> list[messages.Reply]:
        return [messages.decode_reply(data) for data in self._rpc(name, *args)]

    def _rpc(self, name: str, *args: Any) -> list[Any]:
        llm = self._require_alive()
        if llm is None:
            raise EngineUnsupportedError(
                f"vllm_tap_{name} goes through the engine object, which this process does not have."
            )
        try:
            return frontend.call(llm, f"vllm_tap_{name}", args)
        except EngineDiedError:
            raise
        except Exception as error:
            raise explain(error) from error

    def _require_alive(self) -> Any:
        """Return the engine object, None in a process that has none."""
        lost = self.ways.let_go_of_lost()
        if lost:
            raise EngineDiedError(LOST if lost <= NETWORKS else GONE)
        return self._engine()

    def _engine(self) -> Any:
        llm = self._llm() if self._llm is not None else None
        if llm is None and self._llm is not None:
            raise EngineDiedError(GONE)
        return llm

    def _memory(self, descriptor: messages.Descriptor, placed: Layout[IntArray], way: str) -> RankMemory:
        """Return the bytes of a rank's blocks: mapped, left there, or fetched and freed in the worker."""
        rank = descriptor.rank
        if way:
            reader = self.ways.reader(rank, way)
            if descriptor.labels is not None:
                return LeftMemory(descriptor, placed, reader)
            if isinstance(reader, SegmentReader):
                return MappedMemory(descriptor, placed, reader)
            return _from_network(descriptor, placed, reader)

        def fetch(segment_id: int, offset: int, nbytes: int) -> bytes:
            pieces: list[bytes] = self._rpc("fetch", rank, descriptor.capture_id, segment_id, offset, nbytes)
            piece = next(filter(None, pieces), b"")
            if len(piece) != nbytes:
                raise CaptureError(
                    f"rank {rank} sent {len(piece)} of {nbytes} bytes of segment {segment_id}: see its log."
                )
            return piece

        try:
            return FetchedMemory(descriptor, placed, by_calls(fetch))
        finally:
            block_ids = [chunk.block_id for chunk in descriptor.chunks]
            self.call(messages.Stopped, "release", rank, descriptor.capture_id, block_ids)

    def choose_transport(self, transport: str) -> str:
        """Return the way on which rows cross: through sockets, or an empty string for calls.

        Raises:
            SpecError: Not a transport.
            TransportError: "segment", "tcp" or "nixl" was asked for and cannot be had.
            EngineDiedError: A worker that was reached before is gone.
        """
        transport = OTHER_NAMES.get(str(transport), transport)
        if transport not in TRANSPORTS:
            *names, last = (f'"{name}"' for name in TRANSPORTS)
            raise SpecError(f"transport is {', '.join(names)} or {last}, got {transport!r}")
        if self._llm is None and transport == INLINE:
            raise TransportError('transport="inline" goes through the engine object, which this process does not have.')
        if transport == INLINE:
            return ""
        self._engine()
        lost = self.ways.let_go_of_lost()  # before a way is tried on which nobody answers any more
        if SEGMENT in lost:
            raise EngineDiedError(GONE)
        try:
            self.ways.readers(transport)
        except TransportError as error:
            if lost:
                raise EngineDiedError(GONE) from error
            if transport != AUTO or self._llm is None:
                raise
            return ""
        return transport


def _from_network(descriptor: messages.Descriptor, placed: Layout[IntArray], reader: NetworkReader) -> FetchedMemory:
    itemsize = max((ITEMSIZE[stream.dtype] for stream in descriptor.streams), default=1)

    def fill(wanted: list[tuple[messages.Chunk, Bytes]]) -> None:
        reader.fetch(Piece(chunk.block_id, 0, target.data, itemsize) for chunk, target in wanted)

    memory = FetchedMemory(descriptor, placed, fill)
    reader.release([chunk.block_id for chunk in descriptor.chunks])
    return memory


_connections: weakref.WeakKeyDictionary[Any, Connection] = weakref.WeakKeyDictionary()


_connecting = threading.Lock()


def connect(llm: Any) -> Connection:
    """Return the connection to an engine, made on first use and kept as long as the engine object lives.

    A connection that was made by `Connection.at` stands for an engine object.
    """
    if isinstance(llm, Connection):
        return llm
    frontend.require_llm(llm)
    with _connecting:  # threads of one engine object share it
        connection = _connections.get(llm)
        if connection is None:
            connection = _connections[llm] = Connection(llm)
        elif connection.may_change:
            connection.greet()
    return connection


_counter = itertools.count()


def new_capture_id() -> str:
    """Return a name that no other client of the engine uses."""
    return f"{os.getpid()}-{next(_counter)}-{secrets.token_hex(4)}"


def require_able(hellos: Iterable[messages.Hello]) -> None:
    """Refuse workers that cannot capture.

    Raises:
        EngineUnsupportedError: One of them says why.
    """
    for hello in hellos:
        if hello.refusal:
            raise EngineUnsupportedError(f"rank {hello.rank.rank} cannot capture: {hello.refusal}")

"""The worker's end on a network: it lets clients in, sends rows out of segments, and frees what a lost client held.

Runs in the engine worker, in a thread per connection, and only where the worker was told to listen.
"""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Final

from vllm_tap import codec
from vllm_tap.errors import DescriptorError, TransportError
from vllm_tap.transport import threads
from vllm_tap.transport.calls import PULSE, CallServer
from vllm_tap.transport.nixl import server as memory
from vllm_tap.transport.segment.pool import Block, SegmentPool
from vllm_tap.transport.tcp import access, frames
from vllm_tap.transport.tcp.address import Address, host_id, is_loopback, reachable_host
from vllm_tap.transport.tcp.pulses import Pulses
from vllm_tap.transport.tcp.settings import Settings
from vllm_tap.transport.tcp.stream import Stream

logger = logging.getLogger("vllm_tap")

MOST_CONNECTIONS: Final = 256
"""Connections at a time, those that have not proved anything yet among them."""

_RETRY_SECONDS: Final = 1.0


class _Client:
    """A session and what belongs to it."""

    def __init__(self, number: int, pool: SegmentPool) -> None:
        self.number = number
        self.pool = pool
        self.token = secrets.token_bytes(32)
        self.blocks: dict[int, Block] = {}
        self.streams: set[Stream] = set()


class NetworkServer:
    """Serves clients that know the secret, wherever they are.

    A client has a session, as many connections for calls as it has threads, and some that bring rows. A published
    block belongs to one session until that releases it or ends, which is when its connection does.

    Args:
        settings: Where to listen, and who may connect.
        new_pool: Called with the number of a client that has connected, from a thread of the server's.
        calls: Takes connections for calls over.
        numbers: Numbers for clients.

    Attributes:
        address: Where clients of other hosts connect.
        on_disconnect: Called from a thread of the server's with the number of a client that is gone, after its blocks
            are free.

    Raises:
        TransportError: It cannot listen there, or not speak TLS.
    """

    def __init__(
        self, settings: Settings, new_pool: Callable[[int], SegmentPool], calls: CallServer, numbers: Iterator[int]
    ) -> None:
        self.on_disconnect: Callable[[int], None] | None = None
        self._gate, self._is_local = settings.gate(), is_loopback(settings.host)
        self._no_nixl = memory.why_not() if settings.nixl else "start it with VLLM_TAP_NIXL=1."
        self._new_pool, self._calls, self._numbers = new_pool, calls, numbers
        self._lock = threading.Lock()
        self._clients: dict[int, _Client] = {}
        self._connections: set[socket.socket | Stream] = set()
        self._closing = threading.Event()
        self._listener = settings.listen()
        host, port = self._listener.getsockname()[:2]
        self.address = str(Address(reachable_host(host), port))
        self._pulses = Pulses(PULSE)
        threads.start("vllm-tap-network", self._accept, stop=self.close)

    def publish(self, client: int, block_ids: Sequence[int]) -> None:
        """Give blocks of its pool to a client, from now on the only one that can fetch and free them.

        Raises:
            TransportError: The client is gone.
        """
        with self._lock:
            known = self._clients.get(client)
            if known is not None:
                known.blocks.update((number, known.pool.block(number)) for number in block_ids)
                return
        raise TransportError(
            f"client {client} is not connected any more. Connect again and repeat the capture.", client=client
        )

    def is_connected(self, client: int) -> bool:
        """Tell whether a client's session stands."""
        return client in self._clients

    def close(self) -> None:
        """End the listener and all connections; their threads end soon after."""
        with self._lock:
            if self._closing.is_set():
                return
            self._closing.set()
            self._pulses.close()
            for end in (self._listener, *self._connections):
                with contextlib.suppress(OSError):
                    end.shutdown(socket.SHUT_RDWR)

    def _accept(self) -> None:
        with self._listener:
            while not self._closing.is_set():
                try:
                    connection, peer = self._listener.accept()
                except OSError as error:
                    if not self._closing.is_set():
                        logger.error("no client is accepted for %g s: %s", _RETRY_SECONDS, error)
                        self._closing.wait(_RETRY_SECONDS)
                    continue
                self._admit(connection, peer[0])

    def _admit(self, connection: socket.socket, peer: str) -> None:
        with self._lock:
            has_room = len(self._connections) < MOST_CONNECTIONS and not self._closing.is_set()
            if has_room:
                self._connections.add(connection)
        try:
            if not has_room:
                raise RuntimeError(f"there are {MOST_CONNECTIONS} connections")
            threads.start("vllm-tap-network-client", self._serve, connection, peer, stop=self.close)
        except RuntimeError as error:
            logger.error("vllm-tap: a connection from %s is refused: %s", peer, error)
            self._forget(connection)
            connection.close()

    def _forget(self, connection: socket.socket | Stream) -> None:
        with self._lock:
            self._connections.discard(connection)

    def _serve(self, connection: socket.socket, peer: str) -> None:
        try:
            try:
                stream, preface = self._gate.receive(connection)
            finally:
                self._forget(connection)
            if self._introduce(stream, preface):
                self._calls.adopt(stream, self._pulses.of)
        except (DescriptorError, TransportError) as error:
            logger.warning("vllm-tap: a connection from %s is closed: %s", peer, error)
        except (OSError, EOFError) as error:
            logger.debug("a connection from %s has ended: %s", peer, error)

    def _introduce(self, stream: Stream, preface: bytes) -> bool:
        """Serve a connection to its end; return True for one of calls, which goes on elsewhere."""
        with self._lock:
            self._connections.add(stream)
        is_for_calls = False
        try:
            _, _, role, number, _ = access.PREFACE.unpack(preface)
            client = self._clients.get(number) if role in (access.ROWS, access.MEMORY) else None
            self._gate.admit(stream, preface, client.token if client is not None else b"")
            is_for_calls = role == access.CALLS and not self._closing.is_set()
            if role == access.SESSION:
                self._serve_session(stream)
            elif client is not None:
                self._serve_client(client, stream, self._serve_memory if role == access.MEMORY else self._serve_rows)
        finally:
            self._forget(stream)
            if not is_for_calls:
                stream.close()
        return is_for_calls

    def _serve_session(self, stream: Stream) -> None:
        number = next(self._numbers)
        client = _Client(number, self._new_pool(number))
        client.streams.add(stream)
        with self._lock:  # before the hello: once the client knows its number, it may be published to
            self._clients[number] = client
        try:
            hello = frames.Hello(number, os.getpid(), client.pool.pool_id, host_id(), client.token)
            stream.sendall(hello.encode())
            while True:
                self._release(client, _receive_release(stream))
        finally:
            self._disconnect(client)

    def _release(self, client: _Client, block_ids: Sequence[int]) -> None:
        with self._lock:
            owned = [number for number in block_ids if client.blocks.pop(number, None) is not None]
        for number in owned:
            client.pool.release(number)

    def _serve_client(self, client: _Client, stream: Stream, serve: Callable[[_Client, Stream], None]) -> None:
        """Serve a connection of a session, which ends with that."""
        with self._lock:
            if client.number not in self._clients:
                return
            client.streams.add(stream)
        try:
            serve(client, stream)
        finally:
            with self._lock:
                client.streams.discard(stream)

    def _serve_rows(self, client: _Client, stream: Stream) -> None:
        while True:
            stream.wait_readable()
            self._send_rows(client, stream, frames.Fetch.decode(stream.recv_exactly(frames.FETCH.size)))

    def _serve_memory(self, client: _Client, stream: Stream) -> None:
        def find(number: int) -> memoryview | None:
            with self._lock:  # a session that has ended has no block any more
                block = client.blocks.get(number) if client.number in self._clients else None
                return client.pool.view(block) if block is not None else None

        if self._no_nixl:
            memory.refuse(stream, self._no_nixl)
        else:
            memory.serve(stream, find, self._is_local)

    def _send_rows(self, client: _Client, stream: Stream, fetch: frames.Fetch) -> None:
        block = client.blocks.get(fetch.block_id)
        if block is None or fetch.offset + fetch.nbytes > block.nbytes:
            stream.sendall(frames.Rows(frames.NO_BLOCK, fetch.codec, 0, 0).encode())
            return
        if not codec.installed(fetch.codec):
            stream.sendall(frames.Rows(frames.NO_CODEC, fetch.codec, 0, 0).encode())
            return
        view = client.pool.view(block)[fetch.offset : fetch.offset + fetch.nbytes]
        if fetch.codec == "raw":
            header = frames.Rows(frames.FOUND, fetch.codec, 0, fetch.nbytes).encode()
            stream.send_vectored([header, view])
            return
        begin = time.perf_counter()
        encoded = codec.get(fetch.codec).encode(view, fetch.itemsize)
        microseconds = min(int((time.perf_counter() - begin) * 1e6), (1 << 32) - 1)
        header = frames.Rows(frames.FOUND, fetch.codec, microseconds, len(encoded)).encode()
        stream.send_vectored([header, encoded])

    def _disconnect(self, client: _Client) -> None:
        with self._lock:  # from here on `publish` refuses this client, so its blocks are final
            if self._clients.pop(client.number, None) is None:
                return
            streams = list(client.streams)
        for stream in streams:
            with contextlib.suppress(OSError):
                stream.shutdown()
        for number in client.blocks:
            client.pool.release(number)
        if self.on_disconnect is not None:
            try:
                self.on_disconnect(client.number)
            except Exception:
                logger.exception("on_disconnect failed for client %d", client.number)


def _receive_release(stream: Stream) -> tuple[int, ...]:
    stream.wait_readable()
    count = frames.release_count(stream.recv_exactly(frames.COUNT.size))
    return frames.decode_ids(stream.recv_exactly(8 * count))

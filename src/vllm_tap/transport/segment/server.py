"""The worker's end of the sockets: it hands segments to clients, takes releases, and frees what a dead client held.

Runs in the engine worker: one daemon thread that sleeps until a socket has something to say.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import logging
import os
import secrets
import selectors
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence

from vllm_tap.errors import DescriptorError, TransportError
from vllm_tap.transport import threads, wire
from vllm_tap.transport.segment.memory import Segment
from vllm_tap.transport.segment.pool import SegmentPool

logger = logging.getLogger(__name__)

_BACKLOG = 16

RETRY_SECONDS = 1.0
"""After so long, a client that could not be accepted is tried again."""


class _Client:
    """One connection and what belongs to it."""

    def __init__(self, number: int, connection: socket.socket, pool: SegmentPool) -> None:
        self.number = number
        self.connection = connection
        self.pool = pool
        self.block_ids: set[int] = set()
        self.mapped: set[int] = set()
        self.unsent: deque[wire.Reply] = deque()
        self.listener: Callable[[Segment], None] = lambda _: None


class SegmentServer:
    """Hands segments to clients of the same user over an abstract Unix socket.

    A client gets those of its own pool. A published block belongs to one client until that client releases it or its
    connection ends.

    Args:
        new_pool: called with the number of a client that has connected, from the server's thread; returns its pool.
        numbers: numbers for clients.

    Attributes:
        address: abstract name of the socket, without the leading zero byte; random, so that nothing shares it.
        on_disconnect: called from the server's thread with the number of a client whose connection has ended, after
            its blocks are free.
    """

    def __init__(self, new_pool: Callable[[int], SegmentPool], numbers: Iterator[int] | None = None) -> None:
        self.address = f"vllm-tap-{secrets.token_hex(8)}"
        self.on_disconnect: Callable[[int], None] | None = None
        self._new_pool = new_pool
        self._lock = threading.Lock()
        self._clients: dict[int, _Client] = {}
        self._numbers = itertools.count(1) if numbers is None else numbers
        self._dropped: deque[tuple[int, int]] = deque()  # number of a client, of a segment
        self._closing = False
        self._is_listening, self._retry_at = True, 0.0
        self._listener = _listen(self.address)
        self._waker, self._wakened = socket.socketpair()
        self._waker.setblocking(False)
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._selector.register(self._wakened, selectors.EVENT_READ)
        self._thread: threading.Thread | None = None  # until it runs
        self._thread = threads.start("vllm-tap-segments", self._run, stop=self._stop)

    def publish(self, client: int, block_ids: Sequence[int]) -> None:
        """Give blocks of its pool to a client, from now on the only one that can free them.

        Raises:
            TransportError: the client is gone.
        """
        with self._lock:
            connected = self._clients.get(client)
            if connected is not None:
                connected.block_ids.update(block_ids)
                return
        raise TransportError(
            f"client {client} is not connected any more. Connect again and repeat the capture.", client=client
        )

    def is_connected(self, client: int) -> bool:
        """Tell whether a client's connection stands."""
        return client in self._clients

    def close(self) -> None:
        """End all connections and the thread.

        Blocks of clients stay taken: clients may go on reading them, so nothing may be written there.
        """
        thread = self._thread
        if self._stop() and thread is not None and thread is not threading.current_thread():
            thread.join()

    def _stop(self) -> bool:
        """Have the thread end all connections and itself; return whether nobody had done so."""
        if self._closing:
            return False
        self._closing = True
        self._wake()
        return True

    def _run(self) -> None:
        try:
            while not self._closing:
                ready = self._selector.select(None if self._is_listening else RETRY_SECONDS)
                if not self._is_listening and time.monotonic() >= self._retry_at:
                    self._listen_again()
                for key, events in ready:
                    self._handle(key, events)
        except BaseException:
            logger.exception("the thread that serves segments has failed; clients lose their connection")
            raise
        finally:
            self._close_sockets()

    def _handle(self, key: selectors.SelectorKey, events: int) -> None:
        if key.fileobj is self._wakened:
            self._wakened.recv(4096)
            self._announce_dropped()
        elif key.fileobj is self._listener:
            self._accept()
        else:
            self._serve(key.data, events)

    def _listen_again(self) -> None:
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._is_listening = True

    def _close_sockets(self) -> None:
        with self._lock:
            clients, self._clients = self._clients, {}
        for client in clients.values():
            client.pool.remove_close_listener(client.listener)
        self._selector.close()
        for open_socket in (self._listener, self._waker, self._wakened, *(c.connection for c in clients.values())):
            open_socket.close()

    def _accept(self) -> None:
        try:
            connection, _ = self._listener.accept()
        except BlockingIOError:
            return
        except OSError as error:
            # The waiting client keeps the listener readable: watching it would spin until a descriptor is free.
            logger.error("no further client is accepted for the moment: %s", error)
            self._selector.unregister(self._listener)
            self._is_listening, self._retry_at = False, time.monotonic() + RETRY_SECONDS
            return
        allowed = {0, os.geteuid()}
        uid = wire.peer_uid(connection)
        if uid not in allowed:
            logger.warning("refused a client of user %d, expected %s", uid, wire.describe_uids(allowed))
            connection.close()
            return
        self._welcome(connection)

    def _welcome(self, connection: socket.socket) -> None:
        connection.setblocking(False)
        number = next(self._numbers)
        try:
            pool = self._new_pool(number)
        except TransportError as error:
            logger.warning("client %d is not accepted: %s", number, error)
            connection.close()
            return
        client = _Client(number, connection, pool)
        client.listener = functools.partial(self._segment_closed, number)
        pool.add_close_listener(client.listener)
        with self._lock:  # before the hello: once the client knows its number, it may be published to
            self._clients[client.number] = client
        self._selector.register(connection, selectors.EVENT_READ, client)
        try:
            connection.send(wire.Hello(number, os.getpid(), pool.pool_id).encode(), socket.MSG_NOSIGNAL)
        except OSError:
            self._disconnect(client)

    def _serve(self, client: _Client, events: int) -> None:
        if client.number not in self._clients:
            return
        try:
            if events & selectors.EVENT_WRITE:
                self._send(client)
            if events & selectors.EVENT_READ:
                self._receive(client)
        except DescriptorError as error:
            logger.warning("client %d is disconnected: %s", client.number, error)
            self._disconnect(client)
        except OSError as error:
            logger.debug("the connection of client %d failed: %s", client.number, error)
            self._disconnect(client)

    def _receive(self, client: _Client) -> None:
        try:
            # One byte more than allowed: a longer packet is cut there, and refused for its length.
            packet = client.connection.recv(wire.MAX_PACKET_BYTES + 1)
        except BlockingIOError:
            return
        if not packet:
            self._disconnect(client)
            return
        kind, numbers = wire.decode_request(packet)
        if kind == wire.RELEASE:
            self._release(client, numbers)
        else:
            client.unsent.append(wire.Reply(wire.MAPPED, numbers[0], 0))
            self._send(client)

    def _release(self, client: _Client, block_ids: Sequence[int]) -> None:
        with self._lock:
            owned = client.block_ids.intersection(block_ids)
            client.block_ids -= owned
        for block_id in owned:
            client.pool.release(block_id)

    def _send(self, client: _Client) -> None:
        """Send what is due; what the socket does not take now goes out when it is writable."""
        try:
            while client.unsent:
                self._send_one(client, client.unsent[0])
                client.unsent.popleft()
            events = selectors.EVENT_READ
        except BlockingIOError:
            events = selectors.EVENT_READ | selectors.EVENT_WRITE
        self._selector.modify(client.connection, events, client)

    def _send_one(self, client: _Client, reply: wire.Reply) -> None:
        opened = self._open(client.pool, reply.segment_id) if reply.kind == wire.MAPPED else None
        if opened is None:
            client.connection.send(reply.encode(), socket.MSG_NOSIGNAL)
            return
        fd, nbytes, is_file = opened
        try:
            packet = reply._replace(kind=wire.IN_FILE if is_file else wire.MAPPED, nbytes=nbytes).encode()
            socket.send_fds(client.connection, [packet], [fd], socket.MSG_NOSIGNAL)
        finally:
            os.close(fd)
        client.mapped.add(reply.segment_id)

    def _open(self, pool: SegmentPool, segment_id: int) -> tuple[int, int, bool] | None:
        try:
            return pool.duplicate_fd(segment_id)
        except OSError as error:  # out of descriptors: the client is told that it gets none
            logger.error("segment %d cannot be handed to a client: %s", segment_id, error)
            return None

    def _segment_closed(self, number: int, segment: Segment) -> None:
        self._dropped.append((number, segment.segment_id))
        self._wake()

    def _announce_dropped(self) -> None:
        while self._dropped:
            number, segment_id = self._dropped.popleft()
            client = self._clients.get(number)
            if client is not None and segment_id in client.mapped:
                client.mapped.discard(segment_id)
                client.unsent.append(wire.Reply(wire.DROPPED, segment_id, 0))
                self._serve(client, selectors.EVENT_WRITE)

    def _disconnect(self, client: _Client) -> None:
        with self._lock:  # from here on `publish` refuses this client, so the set is final
            if self._clients.pop(client.number, None) is None:
                return
        self._selector.unregister(client.connection)
        client.connection.close()
        client.pool.remove_close_listener(client.listener)
        for block_id in client.block_ids:
            client.pool.release(block_id)
        if not self._is_listening:
            self._listen_again()
        if self.on_disconnect is not None:
            try:
                self.on_disconnect(client.number)
            except Exception:
                logger.exception("on_disconnect failed for client %d; the server goes on", client.number)

    def _wake(self) -> None:
        # A full socket wakes the thread as well; a closed one belongs to a server that has ended.
        with contextlib.suppress(BlockingIOError, OSError):
            self._waker.send(b"\0")


def _listen(address: str) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        listener.bind(f"\0{address}")
        listener.listen(_BACKLOG)
        listener.setblocking(False)
    except OSError as error:
        listener.close()
        raise TransportError(
            f'the worker cannot listen on an abstract Unix socket ({error}): use transport="inline".'
        ) from error
    return listener

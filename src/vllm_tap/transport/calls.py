"""Calls from a client to a worker over a socket: bytes in, bytes out, and two threads that wake each other.

`CallServer` runs in the engine worker, `Caller` in the client process.

A connection is an abstract Unix stream socket, or one of a network that `transport.tcp` has let in. The client sends a
frame for a call, the worker answers each with one:

    u64 number of the call, from 1, u64 nbytes, both little-endian, then the bytes

Over a network the worker sends frames of number 0 while it handles a call.

A client has a connection for every thread that calls, and one call at a time on it: before it sends the next, it reads
the reply of a call that was interrupted.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import secrets
import select
import socket
import struct
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager

from vllm_tap.errors import DescriptorError, TransportError
from vllm_tap.frame.messages import MAX_MESSAGE_BYTES
from vllm_tap.transport import threads, wire
from vllm_tap.transport.tcp.stream import Stream

logger = logging.getLogger(__name__)

_HEADER = struct.Struct("<QQ")
_BACKLOG = 16
_RETRY_S = 1.0
_GONE = "the worker has gone ({}): start the engine again."

PULSE = _HEADER.pack(0, 0)
"""Frame that only says that the worker lives."""

Connection = socket.socket | Stream


class CallServer:
    """Answers calls of clients of the same user over an abstract Unix socket, one thread per connection.

    Attributes:
        address: abstract name of the socket, without the leading zero byte; random, so that nothing shares it.
    """

    def __init__(self, handle: Callable[[bytes], bytes], name: str = "calls") -> None:
        """Listen, and answer calls from now on.

        Args:
            handle: turns a request into its reply. Threads call it, several at a time if several connections have a
                call. It must not raise: that ends the connection.
            name: begins the address, behind "vllm-tap-".

        Raises:
            TransportError: the worker cannot listen.
        """
        self.address = f"vllm-tap-{name}-{secrets.token_hex(8)}"
        self._handle = handle
        self._lock = threading.Lock()
        self._settled = threading.Condition(self._lock)
        self._closing = threading.Event()
        self._connections: set[Connection] = set()
        self._busy: set[Connection] = set()
        self._listener = _listen(self.address)
        threads.start("vllm-tap-calls", self._accept, stop=self.close)

    def close(self) -> None:
        """End the listener and all connections; a call that is being handled is finished, its reply is dropped."""
        with self._lock:  # who holds it knows that the sockets are open: their threads close them
            if self._closing.is_set():
                return
            self._closing.set()
            self._settled.notify_all()
            for open_socket in (self._listener, *self._connections):
                _shutdown(open_socket)

    def adopt(self, stream: Stream, pulsing: Callable[[Stream], AbstractContextManager[None]]) -> None:
        """Answer calls of a client of a network, let in already, in this thread; at the end close its connection.

        Args:
            stream: Its connection.
            pulsing: Sends `PULSE` to it from time to time, inside its block.
        """
        with self._lock:
            self._connections.add(stream)
            if self._closing.is_set():
                _shutdown(stream)
        self._serve(stream, lambda: pulsing(stream))

    def settle(self, timeout_s: float) -> bool:
        """Wait until the calls that have reached this process are handled; return whether they are.

        If a client sends a call before something else, and that has been seen here, the call is handled after this. A
        call that arrives during the wait may be waited for as well.

        Cost: some microseconds for each connection if there is nothing to wait for.
        """
        with self._settled:
            return self._settled.wait_for(lambda: self._closing.is_set() or not self._has_calls(), timeout_s)

    def _has_calls(self) -> bool:
        """Tell whether there are calls that have come and are not handled yet; the lock is held."""
        # A thread takes nothing out of a socket before it counts as busy: there is no time in between.
        return bool(self._busy) or any(_is_readable(end) for end in (self._listener, *self._connections))

    def _accept(self) -> None:
        with self._listener:
            while not self._closing.is_set():
                try:
                    _is_readable(self._listener, wait=True)
                    with self._lock:
                        connection, _ = self._listener.accept()
                        self._connections.add(connection)
                except OSError as error:
                    if not self._closing.is_set():
                        # The waiting client stays at the head of the queue: trying at once would spin.
                        logger.error("no client of calls is accepted for %g s: %s", _RETRY_S, error)
                        self._closing.wait(_RETRY_S)
                    continue
                self._admit(connection)

    def _admit(self, connection: socket.socket) -> None:
        uid, allowed = wire.peer_uid(connection), {0, os.geteuid()}
        if uid not in allowed:
            logger.warning("refused calls of user %d, expected %s", uid, wire.describe_uids(allowed))
        if uid not in allowed or self._closing.is_set():
            self._drop(connection)
            return
        connection.settimeout(None)  # whatever `socket.setdefaulttimeout` says
        try:
            threads.start("vllm-tap-calls-client", self._serve, connection, stop=self.close)
        except RuntimeError as error:
            logger.error("refused a client of calls: %s", error)
            self._drop(connection)

    def _serve(
        self, connection: Connection, pulsing: Callable[[], AbstractContextManager[None]] = contextlib.nullcontext
    ) -> None:
        try:
            while self._answer(connection, pulsing):
                pass
        except DescriptorError as error:
            logger.warning("a client's connection for calls is closed: %s", error)
        except (OSError, EOFError) as error:
            logger.debug("a client's connection for calls has ended: %s", error)
        finally:
            self._drop(connection)

    def _answer(self, connection: Connection, pulsing: Callable[[], AbstractContextManager[None]]) -> bool:
        """Answer one call; return whether the connection goes on."""
        with self._handling(connection):
            number, request = _Incoming().receive(connection)
            try:
                with pulsing():
                    reply = self._handle(request)
            except Exception:
                logger.exception("a call failed without a reply; the connection that it came on is closed")
                return False
        connection.sendall(_encode(number, reply), socket.MSG_NOSIGNAL)
        return True

    @contextlib.contextmanager
    def _handling(self, connection: Connection) -> Iterator[None]:
        """Wait for the next call, which counts as busy inside the block."""
        _is_readable(connection, wait=True)
        with self._lock:
            self._busy.add(connection)
        try:
            yield
        finally:
            with self._settled:
                self._busy.discard(connection)
                self._settled.notify_all()

    def _drop(self, connection: Connection) -> None:
        with self._settled:
            self._connections.discard(connection)
            self._settled.notify_all()
        connection.close()


class Caller:
    """The client's end: calls a worker and waits for its replies, as long as they take.

    Every thread that calls gets a connection of its own, so threads do not wait for each other here. A call that was
    interrupted, by Ctrl-C for example, may be handled all the same; the thread's next `send` waits for its reply and
    throws it away. Not for finalizers and signal handlers, which may run inside another call of their thread.
    """

    def __init__(self, address: str, connect: Callable[[], Connection] | None = None) -> None:
        """Connect.

        Args:
            address: of the worker: a Unix socket's, unless there is another way to connect.
            connect: makes a connection for a thread.

        Raises:
            TransportError: nothing answers at the address, or something of another user.
        """
        self._address = address
        self._connect = connect or (lambda: wire.connect(address, socket.SOCK_STREAM))
        self._pid = os.getpid()
        self._numbers = itertools.count(1)
        self._lock = threading.Lock()
        self._closed = False
        # A thread's connection goes with the thread. The first one stays: it tells whether the worker lives.
        self._lines: weakref.WeakSet[_Line] = weakref.WeakSet()
        self._of_thread = threading.local()
        self._first: _Line | None = self._line()

    @property
    def alive(self) -> bool:
        """True while all connections stand: False as soon as the worker has gone or has closed one of them."""
        if self._closed or os.getpid() != self._pid:
            return False
        with self._lock:
            lines = list(self._lines)
        return all(line.alive for line in lines)

    def send(self, data: bytes) -> int:
        """Send a request and return its number, for `receive` in the same thread.

        Raises:
            TransportError: the worker has gone, or the request is too long.
        """
        if len(data) > MAX_MESSAGE_BYTES:
            raise TransportError(
                f"a call of {len(data)} bytes exceeds the limit of {MAX_MESSAGE_BYTES}: send it in pieces."
            )
        number = next(self._numbers)
        with self._exchanging() as line:
            line.send(number, data)
        return number

    def receive(self, number: int) -> bytes:
        """Wait for the reply to this thread's latest `send`, without a limit of time.

        Raises:
            TransportError: the worker has gone, or this thread has no such call under way.
        """
        with self._exchanging() as line:
            return line.receive(number)

    def close(self) -> None:
        """End the connections; calls that wait in other threads fail."""
        if os.getpid() == self._pid:  # in a forked child, shutting down would end the parent's connections
            with self._lock:
                self._closed = True
                lines = list(self._lines)
            for line in lines:
                line.shutdown()
        # Descriptors are closed by whoever lets go last, never under a thread that is about to use one.
        self._first = None
        self._of_thread = threading.local()

    @contextlib.contextmanager
    def _exchanging(self) -> Iterator[_Line]:
        """Yield this thread's connection; say what it means when it ends."""
        line = self._line()
        try:
            yield line
        except DescriptorError:
            line.shutdown()
            raise
        except (OSError, EOFError) as error:
            line.shutdown()  # it may only have been silent for too long
            if self._closed:
                raise TransportError("the connection for calls was closed during a call.", path=self._address) from None
            raise TransportError(_GONE.format(error), path=self._address) from error

    def _line(self) -> _Line:
        if os.getpid() != self._pid:
            raise TransportError(
                f"this connection belongs to process {self._pid}, of which process {os.getpid()} is a fork: connect "
                "again here.",
                path=self._address,
            )
        if self._closed:
            raise TransportError("the connection for calls is closed: connect again.", path=self._address)
        line: _Line | None = getattr(self._of_thread, "line", None)
        if line is None:
            line = _Line(self._connect())
            with self._lock:
                self._lines.add(line)
                if self._closed:  # meanwhile
                    line.shutdown()
            self._of_thread.line = line
        return line


class _Line:
    """One thread's connection and the call that is under way on it, if any."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._call: _Call | None = None

    def __del__(self) -> None:
        self._connection.close()

    @property
    def alive(self) -> bool:
        poll = select.poll()
        # The end alone: a reply that nobody has read does not hide it.
        poll.register(self._connection, select.POLLRDHUP)
        return not poll.poll(0)

    def send(self, number: int, data: bytes) -> None:
        # The reply is read first: a worker that cannot get rid of a long one would not read on either.
        if self._call is not None and self._call.begun:
            self._call.finish(self._connection)
        self._call = _Call(number, data)
        self._call.send(self._connection)

    def receive(self, number: int) -> bytes:
        if self._call is None or self._call.number != number:
            raise TransportError(
                f"call {number} is not under way in this thread: receive once, in the thread that sent it, and before "
                "it sends again."
            )
        reply = self._call.finish(self._connection)
        self._call = None
        return reply

    def shutdown(self) -> None:
        _shutdown(self._connection)


class _Call:
    """A request and its reply. Any method may be interrupted and called again: it goes on where it was."""

    def __init__(self, number: int, data: bytes) -> None:
        self.number = number
        self._request = memoryview(_encode(number, data))
        self._sent: list[int] = []
        self._reply = _Incoming()

    @property
    def begun(self) -> bool:
        """True if the worker may know of this call."""
        return bool(self._sent)

    def send(self, connection: Connection) -> None:
        while rest := self._request[sum(self._sent) :]:
            # One C function sends and keeps the count: a signal handler that raises runs before or after both.
            self._sent.extend(map(connection.send, (rest,), (socket.MSG_NOSIGNAL,)))

    def finish(self, connection: Connection) -> bytes:
        self.send(connection)
        number, reply = self._reply.receive(connection)
        while (number, reply) == (0, b""):  # the worker lives
            self._reply = _Incoming()
            number, reply = self._reply.receive(connection)
        if number != self.number:
            raise DescriptorError(f"the worker answered call {number}, expected {self.number}: start the engine again.")
        return reply


class _Incoming:
    """A frame as it arrives. What is there stays when the wait for the rest is interrupted."""

    def __init__(self) -> None:
        self._header: list[bytes] = []
        self._data: list[bytes] = []

    def receive(self, connection: Connection) -> tuple[int, bytes]:
        _fill(connection, self._header, _HEADER.size)
        number, nbytes = _HEADER.unpack(b"".join(self._header))
        if nbytes > MAX_MESSAGE_BYTES:
            raise DescriptorError(f"a frame of {nbytes} bytes exceeds the limit of {MAX_MESSAGE_BYTES}")
        _fill(connection, self._data, nbytes)
        return number, b"".join(self._data)


def _fill(connection: Connection, pieces: list[bytes], nbytes: int) -> None:
    """Receive until the pieces have so many bytes."""
    while missing := nbytes - sum(map(len, pieces)):
        # One C function receives and keeps: a signal handler that raises runs before or after both.
        pieces.extend(map(connection.recv, (missing,), (socket.MSG_WAITALL,)))
        if not pieces[-1]:
            raise EOFError("the other end closed the connection")


def _encode(number: int, data: bytes) -> bytes:
    return _HEADER.pack(number, len(data)) + data


def _is_readable(end: Connection, *, wait: bool = False) -> bool:
    """Tell whether there is something to receive or to accept, or an end to see."""
    poll = select.poll()
    poll.register(end, select.POLLIN)
    return bool(poll.poll(None if wait else 0))


def _shutdown(connection: Connection) -> None:
    """Wake whoever waits for a socket, in any thread."""
    with contextlib.suppress(OSError):  # it has ended already
        connection.shutdown(socket.SHUT_RDWR)


def _listen(address: str) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        listener.settimeout(None)
        listener.bind(f"\0{address}")
        listener.listen(_BACKLOG)
    except OSError as error:
        listener.close()
        raise TransportError(f"the worker cannot listen on an abstract Unix socket for calls: {error}") from error
    return listener

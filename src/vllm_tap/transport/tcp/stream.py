"""A TCP connection, in the clear or within TLS, that stands still for some seconds at most.

Used by both processes. One thread at a time may use it, except for `alive` and `shutdown`.
"""

from __future__ import annotations

import contextlib
import select
import socket
import ssl
import struct
from collections.abc import Sequence
from typing import Final

Buffer = bytes | bytearray | memoryview

RECEIVE_BYTES: Final = 1 << 20
"""Most bytes that one `recv` allocates: what a frame says of its length is no reason to."""


class Stream:
    """A connection with the methods of a socket that calls and rows need.

    Each wait for the other end lasts `timeout_s` at most: then it raises `TimeoutError`. The kernel ends a connection
    whose other host has not answered for as long, also where nothing is sent.
    """

    def __init__(self, connection: socket.socket, timeout_s: float) -> None:
        self._connection = connection
        self._tls = isinstance(connection, ssl.SSLSocket)
        keep_alive(connection, timeout_s)
        if self._tls:
            connection.settimeout(timeout_s)
        else:
            # The kernel's own limits: a socket that blocks needs one call for many bytes.
            connection.settimeout(None)
            seconds, fraction = divmod(timeout_s, 1.0)
            limit = struct.pack("@ll", int(seconds), int(fraction * 1e6))
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, limit)
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, limit)

    def fileno(self) -> int:
        """Return the descriptor, for `select`."""
        return self._connection.fileno()

    @property
    def alive(self) -> bool:
        """True until the end of the connection has been seen here."""
        return is_alive(self)

    def send(self, data: Buffer, flags: int = 0) -> int:
        """Send some of the bytes; return how many."""
        return self.send_some([data])

    def sendall(self, data: Buffer, flags: int = 0) -> None:
        """Send all bytes."""
        self.send_vectored([data])

    def send_vectored(self, buffers: Sequence[Buffer]) -> None:
        """Send several buffers behind one another; in the clear, without a copy in user space."""
        left = [memoryview(buffer).cast("B") for buffer in buffers if len(buffer)]
        while left:
            sent = self.send_some(left)
            while left and sent >= len(left[0]):
                sent -= len(left.pop(0))
            if sent:
                left[0] = left[0][sent:]

    def send_some(self, buffers: Sequence[Buffer]) -> int:
        """Send some of the bytes of several buffers; return how many."""
        try:
            if self._tls:
                return self._connection.send(buffers[0])
            return self._connection.sendmsg(buffers, (), socket.MSG_NOSIGNAL)
        except BlockingIOError:
            raise TimeoutError("the other end takes nothing") from None

    def recv(self, nbytes: int, flags: int = 0) -> bytes:
        """Receive some bytes; none at the end of the connection."""
        nbytes = min(nbytes, RECEIVE_BYTES)
        try:
            return self._connection.recv(nbytes) if self._tls else self._connection.recv(nbytes, flags)
        except BlockingIOError:
            raise TimeoutError("the other end sends nothing") from None

    def recv_exactly(self, nbytes: int) -> bytes:
        """Receive so many bytes, of a frame that is short.

        Raises:
            EOFError: The connection has ended.
        """
        buffer = bytearray(nbytes)
        self.recv_into(memoryview(buffer))
        return bytes(buffer)

    def recv_into(self, view: memoryview) -> None:
        """Fill a buffer.

        Raises:
            EOFError: The connection has ended.
        """
        flags = 0 if self._tls else socket.MSG_WAITALL
        while len(view):
            try:
                received = self._connection.recv_into(view, len(view), flags)
            except BlockingIOError:
                raise TimeoutError("the other end sends nothing") from None
            if not received:
                raise EOFError("the other end closed the connection")
            view = view[received:]

    def wait_readable(self) -> None:
        """Wait for something to receive, or the end, as long as it takes."""
        if isinstance(self._connection, ssl.SSLSocket) and self._connection.pending():
            return
        poll = select.poll()
        poll.register(self, select.POLLIN)
        poll.poll()

    def is_readable(self) -> bool:
        """Tell whether there is something to receive, or the end."""
        if isinstance(self._connection, ssl.SSLSocket) and self._connection.pending():
            return True
        poll = select.poll()
        poll.register(self, select.POLLIN)
        return bool(poll.poll(0))

    def is_writable(self) -> bool:
        """Tell whether a few bytes would be sent at once."""
        poll = select.poll()
        poll.register(self, select.POLLOUT)
        return bool(poll.poll(0))

    def shutdown(self, how: int = socket.SHUT_RDWR) -> None:
        """Wake whoever waits for the connection, in any thread."""
        # Not that of SSLSocket, which from then on would send in the clear.
        socket.socket.shutdown(self._connection, how)

    def close(self) -> None:
        """Let go of the connection; no other thread may use it."""
        self._connection.close()


def keep_alive(connection: socket.socket, timeout_s: float) -> None:
    """Have the kernel notice that the other host is gone."""
    timeout = max(2, round(timeout_s))
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, max(1, timeout - 3))
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 1)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, timeout * 1000)


def is_alive(end: Stream | socket.socket) -> bool:
    """Tell whether the other end has not ended a connection, as far as is known here."""
    poll = select.poll()
    with contextlib.suppress(ValueError):  # closed here
        poll.register(end, select.POLLRDHUP)
        return not poll.poll(0)
    return False

"""The channel of the benchmarks: messages of bytes over a Unix stream socket, each after its length.

Runs in both processes of a benchmark. Leaner than what vLLM sends its replies through (pickle over ZeroMQ), so that the
methods that push tensors through a channel are not slowed by ours.
"""

from __future__ import annotations

import socket
import struct

import numpy as np

_LENGTH = struct.Struct("<Q")


class Channel:
    """One end of a connection between two processes."""

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection

    def send(self, payload: bytes | memoryview) -> None:
        """Send one message; the payload is not copied on the way to the kernel."""
        view = memoryview(payload).cast("B")
        self._socket.sendall(_LENGTH.pack(view.nbytes))
        self._socket.sendall(view)

    def receive(self) -> memoryview:
        """Return the next message, writable, in memory of its own."""
        (nbytes,) = _LENGTH.unpack(self._fill(memoryview(bytearray(_LENGTH.size))))
        return self._fill(np.empty(nbytes, np.uint8).data)  # empty: a bytearray would be zeroed first

    def _fill(self, buffer: memoryview) -> memoryview:
        rest = buffer
        while rest:
            received = self._socket.recv_into(rest, 0, socket.MSG_WAITALL)
            if not received:
                raise EOFError("the other process of the benchmark has ended")
            rest = rest[received:]
        return buffer

"""The client's end of a socket, shared by the reader and by every lease that it gave out.

Runs in the client process, in whatever thread drops the last tensor over a block.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import threading
import time
from collections import deque
from collections.abc import Collection

from vllm_tap.errors import TransportError
from vllm_tap.transport import threads, wire

_LOOK_MS = 100
"""Milliseconds after which a thread that waits for the worker looks whether the interpreter is about to end."""


class Link:
    """A connection that lives as long as the reader or one of its leases needs it.

    The worker takes the end of a connection for the death of the client and writes over its blocks. A reader that is
    closed while tensors live therefore leaves the connection open; the end of the last lease closes it.
    """

    def __init__(self, address: str, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._pid = os.getpid()
        self._leased: set[int] = set()
        self._ended: deque[int] = deque()
        self._sending = threading.Lock()
        self._waiting = threading.Lock()
        self._closing = False
        self._eof = False
        self._socket = wire.connect(address, socket.SOCK_SEQPACKET)
        self._socket.setblocking(False)
        try:
            self.hello = wire.Hello.decode(self.receive()[0])
        except BaseException:
            self._socket.close()
            raise

    @property
    def eof(self) -> bool:
        """True if the worker has gone, as far as has been seen."""
        return self._eof

    def leased(self, block_ids: Collection[int]) -> set[int]:
        """Return those of some blocks whose leases have not ended."""
        return self._leased.intersection(block_ids)

    def begin(self, block_ids: Collection[int]) -> None:
        """Note that leases on blocks begin."""
        self._leased.update(block_ids)

    def end(self, block_ids: Collection[int]) -> None:
        """Note that leases have ended, and tell the worker without waiting.

        The garbage collector calls this at any moment, also inside any other method of this class: it takes no lock
        that it would have to wait for.
        """
        if os.getpid() != self._pid:
            return  # a forked child: the blocks are the parent's
        self._leased.difference_update(block_ids)
        self._ended.extend(block_ids)
        self.flush()

    def flush(self) -> None:
        """Send ended leases. Who finds another thread sending leaves them to it; what the socket refuses goes later."""
        # A thread that waits for the socket sends what is here when it wakes: no need to try, or to start another.
        while self._ended and not self._waiting.locked() and self._sending.acquire(blocking=False):
            try:
                going = self._send_ended()
            finally:
                self._sending.release()
            if not going:
                # At the end of the interpreter no thread starts; then the end of the connection says it all.
                with contextlib.suppress(RuntimeError):
                    threads.start_bare(self._flush_when_writable, stop=lambda: None)  # it looks by itself
                break
        self._close_if_done()

    def _flush_when_writable(self) -> None:
        """Wait for the worker to read. Nobody else may come: the lease that found the socket full may be the last."""
        while self._ended and not self._eof and self._waiting.acquire(blocking=False):
            try:
                poll = select.poll()
                poll.register(self._socket, select.POLLOUT)
                while not poll.poll(_LOOK_MS):
                    if threads.is_ending():
                        return
            except (OSError, ValueError):  # closed meanwhile
                return
            finally:
                self._waiting.release()
            self.flush()

    def _send_ended(self) -> bool:
        batch = [self._ended.popleft() for _ in range(min(len(self._ended), wire.MAX_RELEASE_IDS))]
        try:
            if batch and not self._eof:
                self._socket.send(wire.encode_request(wire.RELEASE, batch), socket.MSG_NOSIGNAL)
        except BlockingIOError:
            self._ended.extendleft(batch)
            return False
        except OSError:
            self._eof = True  # the worker has gone: nobody is left to tell
        return True

    def request_segment(self, segment_id: int) -> None:
        """Ask for a segment; the answer comes through `receive`."""
        deadline = time.monotonic() + self._timeout_s
        packet = wire.encode_request(wire.MAP, [segment_id])
        while True:
            try:
                self._socket.send(packet, socket.MSG_NOSIGNAL)
                return
            except BlockingIOError:
                self._wait(select.POLLOUT, deadline)
            except OSError as error:
                self._eof = True
                raise TransportError(f"the worker has gone ({error}): start the engine again.") from error

    def receive(self) -> tuple[bytes, list[int]]:
        """Wait for a packet of the worker; return it with the file descriptors that came along.

        Raises:
            TransportError: the worker has gone, or did not answer in time.
        """
        deadline = time.monotonic() + self._timeout_s
        while True:
            received = self.receive_now()
            if received is not None:
                return received
            if self._eof:
                raise TransportError("the worker has gone: start the engine again.")
            self._wait(select.POLLIN, deadline)

    def receive_now(self) -> tuple[bytes, list[int]] | None:
        """Return the next packet if one is there."""
        try:
            # Room for more descriptors than one, so that the check sees a packet that brings too many.
            packet, fds, _, _ = socket.recv_fds(self._socket, wire.REPLY_STRUCT.size + wire.HELLO_STRUCT.size, 4)
        except BlockingIOError:
            return None
        except OSError:
            packet, fds = b"", []
        if not packet:
            self._eof = True
            return None
        for fd in fds:
            os.set_inheritable(fd, False)
        return packet, fds

    def _wait(self, event: int, deadline: float) -> None:
        poll = select.poll()
        poll.register(self._socket, event)
        if not poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
            raise TransportError(f"the worker did not answer within {self._timeout_s:g} s: is it stopped?")

    def close(self) -> None:
        """Close the connection when the last lease has ended, or now if there is none."""
        self._closing = True
        self._close_if_done()

    def _close_if_done(self) -> None:
        if self._closing and not self._leased:
            self._socket.close()  # which also ends whatever could not be sent

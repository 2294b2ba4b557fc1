"""Bytes of blocks brought over by several connections at once, taken up again where one of them breaks.

Runs in the client process.
"""

from __future__ import annotations

import contextlib
import ssl
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from typing import Final, NamedTuple

from vllm_tap import codec
from vllm_tap.codec.meter import Meter
from vllm_tap.errors import DescriptorError, TransportError
from vllm_tap.transport import threads
from vllm_tap.transport.tcp import frames
from vllm_tap.transport.tcp.stream import Stream

PIECE_BYTES: Final = 2 << 20
WINDOW_BYTES: Final = 8 << 20
"""Bytes that one connection has asked for and not received, at most."""
WINDOW_PIECES: Final = 64
BYTES_PER_CONNECTION: Final = 8 << 20
"""Another connection is taken for every so many bytes."""
MOST_BREAKS: Final = 8
"""Connections that may break one after another without a piece in between."""


class Piece(NamedTuple):
    """Bytes of a block, and where they are to go.

    Attributes:
        block_id: Number of the block.
        offset: First byte, in the block.
        target: Memory for the bytes, as many as are wanted.
        itemsize: Bytes of an element, for codecs.
    """

    block_id: int
    offset: int
    target: memoryview
    itemsize: int = 1


def cut(pieces: Iterable[Piece]) -> deque[Piece]:
    """Return pieces of at most `PIECE_BYTES` each."""
    return deque(
        piece._replace(offset=piece.offset + done, target=piece.target[done : done + PIECE_BYTES])
        for piece in pieces
        for done in range(0, len(piece.target), PIECE_BYTES)
    )


class Lanes:
    """Connections for the rows of one worker, opened as they are needed and kept.

    Args:
        connect: Opens one.
        num_lanes: Most connections.
        choose: Returns the codec for the next piece.
        meter: Takes note of what arrives, if it is to be measured.
    """

    def __init__(
        self, connect: Callable[[], Stream], num_lanes: int, choose: Callable[[], str], meter: Meter | None
    ) -> None:
        self._connect, self._num_lanes, self.choose, self.meter = connect, num_lanes, choose, meter
        self._lock = threading.Lock()
        self._idle: list[Stream] = []
        self._used: set[Stream] = set()
        self._closed = False

    def fetch(self, pieces: Iterable[Piece]) -> None:
        """Fill the targets of all pieces.

        Raises:
            DescriptorError: The worker answered something else, or has not got a block.
            TransportError: The worker cannot be reached any more.
        """
        left = cut(pieces)
        total = sum(len(piece.target) for piece in left)
        if self.meter is not None:
            self.meter.begin()
        transfer = _Transfer(self, left)
        others = []
        try:
            with contextlib.suppress(RuntimeError):  # no more threads here: fewer connections do
                for _ in range(min(self._num_lanes, -(-total // BYTES_PER_CONNECTION)) - 1):
                    others.append(threads.start("vllm-tap-fetch", transfer.run_beside, stop=transfer.stop))
            transfer.run()
        except BaseException:
            transfer.stop()
            raise
        finally:
            for other in others:
                other.join()
        if transfer.error is not None:
            raise transfer.error

    def take(self) -> Stream:
        """Return a connection that nobody uses, new or not."""
        with self._lock:
            stream = self._idle.pop() if self._idle else None
        stream = stream or self._connect()
        with self._lock:
            self._used.add(stream)
            if self._closed:
                self.break_off(stream)
        return stream

    def give_back(self, stream: Stream, is_whole: bool) -> None:
        """Keep a connection for later; close it if a transfer ended in the middle."""
        with self._lock:
            self._used.discard(stream)
            if is_whole and not self._closed:
                self._idle.append(stream)
                return
        stream.close()

    def break_off(self, stream: Stream) -> None:
        """End a connection that another thread uses."""
        with contextlib.suppress(OSError):
            stream.shutdown()

    def close(self) -> None:
        """End all connections."""
        with self._lock:
            self._closed = True
            idle, self._idle = self._idle, []
            for stream in self._used:
                self.break_off(stream)
        for stream in idle:
            stream.close()


class _Transfer:
    """Pieces on their way. Each thread runs one connection, and takes what is left."""

    def __init__(self, lanes: Lanes, left: deque[Piece]) -> None:
        self._lanes, self._left = lanes, left
        self._under_way = 0
        self._changed = threading.Condition()
        self._streams: set[Stream] = set()
        self._num_breaks = 0
        self._stopped = False
        self.error: TransportError | None = None

    def stop(self) -> None:
        """End it, from any thread."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()
            for stream in self._streams:
                self._lanes.break_off(stream)

    def run_beside(self) -> None:
        """Run until all is there, or it ends; errors go to whoever waits."""
        with contextlib.suppress(TransportError):
            self.run()

    def run(self) -> None:
        """Run until all is there.

        Raises:
            TransportError: See `Lanes.fetch`.
        """
        try:
            while self._wait_for_work():
                self._run_connection()
        except TransportError as error:
            with self._changed:
                self.error = self.error or error
            self.stop()
            raise

    def _wait_for_work(self) -> bool:
        """Wait until there is something to ask for; return False when all is there, or nothing more will be."""
        with self._changed:
            self._changed.wait_for(lambda: self._left or not self._under_way or self._stopped)
            return bool(self._left) and not self._stopped

    def _run_connection(self) -> None:
        """Use one connection until nothing is left or it breaks."""
        pending: deque[tuple[Piece, frames.Fetch]] = deque()
        stream = None
        try:
            stream = self._lanes.take()
            with self._changed:
                self._streams.add(stream)
            while self._ask(stream, pending):
                self._receive(stream, *pending[0])
                self._arrived(pending)
        except TransportError as error:
            if not isinstance(error.__cause__, ConnectionError | EOFError | ssl.SSLEOFError):
                raise
            self._note_break(error.__cause__)
        except TimeoutError as error:
            raise TransportError(
                f"the worker has sent nothing for some seconds ({error}): is its host gone?"
            ) from error
        except (OSError, EOFError) as error:
            self._note_break(error)
        finally:
            self._put_back(pending)
            if stream is not None:
                with self._changed:
                    self._streams.discard(stream)
                self._lanes.give_back(stream, is_whole=not pending)

    def _ask(self, stream: Stream, pending: deque[tuple[Piece, frames.Fetch]]) -> bool:
        """Ask for as many pieces as the window takes; return whether any is under way."""
        asked = []
        waiting = sum(len(piece.target) for piece, _ in pending)
        with self._changed:
            while self._left and not self._stopped and len(pending) < WINDOW_PIECES:
                # One at a time while the link is measured: what has been asked for takes no other codec any more.
                window = 0 if self._lanes.meter is not None and self._lanes.meter.is_probing else WINDOW_BYTES
                if pending and waiting + len(self._left[0].target) > window:
                    break
                piece = self._left.popleft()
                fetch = frames.Fetch(
                    self._lanes.choose(), piece.itemsize, piece.block_id, piece.offset, len(piece.target)
                )
                pending.append((piece, fetch))
                asked.append(fetch.encode())
                waiting += len(piece.target)
                self._under_way += 1
        if asked:
            stream.sendall(b"".join(asked))
        return bool(pending)

    def _receive(self, stream: Stream, piece: Piece, fetch: frames.Fetch) -> None:
        rows = frames.Rows.decode(stream.recv_exactly(frames.ROWS.size), fetch)
        if rows.status == frames.NO_BLOCK:
            raise DescriptorError(
                f"the worker has no {fetch.nbytes} bytes at {fetch.offset} of block {fetch.block_id} for this client",
                block_id=fetch.block_id,
            )
        if rows.status == frames.NO_CODEC:
            self._without_codec(piece, fetch)
            return
        if fetch.codec == "raw":
            stream.recv_into(piece.target)
            decode_s = 0.0
        else:
            encoded = bytearray(rows.nbytes)
            stream.recv_into(memoryview(encoded))
            begin = time.perf_counter()
            piece.target[:] = codec.get(fetch.codec).decode(memoryview(encoded), fetch.nbytes, fetch.itemsize)
            decode_s = time.perf_counter() - begin
        if self._lanes.meter is not None:
            self._lanes.meter.note(fetch.codec, fetch.nbytes, rows.nbytes, rows.encode_us / 1e6, decode_s)

    def _without_codec(self, piece: Piece, fetch: frames.Fetch) -> None:
        if self._lanes.meter is None:
            raise TransportError(f"the worker has no package for codec {fetch.codec!r}: install it there, or use raw.")
        self._lanes.meter.refuse(fetch.codec)
        with self._changed:
            self._left.appendleft(piece)

    def _arrived(self, pending: deque[tuple[Piece, frames.Fetch]]) -> None:
        with self._changed:
            pending.popleft()
            self._under_way -= 1
            self._num_breaks = 0
            if not self._under_way or self._left:
                self._changed.notify_all()

    def _put_back(self, pending: deque[tuple[Piece, frames.Fetch]]) -> None:
        with self._changed:
            self._under_way -= len(pending)
            self._left.extendleft(piece for piece, _ in reversed(pending))
            self._changed.notify_all()

    def _note_break(self, error: Exception) -> None:
        with self._changed:
            self._num_breaks += 1
            if self._num_breaks > MOST_BREAKS and not self._stopped:
                raise TransportError(f"the connection to the worker breaks again and again ({error}).") from error

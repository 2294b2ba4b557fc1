"""A client's connection to a worker whose memory it reads by NIXL. Client process."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator, Sequence
from typing import Final

import numpy as np

from vllm_tap.errors import DescriptorError, TransportError
from vllm_tap.transport.nixl import frames
from vllm_tap.transport.nixl.agent import Agent
from vllm_tap.transport.tcp.fetching import Piece
from vllm_tap.transport.tcp.frames import COUNT, encode_release
from vllm_tap.transport.tcp.stream import Stream

MOST_BLOCKS: Final = 1024
"""Blocks of one question."""
WINDOW_BYTES: Final = 16 << 20
"""Bytes of one read, for which the worker may be silent no longer than allowed."""


class Lane:
    """One connection, and an agent of its own. Used by one thread at a time, except for `stop`.

    Args:
        stream: Connection to the worker, which has let this client in.
        is_local: As for `Agent`.
        timeout_s: Seconds that a read may take.

    Raises:
        TransportError: The worker serves no NIXL, or there is none here.
        OSError: The connection ended, which is closed after any error.
        EOFError: So it did.
    """

    def __init__(self, stream: Stream, is_local: bool, timeout_s: float) -> None:
        self._stream, self._timeout_s = stream, timeout_s
        try:
            status, _, nbytes = frames.OFFER.unpack(stream.recv_exactly(frames.OFFER.size))
            reason = stream.recv_exactly(frames.checked_length(nbytes, frames.MAX_REASON_BYTES))
            if status != frames.OFFERED:
                raise TransportError(f"the worker serves no NIXL: {reason.decode(errors='replace')}")
            self._agent = Agent(is_local)
        except BaseException:
            stream.close()
            raise

    def fetch(self, pieces: Sequence[Piece]) -> None:
        """Fill the targets of all pieces.

        Raises:
            DescriptorError: The worker has not got a block for this client.
            TransportError: NIXL failed, or the worker stands still: close this object.
            OSError: The connection ended.
            EOFError: So it did.
        """
        by_block: dict[int, list[Piece]] = {}
        for piece in pieces:
            if len(piece.target):
                by_block.setdefault(piece.block_id, []).append(piece)
        numbers = list(by_block)
        for begin in range(0, len(numbers), MOST_BLOCKS):
            asked = numbers[begin : begin + MOST_BLOCKS]
            self._fetch(asked, [by_block[number] for number in asked])

    def _fetch(self, block_ids: list[int], pieces: list[list[Piece]]) -> None:
        places = self._places(block_ids)
        error = _first_error(block_ids, pieces, places)
        try:
            if error is None:
                self._read(list(_transfers(pieces, places)))
        finally:
            self._stream.sendall(COUNT.pack(0))
        (held,) = COUNT.unpack(self._stream.recv_exactly(COUNT.size))
        if error is not None:
            raise error
        if held != len(block_ids):
            raise TransportError("the worker gave blocks away while they were read: the session has ended.")

    def _places(self, block_ids: list[int]) -> list[tuple[int, int]]:
        self._stream.sendall(encode_release(block_ids))
        (nbytes,) = frames.NBYTES.unpack(self._stream.recv_exactly(frames.NBYTES.size))
        places = frames.decode_places(self._stream.recv_exactly(frames.PLACE.size * len(block_ids)))
        metadata = self._stream.recv_exactly(frames.checked_length(nbytes, frames.MAX_METADATA_BYTES))
        if metadata:
            self._agent.meet(metadata)
        return places

    def _read(self, transfers: list[tuple[int, int, int]]) -> None:
        """Read (their address, my address, length) of each, as many at a time as a window has."""
        registered = self._agent.register([(mine, nbytes) for _, mine, nbytes in transfers])
        try:
            for window in _windows(transfers):
                theirs = [(address, nbytes) for address, _, nbytes in window]
                mine = [(address, nbytes) for _, address, nbytes in window]
                self._agent.read(theirs, mine, self._timeout_s)
        finally:
            self._agent.deregister(registered)

    def stop(self) -> None:
        """Wake whoever uses it."""
        self._agent.stop()
        with contextlib.suppress(OSError):
            self._stream.shutdown()

    def close(self) -> None:
        """End the connection; no other thread may use it. UCX writes nothing into this process's memory any more."""
        self._agent.close()
        self._stream.close()


def _first_error(
    block_ids: list[int], pieces: list[list[Piece]], places: list[tuple[int, int]]
) -> DescriptorError | None:
    for number, wanted, (address, nbytes) in zip(block_ids, pieces, places, strict=True):
        for piece in wanted:
            if not address or piece.offset + len(piece.target) > nbytes:
                return DescriptorError(
                    f"the worker has no {len(piece.target)} bytes at {piece.offset} of block {number} for this client",
                    block_id=number,
                )
    return None


def _transfers(pieces: list[list[Piece]], places: list[tuple[int, int]]) -> Iterator[tuple[int, int, int]]:
    """Yield (their address, my address, length), each no longer than a window."""
    for (address, _), piece in itertools.chain.from_iterable(
        ((place, piece) for piece in wanted) for place, wanted in zip(places, pieces, strict=True)
    ):
        target, nbytes = int(np.frombuffer(piece.target, np.uint8).ctypes.data), len(piece.target)
        for done in range(0, nbytes, WINDOW_BYTES):
            yield address + piece.offset + done, target + done, min(WINDOW_BYTES, nbytes - done)


def _windows(transfers: list[tuple[int, int, int]]) -> Iterator[list[tuple[int, int, int]]]:
    """Yield transfers in groups of a window's bytes."""
    group: list[tuple[int, int, int]] = []
    size = 0
    for transfer in transfers:
        if group and size + transfer[2] > WINDOW_BYTES:
            yield group
            group, size = [], 0
        group.append(transfer)
        size += transfer[2]
    if group:
        yield group

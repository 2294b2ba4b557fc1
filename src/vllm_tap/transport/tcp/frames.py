"""Frames of the connections that carry rows, and of a client's session: little-endian integers, no objects.

Used by both processes.

    SESSION   worker: u32 client, u32 pid, 16 bytes pool id, 16 bytes host id, 32 bytes token
              client: u32 count (1 to 4096), then so many u64 block ids that it has done with; not answered
    ROWS      client: u16 codec, u16 itemsize, u32 zero, u64 block, u64 offset in it, u64 nbytes
              worker: u16 status, u16 codec, u32 microseconds that encoding took, u64 encoded bytes; then these

The worker answers requests in their order. A client has as many under way as it likes to take in.
"""

from __future__ import annotations

import struct
from typing import Final, NamedTuple

from vllm_tap import codec
from vllm_tap.errors import DescriptorError
from vllm_tap.transport.wire import MAX_RELEASE_IDS

HELLO: Final = struct.Struct("<II16s16s32s")
COUNT: Final = struct.Struct("<I")
FETCH: Final = struct.Struct("<HHIQQQ")
ROWS: Final = struct.Struct("<HHIQ")

MAX_PIECE_BYTES: Final = 16 << 20
ITEMSIZES: Final = (1, 2, 4, 8)

FOUND, NO_BLOCK, NO_CODEC = 0, 1, 2
"""Statuses of the worker's answer."""

CODECS: Final = codec.names()


class Hello(NamedTuple):
    """The worker's first frame of a session."""

    client: int
    pid: int
    pool_id: bytes
    host_id: bytes
    token: bytes

    def encode(self) -> bytes:
        """Return the frame."""
        return HELLO.pack(*self)

    @classmethod
    def decode(cls, data: bytes) -> Hello:
        """Read the frame."""
        return cls(*HELLO.unpack(data))


class Fetch(NamedTuple):
    """A client's request for bytes of a block."""

    codec: str
    itemsize: int
    block_id: int
    offset: int
    nbytes: int

    def encode(self) -> bytes:
        """Return the frame."""
        return FETCH.pack(CODECS.index(self.codec), self.itemsize, 0, self.block_id, self.offset, self.nbytes)

    @classmethod
    def decode(cls, data: bytes) -> Fetch:
        """Check and read the frame.

        Raises:
            DescriptorError: A number that cannot be.
        """
        number, itemsize, zero, block_id, offset, nbytes = FETCH.unpack(data)
        if number >= len(CODECS) or itemsize not in ITEMSIZES or zero or not 1 <= nbytes <= MAX_PIECE_BYTES:
            raise DescriptorError(f"a client asks for {nbytes} bytes by codec {number} of {itemsize}-byte elements")
        return cls(CODECS[number], itemsize, block_id, offset, nbytes)


class Rows(NamedTuple):
    """The worker's answer, before the bytes."""

    status: int
    codec: str
    encode_us: int
    nbytes: int

    def encode(self) -> bytes:
        """Return the frame."""
        return ROWS.pack(self.status, CODECS.index(self.codec), self.encode_us, self.nbytes)

    @classmethod
    def decode(cls, data: bytes, fetch: Fetch) -> Rows:
        """Check and read the answer to a request.

        Raises:
            DescriptorError: It is none.
        """
        status, number, encode_us, nbytes = ROWS.unpack(data)
        most = fetch.nbytes if fetch.codec == "raw" else encoded_limit(fetch.nbytes)
        least = fetch.nbytes if fetch.codec == "raw" else 1
        expected = (least, most) if status == FOUND else (0, 0)
        is_known = status in (FOUND, NO_BLOCK, NO_CODEC) and number < len(CODECS) and CODECS[number] == fetch.codec
        if not is_known or not expected[0] <= nbytes <= expected[1]:
            raise DescriptorError(
                f"the worker answered {fetch} with status {status}, codec {number} and {nbytes} bytes",
                block_id=fetch.block_id,
            )
        return cls(status, fetch.codec, encode_us, nbytes)


def encoded_limit(nbytes: int) -> int:
    """Return the most bytes that the encoded form of so many may have."""
    return nbytes + nbytes // 16 + 4096


def encode_release(block_ids: list[int]) -> bytes:
    """Return the frame that frees blocks, of which it takes 4096."""
    return struct.pack(f"<I{len(block_ids)}Q", len(block_ids), *block_ids)


def release_count(data: bytes) -> int:
    """Return how many blocks a frame frees, from its first 4 bytes.

    Raises:
        DescriptorError: None, or too many.
    """
    (count,) = COUNT.unpack(data)
    if not 1 <= count <= MAX_RELEASE_IDS:
        raise DescriptorError(f"a client frees {count} blocks in one frame, expected 1 to {MAX_RELEASE_IDS}")
    return int(count)


def decode_ids(data: bytes) -> tuple[int, ...]:
    """Return the numbers of a frame that frees blocks, without its first 4 bytes."""
    return struct.unpack(f"<{len(data) // 8}Q", data)

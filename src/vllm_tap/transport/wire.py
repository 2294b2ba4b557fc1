"""Packets of worker and client on the socket: little-endian integers, no names, no objects.

Used by both processes.

A connection is a Unix socket of packets. The worker speaks first:

    HELLO    magic "vtap", u16 version, u16 zero, u32 client, u32 pid of the worker, 16 bytes pool id

From the client, a u32 kind and then u64 numbers:

    MAP      segment_id                answered by MAPPED or IN_FILE
    RELEASE  block_id, 1 to 4096 times     not answered

From the worker, a u32 kind, u64 segment_id, u64 nbytes:

    MAPPED   with the segment's file descriptor; nbytes is 0, without one, if there is no such segment
    IN_FILE  as MAPPED, of a segment that is an unlinked file
    DROPPED  the worker has closed the segment: its memory is free once the client unmaps it
"""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from vllm_tap.errors import DescriptorError, TransportError

MAGIC = b"vtap"
VERSION = 1
MAP = 1
RELEASE = 2
MAPPED = 3
DROPPED = 4
IN_FILE = 5
MAX_RELEASE_IDS = 4096
MAX_PACKET_BYTES = 4 + 8 * MAX_RELEASE_IDS

HELLO_STRUCT = struct.Struct("<4sHHII16s")
REPLY_STRUCT = struct.Struct("<IQQ")
_HINT = 'Is the worker on this host, in the same container and network namespace? If not, use transport="inline".'
_KIND = struct.Struct("<I")
_PEER = struct.Struct("=iII")  # struct ucred: pid, uid, gid


class Hello(NamedTuple):
    """The worker's first packet."""

    client: int
    pid: int
    pool_id: bytes

    def encode(self) -> bytes:
        """Return the packet."""
        return HELLO_STRUCT.pack(MAGIC, VERSION, 0, self.client, self.pid, self.pool_id)

    @classmethod
    def decode(cls, packet: bytes) -> Hello:
        """Check and read the packet."""
        if len(packet) != HELLO_STRUCT.size:
            raise DescriptorError(f"the worker's hello has {len(packet)} bytes, expected {HELLO_STRUCT.size}")
        magic, version, _, client, pid, pool_id = HELLO_STRUCT.unpack(packet)
        if (magic, version) != (MAGIC, VERSION):
            raise DescriptorError(
                f"the worker speaks {magic!r} version {version}, this client {MAGIC!r} version {VERSION}: install the "
                "same vllm-tap in both processes"
            )
        return cls(client, pid, pool_id)


class Reply(NamedTuple):
    """A packet of the worker after the first."""

    kind: int
    segment_id: int
    nbytes: int

    def encode(self) -> bytes:
        """Return the packet."""
        return REPLY_STRUCT.pack(*self)

    @classmethod
    def decode(cls, packet: bytes) -> Reply:
        """Check and read the packet."""
        if len(packet) != REPLY_STRUCT.size:
            raise DescriptorError(f"a packet of the worker has {len(packet)} bytes, expected {REPLY_STRUCT.size}")
        reply = cls(*REPLY_STRUCT.unpack(packet))
        if reply.kind not in (MAPPED, DROPPED, IN_FILE):
            raise DescriptorError(
                f"a packet of the worker has kind {reply.kind}, expected {MAPPED}, {DROPPED} or {IN_FILE}"
            )
        return reply


def encode_request(kind: int, numbers: Sequence[int]) -> bytes:
    """Return a client's packet."""
    return struct.pack(f"<I{len(numbers)}Q", kind, *numbers)


def decode_request(packet: bytes) -> tuple[int, tuple[int, ...]]:
    """Check and read a client's packet: its kind and its numbers."""
    num_numbers, rest = divmod(len(packet) - _KIND.size, 8)
    if rest or not 1 <= num_numbers <= MAX_RELEASE_IDS:
        raise DescriptorError(f"a client's packet has {len(packet)} bytes")
    kind, *numbers = struct.unpack(f"<I{num_numbers}Q", packet)
    if kind not in (MAP, RELEASE) or (kind == MAP and num_numbers != 1):
        raise DescriptorError(f"a client's packet has kind {kind} with {num_numbers} numbers")
    return kind, tuple(numbers)


def peer_uid(connection: socket.socket) -> int:
    """Return the user that the process at the other end had when it connected or listened."""
    _, uid, _ = _PEER.unpack(connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER.size))
    return int(uid)


def describe_uids(uids: Iterable[int]) -> str:
    """Return user numbers for a message."""
    return " or ".join(map(str, sorted(set(uids))))


def connect(address: str, kind: socket.SocketKind) -> socket.socket:
    """Return a blocking connection to a worker's abstract Unix socket.

    Raises:
        TransportError: nothing answers at the address, or something of another user.
    """
    connection = socket.socket(socket.AF_UNIX, kind)
    try:
        connection.settimeout(None)  # whatever `socket.setdefaulttimeout` says
        connection.connect(f"\0{address}")
        uid, allowed = peer_uid(connection), {0, os.geteuid()}
    except OSError as error:
        connection.close()
        raise TransportError(f"no worker answers at the socket {address!r} ({error}). {_HINT}", path=address) from error
    if uid not in allowed:
        connection.close()
        raise TransportError(
            f"the socket {address!r} belongs to user {uid}, expected {describe_uids(allowed)}. {_HINT}", path=address
        )
    return connection

"""Frames of the connection that tells a client where its blocks lie: little-endian integers, no objects.

Used by both processes.

    worker   u16 status, u16 zero, u32 nbytes; for status 1, so many bytes of text that say why there is no NIXL
    client   u32 count (1 to 4096), then so many u64 block ids
    worker   u32 nbytes of metadata, then for each block u64 address (0 for none) and u64 nbytes; then the metadata
    client   u32 zero, when it has read them
    worker   u32 count of those that were this client's from the first frame to this one

Between its two frames the worker serves what is read. The client takes bytes for rows only if all blocks are counted.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Final

from vllm_tap.errors import DescriptorError

OFFER: Final = struct.Struct("<HHI")
NBYTES: Final = struct.Struct("<I")
PLACE: Final = struct.Struct("<QQ")

OFFERED, REFUSED = 0, 1
"""Statuses of the worker's first frame."""

MAX_REASON_BYTES: Final = 4096
MAX_METADATA_BYTES: Final = 16 << 20


def checked_length(nbytes: int, most: int) -> int:
    """Return a length that a worker announces.

    Raises:
        DescriptorError: It is more than can be.
    """
    if nbytes > most:
        raise DescriptorError(f"the worker announces {nbytes} bytes, expected at most {most}")
    return nbytes


def encode_places(places: Sequence[tuple[int, int]], metadata: bytes) -> bytes:
    """Return the worker's answer."""
    return NBYTES.pack(len(metadata)) + b"".join(PLACE.pack(*place) for place in places) + metadata


def decode_places(data: bytes) -> list[tuple[int, int]]:
    """Return addresses and lengths."""
    return list(PLACE.iter_unpack(data))

"""Blocks of zstd frames, the form that `zstd` and `bytesplit` share.

Runs in the worker that encodes and in the client that decodes; needs the package `zstandard`.

The data are cut into blocks of at most 1 MiB, each block into `num_planes` planes, byte i of every element in plane i.
Encoded: for every block and plane a little-endian uint32 length and one zstd frame that states its content size; then
the bytes after the last whole element, as they are. Blocks keep the scratch memory of both sides at 1 MiB.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from vllm_tap.codec import base

BLOCK_BYTES: Final = 1 << 20
"""Part of the format. On bfloat16 states the ratio is 1.464 with 64 KiB and 1.467 from 256 KiB on; speed is noise."""

MAX_EXPANSION: Final = (128 << 10) // 4
"""The shortest zstd block, 3 bytes of header and one that is repeated, stands for at most 128 KiB."""

LENGTH: Final = struct.Struct("<I")

Bytes = npt.NDArray[np.uint8]


def blocks_of(array: Bytes, num_planes: int) -> Iterator[Bytes]:
    """Yield views [elements, num_planes] of at most 1 MiB of the whole elements in `array`."""
    elements = array[: array.size - array.size % num_planes].reshape(-1, num_planes)
    step = max(1, BLOCK_BYTES // num_planes)
    for start in range(0, len(elements), step):
        yield elements[start : start + step]


def encode(data: memoryview, num_planes: int, compressor: Any) -> bytes:
    """Compress plane after plane of block after block with `compressor`, a `zstandard.ZstdCompressor`."""
    array = np.frombuffer(base.flat(data), np.uint8)
    parts = []
    for block in blocks_of(array, num_planes):
        for plane in block.T:
            frame = compressor.compress(np.ascontiguousarray(plane).data)
            parts += [LENGTH.pack(len(frame)), frame]
    parts.append(array[array.size - array.size % num_planes :].tobytes())
    return b"".join(parts)


def decode(codec: str, data: memoryview, nbytes: int, num_planes: int) -> memoryview:
    """Decompress into one new buffer of `nbytes`; `num_planes` is that of the encoder."""
    base.check_lengths(codec, data, nbytes, num_planes, MAX_EXPANSION)
    zstandard = base.extra("zstandard", codec)
    decompressor = zstandard.ZstdDecompressor()
    source = base.flat(data)
    result = np.empty(nbytes, np.uint8)
    offset = 0
    for block in blocks_of(result, num_planes):
        for plane in block.T:
            frame, offset = _next_frame(codec, source, offset)
            plane[:] = np.frombuffer(_decompress(codec, zstandard, decompressor, frame, plane.size), np.uint8)
    tail = nbytes % num_planes
    if len(source) - offset != tail:
        raise base.corrupt(codec, f"{len(source) - offset} bytes after the last frame, expected {tail}")
    result[nbytes - tail :] = np.frombuffer(source[offset:], np.uint8)
    return result.data


def _next_frame(codec: str, source: memoryview, offset: int) -> tuple[memoryview, int]:
    """Return the frame at `offset` and the offset after it."""
    start = offset + LENGTH.size
    if start > len(source):
        raise base.corrupt(codec, f"expected a frame at byte {offset}, the data end at {len(source)}")
    end = start + LENGTH.unpack_from(source, offset)[0]
    if end > len(source):
        raise base.corrupt(codec, f"the frame at byte {start} ends at {end}, the data at {len(source)}")
    return source[start:end], end


def _decompress(codec: str, zstandard: Any, decompressor: Any, frame: memoryview, nbytes: int) -> bytes:
    """Decompress one frame of exactly `nbytes`.

    The content size that a frame states is what zstandard allocates, whatever limit it is given: so it is read first.
    """
    try:
        stated = zstandard.get_frame_parameters(frame).content_size
        if stated != nbytes:
            raise base.corrupt(codec, f"a frame states {stated} bytes, expected {nbytes}")
        plane: bytes = decompressor.decompress(frame, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise base.corrupt(codec, error) from error
    if len(plane) != nbytes:
        raise base.corrupt(codec, f"a frame holds {len(plane)} bytes, expected {nbytes}")
    return plane

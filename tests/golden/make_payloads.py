"""Writes the golden payload files beside it, without the package under test: `python make_payloads.py`. Run by hand.

The files are read by test_payload_files.py and are never written anew: a format that was released must still read.
"""

from __future__ import annotations

import json
import struct
import zlib
from pathlib import Path
from typing import Any

import lz4.block
import msgspec
import numpy as np
import zstandard

HERE = Path(__file__).parent
SPECIAL_BITS = (0x0000, 0x8000, 0x7F80, 0xFF80, 0x0001, 0x8001, 0x3F80, 0x7F7F)
"""Of bfloat16: zeros, infinities, least subnormals, one, and the greatest number."""


def bfloat16_bits(layer: int) -> np.ndarray:
    """Return [12, 20] bit patterns of bfloat16: eighths from -7.875 to 7.875, and the special ones first."""
    eighths = (np.arange(240) * (layer + 1)) % 127 - 63
    bits = ((eighths / 8).astype("<f4").view("<u4") >> 16).astype("<u2")
    bits[: len(SPECIAL_BITS)] = SPECIAL_BITS
    return bits.reshape(12, 20)


def widened(bits: np.ndarray) -> np.ndarray:
    """Return bfloat16 as float32."""
    return (bits.astype("<u4") << 16).view("<f4")


def lists_entry(bits: np.ndarray) -> dict[str, Any]:
    """Return a layer of the oldest form."""
    return {"data": widened(bits).tolist(), "shape": list(bits.shape), "dtype": "torch.bfloat16"}


def widened_entry(bits: np.ndarray) -> dict[str, Any]:
    """Return a layer of the form that widens to float32 bytes."""
    return {"data": widened(bits).tobytes(), "shape": list(bits.shape), "dtype": "torch.bfloat16"}


def zstd_frame(data: bytes) -> bytes:
    """Return a frame with its length in front."""
    frame = zstandard.ZstdCompressor(level=3).compress(data)
    return struct.pack("<I", len(frame)) + frame


def encoded(codec: str, data: bytes) -> bytes:
    """Return `data`, less than 1 MiB of 2-byte elements, as a codec of format 2 holds it."""
    if codec == "lz4":
        return lz4.block.compress(data, store_size=False)
    if codec == "zstd":
        return zstd_frame(data)
    if codec == "bytesplit":
        return zstd_frame(data[0::2]) + zstd_frame(data[1::2])
    return data


def format_2_entry(layer: int, bits: np.ndarray, codec: str) -> dict[str, Any]:
    """Return a layer of format 2."""
    rows, width = bits.shape
    header = b"%d torch.bfloat16 %d,%d\n" % (layer, rows, width)
    return {
        "data": encoded(codec, bits.tobytes()),
        "shape": [rows, width],
        "dtype": "torch.bfloat16",
        "format": 2,
        "codec": codec,
        "crc32": zlib.crc32(header + bits.tobytes()),
    }


def main() -> None:
    """Write one file per form and codec."""
    layers = {layer: bfloat16_bits(layer) for layer in (0, 7, 31)}
    finite = {layer: np.where(bits & 0x7F80 == 0x7F80, 0, bits).astype("<u2") for layer, bits in layers.items()}
    lists = {layer: lists_entry(bits) for layer, bits in finite.items()}
    (HERE / "payload-lists.json").write_text(json.dumps(lists))
    files = {"payload-widened": {layer: widened_entry(bits) for layer, bits in layers.items()}}
    for codec in ("raw", "lz4", "zstd", "bytesplit"):
        files[f"payload-2-{codec}"] = {layer: format_2_entry(layer, bits, codec) for layer, bits in layers.items()}
    for name, payload in files.items():
        (HERE / f"{name}.msgpack").write_bytes(msgspec.msgpack.encode(payload))


if __name__ == "__main__":
    main()

"""One layer of a payload of format 2, as workers write it. See `vllm_tap.legacy.payload` for the readers.

Runs in the worker, which writes, and in the client, which checks.
"""

from __future__ import annotations

import zlib
from typing import Any, Final

FORMAT: Final = 2


def checksum(layer: int, dtype: str, shape: tuple[int, ...], plain: memoryview | bytes) -> int:
    """Return the checksum of an entry: over its header line, then the bytes before encoding."""
    header = f"{layer} {dtype} {','.join(map(str, shape))}\n".encode("ascii")
    return zlib.crc32(plain, zlib.crc32(header))


def raw_entry(layer: int, dtype: str, shape: tuple[int, ...], plain: bytes) -> dict[str, Any]:
    """Return an entry whose bytes are not encoded: plain values alone, which any RPC carries.

    Args:
        layer: Decoder layer.
        dtype: `torch.` and a name that may cross.
        shape: Of the tensor.
        plain: Its elements, C-contiguous, little-endian.
    """
    return {
        "data": plain,
        "shape": list(shape),
        "dtype": dtype,
        "format": FORMAT,
        "codec": "raw",
        "crc32": checksum(layer, dtype, shape, plain),
    }

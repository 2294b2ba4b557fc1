"""zstd over the bytes as they are: for streams other than floating-point states, such as expert ids.

Runs in the worker that encodes and in the client that decodes; needs the package `zstandard`.
"""

from __future__ import annotations

from typing import Final

from vllm_tap.codec import base, blocks

LEVEL: Final = 1
"""On bfloat16 states levels 1, 3 and 6 give the same ratio to three digits, and 1 is the fastest."""


class Zstd:
    """Blocks of one plane."""

    name = "zstd"

    def encode(self, data: memoryview, itemsize: int) -> bytes:
        """Compress block by block at level 1."""
        if not data.nbytes:
            return b""
        compressor = base.extra("zstandard", self.name).ZstdCompressor(level=LEVEL)
        return blocks.encode(data, 1, compressor)

    def decode(self, data: memoryview, nbytes: int, itemsize: int) -> memoryview:
        """Decompress into one buffer of `nbytes`."""
        base.check_lengths(self.name, data, nbytes, itemsize, blocks.MAX_EXPANSION)
        return blocks.decode(self.name, data, nbytes, 1) if nbytes else memoryview(b"")

"""The lz4 block format: the fastest codec that compresses, and bfloat16 states hardly shrink under it.

Runs in the worker that encodes and in the client that decodes; needs the package `lz4`.
"""

from __future__ import annotations

from typing import Final

from vllm_tap.codec import base
from vllm_tap.errors import SpecError

MAX_BYTES: Final = 0x7E000000
"""LZ4_MAX_INPUT_SIZE: the longest input of one lz4 block."""

MAX_EXPANSION: Final = 255
"""One byte of a match length adds at most 255 bytes of output."""


class LZ4:
    """One lz4 block without the length in front that python-lz4 would add: the payload's header has it."""

    name = "lz4"

    def encode(self, data: memoryview, itemsize: int) -> bytes:
        """Compress all of `data` as one block."""
        if data.nbytes > MAX_BYTES:
            raise SpecError(f"codec 'lz4' takes at most {MAX_BYTES} bytes a tensor, got {data.nbytes}: use 'zstd'")
        if not data.nbytes:
            return b""
        block: bytes = base.extra("lz4.block", self.name).compress(base.flat(data), store_size=False)
        return block

    def decode(self, data: memoryview, nbytes: int, itemsize: int) -> memoryview:
        """Decompress into a buffer of `nbytes`, which lz4 never writes past."""
        base.check_lengths(self.name, data, nbytes, itemsize, MAX_EXPANSION)
        if nbytes > MAX_BYTES:
            raise base.corrupt(self.name, f"one block holds at most {MAX_BYTES} bytes, {nbytes} are declared")
        if not nbytes:
            return memoryview(b"")
        block = base.extra("lz4.block", self.name)
        try:
            result = block.decompress(base.flat(data), uncompressed_size=nbytes, return_bytearray=True)
        except (block.LZ4BlockError, ValueError) as error:
            raise base.corrupt(self.name, error) from error
        if len(result) != nbytes:
            raise base.corrupt(self.name, f"expected {nbytes} bytes, got {len(result)}")
        return memoryview(result)

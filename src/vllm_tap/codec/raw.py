"""The codec that does nothing: the reference for all others, and the right one within a host.

Runs in the worker that encodes and in the client that decodes.
"""

from __future__ import annotations

from vllm_tap.codec import base
from vllm_tap.errors import DescriptorError


class Raw:
    """The bytes as they are."""

    name = "raw"

    def encode(self, data: memoryview, itemsize: int) -> bytes:
        """Return a copy of `data`."""
        return bytes(base.flat(data))

    def decode(self, data: memoryview, nbytes: int, itemsize: int) -> memoryview:
        """Return `data` itself, once its length is right."""
        base.check_lengths(self.name, data, nbytes, itemsize, max_expansion=1)
        if data.nbytes != nbytes:
            raise DescriptorError(f"codec 'raw': expected {nbytes} bytes, got {data.nbytes}")
        return base.flat(data)

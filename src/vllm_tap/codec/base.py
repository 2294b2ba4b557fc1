"""The base of all codecs, and the checks that each makes before it allocates.

Runs in the worker that encodes and in the client that decodes.
"""

from __future__ import annotations

import importlib
from typing import Any, Protocol

from vllm_tap.errors import DescriptorError, SpecError


class Codec(Protocol):
    """Turns the bytes of an array into fewer bytes, and back into exactly the same ones.

    The encoded form carries neither length nor checksum: both travel in the header of the payload, beside the name.
    """

    name: str

    def encode(self, data: memoryview, itemsize: int) -> bytes:
        """Return `data`, the bytes of elements of `itemsize` bytes each, in encoded form. No data, no bytes."""
        ...

    def decode(self, data: memoryview, nbytes: int, itemsize: int) -> bytes | memoryview:
        """Return the `nbytes` bytes that `data` stands for. The result may be a view of `data`.

        The caller has checked `nbytes` against its own limit. Beyond the result, a codec may allocate one block of
        1 MiB.

        Raises:
            DescriptorError: `data` does not decode to exactly `nbytes` bytes, or has bytes left over.
        """
        ...


def flat(data: memoryview) -> memoryview:
    """Return `data` as contiguous unsigned bytes, without a copy."""
    return data.cast("B") if data.nbytes else memoryview(b"")


def check_lengths(codec: str, data: memoryview, nbytes: int, itemsize: int, max_expansion: int) -> None:
    """Refuse a declared length that `data` cannot decode to, before anything is allocated."""
    if nbytes < 0 or itemsize < 1:
        raise DescriptorError(f"codec {codec!r}: cannot decode to {nbytes} bytes of {itemsize}-byte elements")
    if nbytes > data.nbytes * max_expansion or (data.nbytes and not nbytes):
        raise DescriptorError(
            f"codec {codec!r}: {data.nbytes} encoded bytes cannot stand for {nbytes} (at most {max_expansion} each): "
            "the shape or the data were changed on their way"
        )


def corrupt(codec: str, reason: object) -> DescriptorError:
    """Return the error for encoded bytes that do not decode."""
    return DescriptorError(f"codec {codec!r}: the encoded bytes do not decode ({reason}): send the payload again")


def extra(module: str, codec: str) -> Any:
    """Import an optional package on first use.

    Raises:
        SpecError: the package is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise SpecError(
            f"codec {codec!r} needs the package {module.partition('.')[0]!r}, which is not installed here: "
            "pip install vllm-tap[codecs], or use codec='raw'",
            codec=codec,
        ) from error

"""The tests that every codec passes, for those who write one: `check(MyCodec())`. Needs no test framework.

Runs wherever you test.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Iterator
from typing import Final

import numpy as np

from vllm_tap.codec.base import Codec
from vllm_tap.errors import DescriptorError

SIZES: Final = (0, 1, 2, 3, 7, 8, 15, 4095, 4096, 4097, (1 << 20) + 5)
ITEMSIZES: Final = (1, 2, 4, 8)
NUM_MUTATIONS: Final = 200


def check(codec: Codec, seed: int = 0) -> int:
    """Run all checks on `codec` and return how many there were.

    Raises:
        AssertionError: a check failed; the message names the case.
    """
    done = 0
    for label, data, itemsize in cases(seed):
        encoded = codec.encode(memoryview(data), itemsize)
        check_round_trip(codec, label, data, encoded, itemsize)
        check_lengths(codec, label, len(data), encoded, itemsize)
        done += 2
    for label, data, itemsize in cases(seed):
        if len(data) == 4096:
            check_mutations(codec, label, data, itemsize, seed)
            done += NUM_MUTATIONS
    return done


def cases(seed: int) -> Iterator[tuple[str, bytes, int]]:
    """Yield (label, data, itemsize): noise, constants and bfloat16 that looks like hidden states, of every size."""
    rng = np.random.default_rng(seed)
    for size in SIZES:
        contents = {
            "random": rng.bytes(size),
            "all equal": b"\x3f" * size,
            "bfloat16": bfloat16_states(rng, size),
        }
        for kind, data in contents.items():
            for itemsize in ITEMSIZES:
                yield f"{size} bytes, {kind}, itemsize {itemsize}", data, itemsize


def bfloat16_states(rng: np.random.Generator, size: int) -> bytes:
    """Return `size` bytes of bfloat16: normal values, and every 64th dimension a hundred times larger."""
    values = rng.normal(size=size // 2 + 1).astype(np.float32)
    values[::64] *= 100
    return (values.view(np.uint32) >> 16).astype("<u2").tobytes()[:size]


def check_round_trip(codec: Codec, label: str, data: bytes, encoded: bytes, itemsize: int) -> None:
    """Check that encoded bytes are plain `bytes` and decode to the same data."""
    _require(type(encoded) is bytes, label, f"encode returned {type(encoded).__name__}, expected bytes")
    _require(bool(data) or not encoded, label, "no data became some bytes")
    decoded = codec.decode(memoryview(encoded), len(data), itemsize)
    _require(bytes(decoded) == data, label, "decoded bytes differ from what was encoded")


def check_lengths(codec: Codec, label: str, nbytes: int, encoded: bytes, itemsize: int) -> None:
    """Wrong declared lengths, missing and surplus bytes are refused, and a lie in terabytes before it is allocated."""
    for declared in (nbytes + 1, nbytes - 1, nbytes + itemsize, -1, 1 << 43):
        _require(_refused(codec, encoded, declared, itemsize), label, f"declared {declared} bytes, had {nbytes}")
    for extended in (encoded + b"\0", encoded + encoded[:16] + b"\1"):
        _require(_refused(codec, extended, nbytes, itemsize), label, "surplus bytes were accepted")
    for end in {0, 1, len(encoded) // 2, len(encoded) - 1} & set(range(len(encoded))):
        _require(_refused(codec, encoded[:end], nbytes, itemsize), label, f"cut to {end} bytes and accepted")


def check_mutations(codec: Codec, label: str, data: bytes, itemsize: int, seed: int) -> None:
    """A flipped bit is refused, or gives as many bytes as declared that the checksum of the payload tells apart."""
    rng = random.Random(seed)
    encoded = codec.encode(memoryview(data), itemsize)
    for _ in range(NUM_MUTATIONS):
        changed = bytearray(encoded)
        changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
        try:
            decoded = bytes(codec.decode(memoryview(changed), len(data), itemsize))
        except DescriptorError:
            continue
        _require(len(decoded) == len(data), label, f"a flipped bit gave {len(decoded)} bytes")
        same = decoded == data
        _require(same or zlib.crc32(decoded) != zlib.crc32(data), label, "a flipped bit went unnoticed")


def _refused(codec: Codec, encoded: bytes, nbytes: int, itemsize: int) -> bool:
    try:
        codec.decode(memoryview(encoded), nbytes, itemsize)
    except DescriptorError:
        return True
    return False


def _require(condition: bool, label: str, message: str) -> None:
    if not condition:
        raise AssertionError(f"{label}: {message}")

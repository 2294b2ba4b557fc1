"""Checksums are zlib's, whoever computes them."""

from __future__ import annotations

import random
import zlib

import pytest

from vllm_tap.store.checksum import crc32


@pytest.mark.parametrize("nbytes", [0, 1, 63, 100_001])
def test_checksums_are_those_of_zlib(nbytes: int) -> None:
    """Of bytes, of views of them, and in pieces."""
    data = random.Random(nbytes).randbytes(nbytes)
    assert crc32(data) == zlib.crc32(data) == crc32(memoryview(data)[nbytes // 3 :], crc32(data[: nbytes // 3]))

"""CRC-32 of files: zlib's, by isal where that is installed, which takes a third of the time. In any process."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from contextlib import suppress


def _fastest() -> Callable[[bytes | memoryview, int], int]:
    """Return isal's function where isal is installed, and zlib's elsewhere."""
    function: Callable[[bytes | memoryview, int], int] = zlib.crc32
    with suppress(ImportError):
        from isal import isal_zlib

        function = isal_zlib.crc32
    return function


_CRC32 = _fastest()


def crc32(data: bytes | memoryview, before: int = 0) -> int:
    """Return the CRC-32 of bytes that follow those of another one."""
    return _CRC32(data, before)

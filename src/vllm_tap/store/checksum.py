"""CRC-32 of files: zlib's, by isal where that is installed, which takes a third of the time. In any process."""

from __future__ import annotations

try:
    from isal import isal_zlib as implementation
except ImportError:
    import zlib as implementation


def crc32(data: bytes | memoryview, before: int = 0) -> int:
    """Return the CRC-32 of bytes that follow those of another one."""
    checksum: int = implementation.crc32(data, before)
    return checksum

"""Ranges and encodings of bodies: what a client asks for, and that nothing else changes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable
from typing import Any

import numpy as np
import pytest

from vllm_tap import codec
from vllm_tap.frame import body
from vllm_tap.serve import bodies

DATA = bytes(range(100))


async def _pieces(pieces: Iterable[bytes]) -> AsyncIterator[bytes]:
    for piece in pieces:
        yield piece


def whole(pieces: AsyncIterator[bytes]) -> list[bytes]:
    """Return all pieces."""

    async def read() -> list[bytes]:
        return [piece async for piece in pieces]

    return asyncio.run(read())


@pytest.mark.parametrize(
    ("header", "expected"),
    [
        ("bytes=0-9", DATA[:10]),
        ("bytes=7-", DATA[7:]),
        ("bytes=-3", DATA[-3:]),
        ("bytes=-1000", DATA),
        ("bytes=90-1000", DATA[90:]),
        (" bytes=99-99 ", DATA[99:]),
    ],
)
@pytest.mark.parametrize("size", [1, 7, 100])
def test_a_range_is_what_its_bytes_are(header: str, expected: bytes, size: int) -> None:
    """However the body is cut into pieces."""
    found = bodies.byte_range(header, len(DATA))
    assert found is not None
    cut = bodies.cut(_pieces(DATA[at : at + size] for at in range(0, len(DATA), size)), *found)
    assert b"".join(whole(cut)) == expected


@pytest.mark.parametrize("header", ["", "bytes", "bytes=-", "bytes=5-3", "bytes=0-1,4-5", "items=0-1", "bytes=x-", "½"])
def test_what_is_no_range_gives_all(header: str) -> None:
    """As HTTP has it."""
    assert bodies.byte_range(header, 100) is None


@pytest.mark.parametrize("header", ["bytes=100-", "bytes=200-300", "bytes=-0"])
def test_a_range_behind_the_end_is_told(header: str) -> None:
    """It has no byte."""
    with pytest.raises(bodies.UnsatisfiableError):
        bodies.byte_range(header, 100)


@pytest.mark.parametrize(
    ("accepted", "expected"),
    [
        ("", ""),
        ("*", ""),
        ("gzip, deflate", ""),
        ("identity", ""),
        ("gzip, zstd", ""),
        ("vtr-zstd", "vtr-zstd"),
        ("vtr-zstd;q=0", ""),
        ("vtr-zstd;q=x", ""),
        ("vtr-zstd;q=0.5, vtr-lz4", "vtr-lz4"),
        ("vtr-raw, vtr-nothing", ""),
        ("VTR-Bytesplit ; q=1.0", "vtr-bytesplit"),
    ],
)
def test_a_coding_is_one_that_the_client_names(accepted: str, expected: str) -> None:
    """The one that it likes best."""
    assert bodies.coding(accepted) == expected


@pytest.mark.parametrize("name", [name for name in codec.names() if name != "raw"])
def test_frames_say_how_their_data_are_encoded(name: str) -> None:
    """Small ones go as they are; heads stay."""
    rows = np.random.default_rng(0).normal(size=(64, 32)).astype(np.float16).tobytes()
    frames = [body.encode("begin", id="x"), body.encode("rows", rows, planes=[["hidden_states", 1, "float16", 32]])]
    plain = body.frames(b"".join([*frames, body.encode("end")]))
    sent = whole(bodies.encoded(_pieces([*frames, body.encode("end")]), f"vtr-{name}"))
    assert sent[0] == frames[0]
    first, second, last = body.frames(b"".join(sent))
    named: Any = second.head.pop("codec")
    assert [first, second.head, last] == [plain[0], plain[1].head, plain[2]]
    assert named == [name, len(rows), 2]
    assert bytes(codec.get(name).decode(memoryview(second.data), len(rows), 2)) == rows

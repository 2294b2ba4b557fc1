"""Frames of rows over HTTP: what was written is read, whatever the pieces; what is no frame is refused."""

from __future__ import annotations

import contextlib
import itertools
import struct

import pytest
from hypothesis import given, strategies

from vllm_tap.errors import DescriptorError, TapError
from vllm_tap.frame import body

WHOLE = (
    body.encode("begin", id="x")
    + body.encode("rows", bytes(range(40)), rows=5, planes=[])
    + body.encode("choice", token_ids=[1, 2])
    + body.encode("end")
)


@given(strategies.lists(strategies.integers(0, len(WHOLE)), max_size=9))
def test_frames_come_out_of_any_pieces(cuts: list[int]) -> None:
    """The same, in order."""
    reader, bounds = body.Reader(), [0, *sorted(cuts), len(WHOLE)]
    found = [frame for begin, end in itertools.pairwise(bounds) for frame in reader.feed(WHOLE[begin:end])]
    reader.finish()
    assert found == body.frames(WHOLE)
    assert [frame.head["kind"] for frame in found] == ["begin", "rows", "choice", "end"]
    assert found[1].data == bytes(range(40))


def test_a_frame_has_these_bytes() -> None:
    """The format is public."""
    head = b'{"kind":"rows","rows":1}'
    assert body.encode("rows", b"abc", rows=1) == b"vtr1" + struct.pack("<IQ", len(head), 3) + head + b"abc"


@pytest.mark.parametrize(
    "data",
    [
        b"",
        WHOLE[:-1],
        WHOLE[: -len(body.encode("end"))],
        WHOLE + body.encode("end"),
        b"x" * 100,
        struct.pack("<4sIQ", b"vtr1", 1 << 30, 0),
        struct.pack("<4sIQ", b"vtr1", 2, 1 << 60),
        struct.pack("<4sIQ", b"vtr1", 2, 0) + b"[]",
        struct.pack("<4sIQ", b"vtr1", 2, 0) + b"{}",
        struct.pack("<4sIQ", b"vtr1", 2, 0) + b"\xff\xff",
    ],
)
def test_what_is_no_body_is_refused(data: bytes) -> None:
    """Also one that was cut off."""
    with pytest.raises(DescriptorError):
        body.frames(data)


@given(strategies.integers(0, len(WHOLE) - 1), strategies.integers(0, 255))
def test_a_changed_byte_is_read_or_refused(at: int, byte: int) -> None:
    """Nothing else happens."""
    changed = bytearray(WHOLE)
    changed[at] = byte
    with contextlib.suppress(TapError):
        body.frames(bytes(changed))


def test_large_data_stay_where_they_are_and_small_ones_are_put_together() -> None:
    """The bytes are those of any other frame."""
    large, small = memoryview(bytes(body.JOINED_BYTES)), [memoryview(bytes([number] * 100)) for number in range(5)]
    data = [*small[:2], large, *small[2:], large, large]
    frame = body.encode_around("rows", *data, rows=1)
    assert bytes(frame) == body.encode("rows", *data, rows=1)
    assert len(frame) == len(bytes(frame))
    assert [piece is large for piece in frame.pieces] == [False, True, False, True, True]
    (read,) = body.Reader().feed(bytes(frame))
    assert read.data == b"".join(data)

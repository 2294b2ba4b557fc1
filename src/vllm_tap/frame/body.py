"""Bodies of HTTP replies with rows: frames behind one another. Runs in the server and in its clients.

A frame, all integers little-endian:

    "vtr1", u32 bytes of the head, u64 bytes of the data, the head (a JSON object), the data

The head's `kind` says what it is. First comes one of `begin`, last one of `end` or of `error`:

    begin    facts of the capture: `id`, `spec`, `num_layers`, `conventions`, `routing`, `has_final_norm`, `model`
    rows     rows of a choice, ascending: positions int32 [rows], token ids int32 [rows], then for each of `planes`
             [stream, layer, dtype, width] its elements [rows, width]; `prompt` and `completion` say of which choice
             With `codec`, [name, bytes, element size], the data of the frame are encoded: so many bytes of elements
    choice   the end of a choice: `prompt_token_ids` and `token_ids`, its whole sequence
    error    `message`: what ended the capture early
    end      nothing more comes

Nothing else stands between them. A reader refuses a body that ends without `end` or `error`.
"""

from __future__ import annotations

import itertools
import json
import struct
from collections.abc import Iterator
from typing import Any, Final, NamedTuple

import msgspec

from vllm_tap.errors import DescriptorError

MEDIA_TYPE: Final = "application/octet-stream"

KINDS: Final = ("begin", "rows", "choice", "error", "end")

MAX_HEAD_BYTES: Final = 16 << 20
MAX_DATA_BYTES: Final = 1 << 36

JOINED_BYTES: Final = 1 << 16
"""Smaller pieces are put together: to send each alone takes longer than to copy it."""

Piece = bytes | memoryview
"""Bytes of a body."""

_PREFIX = struct.Struct("<4sIQ")
_MAGIC = b"vtr1"


class Frame(NamedTuple):
    """A frame of a body."""

    head: dict[str, Any]
    data: bytes


class Encoded:
    """A frame as bytes in pieces: `bytes` of it puts them together.

    Attributes:
        pieces: Behind one another.
    """

    __slots__ = ("_num_bytes", "pieces")

    def __init__(self, *pieces: Piece) -> None:
        self.pieces = pieces
        self._num_bytes = sum(map(len, pieces))

    def __len__(self) -> int:
        return self._num_bytes

    def __bytes__(self) -> bytes:
        return b"".join(self.pieces)


def encode(kind: str, *data: Piece, **head: Any) -> bytes:
    """Return a frame as bytes: of a head in plain values, and data behind one another, which are copied once."""
    return bytes(encode_around(kind, *data, **head))


def encode_around(kind: str, *data: Piece, **head: Any) -> Encoded:
    """Return a frame whose large data, of one byte an element, are not copied: nobody may change them any more."""
    text = msgspec.json.encode({"kind": kind, **head})
    prefix = _PREFIX.pack(_MAGIC, len(text), sum(map(len, data)))
    pieces: list[Piece] = []
    for is_small, some in itertools.groupby((prefix, text, *data), lambda piece: len(piece) < JOINED_BYTES):
        alike = list(some)
        pieces += [b"".join(alike)] if is_small else alike
    return Encoded(*pieces)


class Reader:
    """Frames out of a body, of which pieces come one after another."""

    def __init__(self) -> None:
        self._pending = bytearray()
        self.has_ended = False

    def feed(self, piece: Piece) -> Iterator[Frame]:
        """Yield the frames that are complete now.

        Raises:
            DescriptorError: Bytes that are no frame.
        """
        self._pending += piece
        while (frame := self._next()) is not None:
            if self.has_ended:
                raise DescriptorError("a body of rows goes on behind its end")
            self.has_ended = frame.head["kind"] in ("end", "error")
            yield frame

    def finish(self) -> None:
        """Check that the body is complete.

        Raises:
            DescriptorError: It is not.
        """
        if self._pending or not self.has_ended:
            raise DescriptorError("a body of rows was cut off: ask for it again")

    def _next(self) -> Frame | None:
        if len(self._pending) < _PREFIX.size:
            return None
        magic, num_head, num_data = _PREFIX.unpack_from(self._pending)
        if magic != _MAGIC or num_head > MAX_HEAD_BYTES or num_data > MAX_DATA_BYTES:
            raise DescriptorError(f"a frame of rows begins with {bytes(self._pending[: _PREFIX.size])!r}")
        begin = _PREFIX.size + num_head
        if len(self._pending) < begin + num_data:
            return None
        head = _head(bytes(self._pending[_PREFIX.size : begin]))
        data = bytes(self._pending[begin : begin + num_data])
        del self._pending[: begin + num_data]
        return Frame(head, data)


def frames(body: bytes) -> list[Frame]:
    """Return the frames of a whole body.

    Raises:
        DescriptorError: It is none.
    """
    reader = Reader()
    found = list(reader.feed(body))
    reader.finish()
    return found


def _head(text: bytes) -> dict[str, Any]:
    try:
        head = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DescriptorError(f"the head of a frame is no JSON: {error}") from None
    if not isinstance(head, dict) or head.get("kind") not in KINDS:
        raise DescriptorError(f"the head of a frame is no object of a known kind: {text[:200]!r}")
    return head

"""Bodies of replies as a client wants them: a range of their bytes, or encoded. In an API process."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any, Final

from vllm_tap import codec
from vllm_tap.frame import body
from vllm_tap.store.dtypes import DTYPES

RANGE: Final = re.compile(r"bytes=(\d{0,18})-(\d{0,18})", re.ASCII)

OURS: Final = "vtr-"
"""Beginning of the names of content codings that are codecs of this package: frames whose data are encoded."""

LEAST_BYTES: Final = 1 << 10
"""Frames of less data go as they are."""

Pieces = AsyncIterator[body.Piece]


class UnsatisfiableError(ValueError):
    """A range of bytes that a body does not have."""


def byte_range(header: str, total: int) -> tuple[int, int] | None:
    """Return the half-open range of bytes that a Range header asks for; None for all, also for several ranges.

    Raises:
        UnsatisfiableError: The body has no byte of it.
    """
    match = RANGE.fullmatch(header.strip())
    if match is None or match.groups() == ("", ""):
        return None
    first, last = match.groups()
    begin, end = int(first or max(total - int(last or 0), 0)), total
    if first and last:
        if int(last) < begin:
            return None
        end = min(int(last) + 1, total)
    if begin >= end:
        raise UnsatisfiableError(header)
    return begin, end


async def cut(pieces: Pieces, begin: int, end: int) -> Pieces:
    """Yield a range of the bytes of pieces behind one another."""
    at = 0
    async for piece in pieces:
        if at < end and at + len(piece) > begin:
            yield piece[max(begin - at, 0) : end - at]
        at += len(piece)


def coding(accepted: str) -> str:
    """Return the content coding of ours that a client likes best; nothing for frames as they are.

    Args:
        accepted: Its Accept-Encoding, of which names alone count, no wildcard. Codings of HTTP, which clients ask for
            unasked, cost more time than they save on a fast link.
    """
    known = {OURS + name: name for name in codec.names() if name != "raw"}
    liked = [(_weight(parts), parts[0].strip().lower()) for parts in (one.split(";") for one in accepted.split(","))]
    liked = [(weight, name) for weight, name in liked if weight > 0 and name in known and codec.installed(known[name])]
    return max(liked, key=lambda one: one[0])[1] if liked else ""


def _weight(parts: list[str]) -> float:
    for part in parts[1:]:
        name, _, value = part.strip().partition("=")
        if name.strip().lower() == "q":
            try:
                return float(value)
            except ValueError:
                return 0.0
    return 1.0


async def encoded(pieces: Pieces, name: str) -> AsyncIterator[bytes]:
    """Yield frames in a content coding of ours: their data are encoded by a codec."""
    encode, reader = _encoder(name.removeprefix(OURS)), body.Reader()
    async for piece in pieces:
        for frame in await asyncio.to_thread(list, reader.feed(piece)):
            yield await asyncio.to_thread(encode, frame)


def _encoder(name: str) -> Callable[[body.Frame], bytes]:
    encoder = codec.get(name)

    def encode(frame: body.Frame) -> bytes:
        if len(frame.data) < LEAST_BYTES:
            return body.encode(frame.head.pop("kind"), frame.data, **frame.head)
        itemsize = _itemsize(frame.head)
        data = encoder.encode(memoryview(frame.data), itemsize)
        head = {**frame.head, "codec": [name, len(frame.data), itemsize]}
        return body.encode(head.pop("kind"), data, **head)

    return encode


def _itemsize(head: Mapping[str, Any]) -> int:
    """Return the size of the elements of the first plane, for codecs that split elements."""
    planes = head.get("planes") or [("", 0, "int32", 1)]
    return DTYPES[planes[0][2]].itemsize

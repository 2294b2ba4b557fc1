"""Whole results in formats that other programs read. In an API process."""

from __future__ import annotations

import io
import json
import struct
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final, NamedTuple

import numpy as np

from vllm_tap.frame import body
from vllm_tap.store.dtypes import DTYPES, to_numpy

Pieces = Sequence[body.Piece]
"""Of a whole result."""


class Choice(NamedTuple):
    """Part of a result that a format of one array holds."""

    prompt: int
    completion: int
    stream: str
    layer: int


class Plane(NamedTuple):
    """A tensor of one choice: its name, element type and shape, and its bytes in pieces."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    pieces: list[bytes]


def planes(whole: Pieces) -> dict[tuple[int, int, str, int], Plane]:
    """Return the tensors of a result by prompt, completion, stream and layer; labels are streams of layer -1.

    Raises:
        LookupError: The result ended early.
    """
    found: dict[tuple[int, int, str, int], Plane] = {}
    for head, data in body.frames(b"".join(whole)):
        if head["kind"] == "error":
            raise LookupError(f"these rows ended early: {head['message']}")
        if head["kind"] != "rows":
            continue
        for key, dtype, width, piece in _pieces(head, data):
            place = (head["prompt"], head["completion"], *key)
            name = ".".join(map(str, place)).removesuffix(".-1")
            old = found.get(place, Plane(name, dtype, (0, *width), []))
            found[place] = old._replace(shape=(old.shape[0] + head["rows"], *width), pieces=[*old.pieces, piece])
    return found


def _pieces(head: dict[str, Any], data: bytes) -> Iterator[tuple[tuple[str, int], str, tuple[int, ...], bytes]]:
    begin = 0
    labels: list[tuple[tuple[str, int], str, tuple[int, ...]]] = [
        (("positions", -1), "int32", ()),
        (("token_ids", -1), "int32", ()),
    ]
    tensors = [((stream, layer), dtype, (width,)) for stream, layer, dtype, width in head["planes"]]
    for key, dtype, width in [*labels, *tensors]:
        end = begin + head["rows"] * int(np.prod(width, dtype=np.int64)) * DTYPES[dtype].itemsize
        yield key, dtype, width, data[begin:end]
        begin = end


def safetensors(whole: Pieces, _: Choice) -> bytes:
    """Return a safetensors file of all choices: `<prompt>.<completion>.<stream>.<layer>`, `....positions` and so on."""
    header: dict[str, Any] = {}
    pieces: list[bytes] = []
    end = 0
    for plane in planes(whole).values():
        begin, end = end, end + sum(map(len, plane.pieces))
        code = DTYPES[plane.dtype].code
        header[plane.name] = {"dtype": code, "shape": list(plane.shape), "data_offsets": [begin, end]}
        pieces += plane.pieces
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return b"".join([struct.pack("<Q", len(text)), text, *pieces])


def npy(whole: Pieces, choice: Choice) -> bytes:
    """Return a numpy file of one layer of one choice; bfloat16 comes as float32, without loss.

    Raises:
        LookupError: The result has no such layer.
    """
    found = planes(whole)
    plane = next((found[place] for place in _places(whole, choice) if place in found), None)
    if plane is None:
        names = ", ".join(plane.name for plane in found.values())
        raise LookupError(
            "format=npy has one stream of one choice, as in ?format=npy&stream=hidden_states&layer=8&prompt=0&"
            f"completion=0. This result has no {'.'.join(map(str, choice))}, but {names}."
        )
    data = np.frombuffer(b"".join(plane.pieces), np.uint8)
    file = io.BytesIO()
    np.save(file, to_numpy(data, plane.dtype, plane.shape[1]))
    return file.getvalue()


def _places(whole: Pieces, choice: Choice) -> Iterator[tuple[int, int, str, int]]:
    """Yield where a choice may lie: labels have no layer, and negative layers count from the last one."""
    yield choice.prompt, choice.completion, choice.stream, -1
    (begin,) = body.Reader().feed(whole[0])  # the first frame has no data, so it is a piece
    num_layers = begin.head.get("num_layers", 0) if choice.layer < 0 else 0
    yield choice.prompt, choice.completion, choice.stream, choice.layer + num_layers


NAMES: Final[dict[str, Callable[[Pieces, Choice], bytes]]] = {"safetensors": safetensors, "npy": npy}

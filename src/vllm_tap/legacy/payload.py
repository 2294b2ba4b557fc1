"""Payloads `{layer_id: {"data", "shape", "dtype"}}`: the two old forms and the versioned one, to tensors and back.

Runs in the client, which reads payloads, and in the worker, which writes them; plain values alone, so any RPC will do.

| form | keys | data |
|---|---|---|
| lists | data, shape, dtype | nested list of numbers |
| widened | data, shape, dtype | float32 bytes, whatever the dtype |
| 2 | data, shape, dtype, format, codec, crc32 | bytes of the dtype itself, little-endian, encoded by the codec |

`dtype` is `torch.` and a name that may cross. `crc32` is over the ASCII line `layer dtype d0,d1,...`, a newline, and
the bytes before encoding: a changed key, shape or dtype is noticed, too. All headers and lengths are checked before the
first tensor is allocated; what is compressed, and lists, stay under a limit besides.
"""

from __future__ import annotations

import math
import reprlib
import sys
from collections.abc import Iterator, Mapping
from itertools import pairwise
from typing import Any, Final, NamedTuple, NoReturn

import numpy as np
import torch

from vllm_tap import codec as codecs
from vllm_tap.errors import CaptureError, DescriptorError, SpecError
from vllm_tap.frame.entry import FORMAT, checksum
from vllm_tap.frame.layout import ITEMSIZE

LIMIT_BYTES: Final = 1 << 30
DTYPES: Final[dict[str, torch.dtype]] = {f"torch.{name}": getattr(torch, name) for name in ITEMSIZE}
WIDENED: Final = ("torch.float32", "torch.bfloat16", "torch.float16")
OLD_KEYS: Final = frozenset({"data", "shape", "dtype"})
KEYS: Final = OLD_KEYS | {"format", "codec", "crc32"}
MAX_DIMS: Final = 8
MAX_MESSAGE: Final = 1000
MAX_BYTES: Final = (1 << 63) - 1
MAX_LAYER: Final = 1 << 20
CHUNK: Final = 1 << 18
"""Elements that are narrowed at a time: the scratch is 1 MiB."""


class Entry(NamedTuple):
    """One layer of a payload, its header already checked."""

    layer: int
    shape: tuple[int, ...]
    dtype: str
    data: Any
    codec: str | None = None
    crc32: int = 0

    @property
    def num_elements(self) -> int:
        return math.prod(self.shape)

    @property
    def itemsize(self) -> int:
        return DTYPES[self.dtype].itemsize

    @property
    def nbytes(self) -> int:
        return self.num_elements * self.itemsize

    @property
    def limited_bytes(self) -> int:
        """Bytes that count against the limit: of what may be larger than `data`, and of lists, empty ones included."""
        grows = isinstance(self.data, list | int | float) or self.codec not in (None, "raw")
        return math.prod(max(1, size) for size in self.shape) * self.itemsize if grows else 0


def serialize(states: Mapping[int, torch.Tensor], codec: str = "raw") -> dict[int, dict[str, Any]]:
    """Turn tensors into a payload of form 2. The payload holds copies.

    Args:
        states: tensors by layer, any shape of up to 8 dims.
        codec: name of the codec that encodes the bytes; `vllm_tap.codec.choose.auto` picks one.

    Returns:
        Plain dicts, strings, ints, lists and bytes, keyed by layer.

    Raises:
        SpecError: an unknown codec, a codec whose package is missing, or a layer that no payload can carry.
    """
    _require_little_endian()
    return {layer: _write(layer, tensor, codec) for layer, tensor in states.items()}


def deserialize(payload: Mapping[Any, Any], *, limit_bytes: int = LIMIT_BYTES) -> dict[int, torch.Tensor]:
    """Turn a payload of any form into tensors that own their memory.

    Args:
        payload: what one worker returned. Layers may be ints or their decimal strings.
        limit_bytes: most bytes that all lists and compressed layers together may become; other forms are as long as
            their tensors.

    Returns:
        Tensors of the shape and dtype that were stored, on the CPU, by layer in ascending order.

    Raises:
        CaptureError: the worker sent `{"error": ...}` instead of layers.
        DescriptorError: a header or a length that does not validate, before any tensor is allocated; or encoded bytes
            that do not decode, or whose checksum differs.
        SpecError: a codec whose package is missing.

    Source:
        The payload; form `widened` is cast from float32, lists of floats are, too.

    Cost:
        One copy. Beyond the tensors, 1 MiB of scratch, or the longest of the innermost lists.
    """
    if not isinstance(payload, Mapping):
        got = type(payload).__name__
        raise DescriptorError(f"a payload is a dict of one worker, got {got}: pass one item of the RPC's list")
    if set(payload) == {"error"}:
        error = payload["error"]
        raise CaptureError(f"the worker could not: {error[:MAX_MESSAGE] if isinstance(error, str) else _short(error)}")
    entries = sorted((_check(key, entry) for key, entry in payload.items()), key=lambda entry: entry.layer)
    for before, after in pairwise(entries):
        if before.layer == after.layer:
            _refuse(after.layer, "is there twice, as a number and as a string", "send it once")
    total = sum(entry.limited_bytes for entry in entries)
    if total > limit_bytes:
        raise DescriptorError(
            f"the payload's lists and compressed layers would take {total} bytes, the limit is {limit_bytes}: "
            "if you trust the sender, call vllm_tap.legacy.payload.deserialize with a larger limit_bytes"
        )
    for entry in entries:
        if isinstance(entry.data, list | int | float):
            _check_lists(entry)  # after the limit: lists that hold one another many times would be walked for ever
    return {entry.layer: _read(entry) for entry in entries}


# -- writing ---------------------------------------------------------------------------------------------------------


def _write(layer: int, tensor: torch.Tensor, codec: str) -> dict[str, Any]:
    dtype = str(tensor.dtype)
    if type(layer) is not int or not 0 <= layer < MAX_LAYER:
        raise SpecError(f"layer {layer!r}: expected an int from 0 to {MAX_LAYER - 1}", layer=layer)
    if dtype not in DTYPES:
        raise SpecError(f"layer {layer}: dtype {dtype} is not one of {list(DTYPES)}: cast first", layer=layer)
    if tensor.dim() > MAX_DIMS:
        raise SpecError(f"layer {layer}: {tensor.dim()} dims, at most {MAX_DIMS} can cross: flatten first", layer=layer)
    plain = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
    return {
        "data": codecs.get(codec).encode(plain, tensor.dtype.itemsize),
        "shape": list(tensor.shape),
        "dtype": dtype,
        "format": FORMAT,
        "codec": codec,
        "crc32": checksum(layer, dtype, tuple(tensor.shape), plain),
    }


def _require_little_endian() -> None:
    if sys.byteorder != "little":
        raise SpecError("payloads of format 2 are little-endian and this machine is not: use a little-endian host")


# -- checking: nothing in this part allocates -------------------------------------------------------------------------


def _refuse(layer: object, problem: str, remedy: str) -> NoReturn:
    raise DescriptorError(f"layer {layer} {problem}: {remedy}", layer=layer)


def _check(key: object, entry: object) -> Entry:
    """Return the entry once its header, and the length of its data, are right."""
    layer = _layer(key)
    if not isinstance(entry, Mapping):
        _refuse(layer, f"is of type {type(entry).__name__}", f"expected a dict with {sorted(OLD_KEYS)}")
    shape, dtype = _shape(layer, entry), entry.get("dtype")
    if not isinstance(dtype, str) or dtype not in DTYPES:
        _refuse(layer, f"has dtype {_short(dtype)}", f"expected one of {list(DTYPES)}")
    if math.prod(max(1, size) for size in shape) * DTYPES[dtype].itemsize > MAX_BYTES:
        _refuse(layer, f"has shape {shape}, more bytes than an address has", "the header was changed on its way")
    known = KEYS if "format" in entry else OLD_KEYS
    if set(entry) != known:
        _refuse(layer, f"has the keys {_short(list(entry))}", f"expected {sorted(known)}")
    if "format" in entry:
        return _check_versioned(layer, shape, dtype, entry)
    return _check_old(Entry(layer, shape, dtype, entry["data"]))


def _layer(key: object) -> int:
    number = int(key) if isinstance(key, str) and key.isascii() and key.isdigit() and len(key) < 8 else key
    if type(number) is not int or not 0 <= number < MAX_LAYER or str(number) != str(key):
        raise DescriptorError(f"a payload has the key {_short(key)}: expected a layer, 0 to {MAX_LAYER - 1}", layer=key)
    return number


def _shape(layer: int, entry: Mapping[str, Any]) -> tuple[int, ...]:
    shape = entry.get("shape")
    if not isinstance(shape, list | tuple) or len(shape) > MAX_DIMS:
        _refuse(layer, f"has shape {_short(shape)}", f"expected a list of at most {MAX_DIMS} sizes")
    if any(type(size) is not int or not 0 <= size <= MAX_BYTES for size in shape):
        _refuse(layer, f"has shape {_short(shape)}", "expected sizes of 0 or more")
    return tuple(shape)


def _check_versioned(layer: int, shape: tuple[int, ...], dtype: str, entry: Mapping[str, Any]) -> Entry:
    data, codec, crc32 = entry["data"], entry["codec"], entry["crc32"]
    if type(entry["format"]) is not int or entry["format"] != FORMAT:
        _refuse(layer, f"is of format {_short(entry['format'])}", f"this reader knows {FORMAT}; update vllm-tap")
    if not isinstance(codec, str) or codec not in codecs.names():
        _refuse(layer, f"was encoded with {_short(codec)}", f"expected one of {list(codecs.names())}")
    if type(crc32) is not int or not 0 <= crc32 < 1 << 32:
        _refuse(layer, f"has crc32 {_short(crc32)}", "expected a number of 32 bits")
    if not _is_bytes(data):
        _refuse(layer, f"has data of type {type(data).__name__}", "format 2 holds bytes")
    checked = Entry(layer, shape, dtype, data, codec, crc32)
    if codec == "raw":
        _check_length(checked, checked.nbytes)
    return checked


def _check_old(entry: Entry) -> Entry:
    if _is_bytes(entry.data):
        if entry.dtype not in WIDENED:
            _refuse(entry.layer, f"has dtype {entry.dtype} in float32 bytes", f"those can hold {list(WIDENED)}")
        _check_length(entry, 4 * entry.num_elements)
    elif not isinstance(entry.data, list | int | float):
        _refuse(entry.layer, f"has data of type {type(entry.data).__name__}", "expected bytes or nested lists")
    return entry


def _is_bytes(data: object) -> bool:
    return isinstance(data, bytes | bytearray) or (isinstance(data, memoryview) and data.c_contiguous)


def _check_length(entry: Entry, expected: int) -> None:
    got = memoryview(entry.data).nbytes
    if got != expected:
        _refuse(entry.layer, f"has {got} bytes, its shape {entry.shape} needs {expected}", "send it again")


def _check_lists(entry: Entry) -> None:
    """Walk nested lists and compare every length with the shape, and every number with the dtype."""
    numbers = {int, float} if DTYPES[entry.dtype].is_floating_point else {int}
    for row in _rows(entry, entry.data, 0):
        if not set(map(type, row)) <= numbers:
            found = next(value for value in row if type(value) not in numbers)
            _refuse(entry.layer, f"has {_short(found)} among its numbers", f"{entry.dtype} takes numbers alone")


def _rows(entry: Entry, data: Any, dim: int) -> Iterator[list[Any]]:
    """Yield the innermost lists, in order; a scalar is a row of one."""
    if not entry.shape:
        yield [data]
        return
    if not isinstance(data, list) or len(data) != entry.shape[dim]:
        got = f"{len(data)} items" if isinstance(data, list) else type(data).__name__
        _refuse(entry.layer, f"has a list of {got} in dim {dim}", f"its shape is {entry.shape}")
    if dim == len(entry.shape) - 1:
        yield data
        return
    for item in data:
        yield from _rows(entry, item, dim + 1)


class _Short(reprlib.Repr):
    """Values for messages: they come from outside, may be long, and ints of 4,300 digits have no repr at all."""

    def repr_int(self, x: int, level: int) -> str:
        return repr(x) if x.bit_length() <= 128 else f"an int of {x.bit_length()} bits"


_short: Final = _Short().repr


# -- reading ----------------------------------------------------------------------------------------------------------


def _read(entry: Entry) -> torch.Tensor:
    if entry.codec is not None:
        return _read_versioned(entry, entry.codec)
    if isinstance(entry.data, list | int | float):
        return _read_lists(entry)
    return _narrow(np.frombuffer(entry.data, np.float32), entry)


def _read_versioned(entry: Entry, name: str) -> torch.Tensor:
    _require_little_endian()
    try:
        plain = codecs.get(name).decode(memoryview(entry.data), entry.nbytes, entry.itemsize)
    except DescriptorError as error:
        raise DescriptorError(f"layer {entry.layer}: {error}", layer=entry.layer) from error
    crc32 = checksum(entry.layer, entry.dtype, entry.shape, plain)
    if crc32 != entry.crc32:
        _refuse(entry.layer, f"has crc32 {crc32:#010x}, its header says {entry.crc32:#010x}", "send it again")
    if not entry.num_elements:
        return torch.empty(entry.shape, dtype=DTYPES[entry.dtype])
    owned = np.frombuffer(plain, np.uint8)
    if not owned.flags.writeable or np.may_share_memory(owned, np.frombuffer(entry.data, np.uint8)):
        owned = owned.copy()
    return torch.from_numpy(owned).view(DTYPES[entry.dtype]).reshape(entry.shape)


def _read_lists(entry: Entry) -> torch.Tensor:
    result = torch.empty(entry.num_elements, dtype=DTYPES[entry.dtype])
    start = 0
    for row in _rows(entry, entry.data, 0):
        result[start : start + len(row)] = _cast(entry, _numbers(entry, row))
        start += len(row)
    return result.reshape(entry.shape)


def _numbers(entry: Entry, row: list[Any]) -> np.ndarray[Any, Any]:
    """Return a row as the workers had it before `tolist()`: float32 or, for the dtypes that it cannot hold, wider."""
    dtype = DTYPES[entry.dtype]
    wide = np.float64 if dtype == torch.float64 else np.float32 if dtype.is_floating_point else np.int64
    try:
        with np.errstate(over="raise"):
            values = np.array(row, wide)
    except (OverflowError, FloatingPointError):
        _refuse(entry.layer, f"has a number that {wide.__name__} cannot hold", f"its dtype is {entry.dtype}")
    if not dtype.is_floating_point and values.size:
        limits = torch.iinfo(dtype)
        if values.min() < limits.min or values.max() > limits.max:
            _refuse(entry.layer, f"has a number that {entry.dtype} cannot hold", "send it with its own dtype")
    return values


def _cast(entry: Entry, values: np.ndarray[Any, Any]) -> torch.Tensor:
    cast = torch.from_numpy(values).to(DTYPES[entry.dtype])
    if cast.is_floating_point() and int(cast.isinf().sum()) > int(np.isinf(values).sum()):
        _refuse(entry.layer, f"has a number that {entry.dtype} cannot hold", "send it with its own dtype")
    return cast


def _narrow(wide: np.ndarray[Any, Any], entry: Entry) -> torch.Tensor:
    """Cast chunk by chunk into a new tensor, so that no whole copy stands in between."""
    result = torch.empty(entry.num_elements, dtype=DTYPES[entry.dtype])
    for start in range(0, entry.num_elements, CHUNK):
        result[start : start + CHUNK] = _cast(entry, wide[start : start + CHUNK].copy())
    return result.reshape(entry.shape)

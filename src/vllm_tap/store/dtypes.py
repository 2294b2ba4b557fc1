"""Element types that a shard may have, by the names that streams use. Runs wherever a dataset is written or read."""

from __future__ import annotations

import functools
import math
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt

from vllm_tap.errors import DatasetDamagedError

if TYPE_CHECKING:
    import torch

Bytes = npt.NDArray[np.uint8]


class Dtype(NamedTuple):
    """An element type: what safetensors calls it, its size, and numpy's type of the same bytes."""

    code: str
    itemsize: int
    numpy: str


DTYPES: Final = {
    "float8_e4m3fn": Dtype("F8_E4M3", 1, "|u1"),
    "bfloat16": Dtype("BF16", 2, "<u2"),
    "float16": Dtype("F16", 2, "<f2"),
    "float32": Dtype("F32", 4, "<f4"),
    "float64": Dtype("F64", 8, "<f8"),
    "uint8": Dtype("U8", 1, "|u1"),
    "int16": Dtype("I16", 2, "<i2"),
    "int32": Dtype("I32", 4, "<i4"),
    "int64": Dtype("I64", 8, "<i8"),
}
"""numpy has neither bfloat16 nor e4m3: their bits come as integers, see `to_numpy`."""

WIDENED: Final = ("bfloat16", "float8_e4m3fn")
"""Those that become float32 in numpy, without loss."""


def dtype_of(name: str) -> Dtype:
    """Return an element type by its name.

    Raises:
        DatasetDamagedError: There is no such type in a dataset.
    """
    try:
        return DTYPES[name]
    except KeyError:
        raise DatasetDamagedError(f"dtype {name!r} is not one of {', '.join(DTYPES)}") from None


def to_numpy(data: Bytes, name: str, width: int) -> npt.NDArray[Any]:
    """Return bytes as an array [R, width]: a view, but bfloat16 and e4m3 become float32, without loss."""
    array: npt.NDArray[Any] = data.view(DTYPES[name].numpy).reshape(-1, width)
    if name == "bfloat16":
        return (array.astype(np.uint32) << 16).view(np.float32)
    return _e4m3_values()[array] if name == "float8_e4m3fn" else array


@functools.cache
def _e4m3_values() -> npt.NDArray[np.float32]:
    """Return what the 256 numbers of e4m3 are: a sign, four bits of exponent from -6 on, three bits; 0x7f is NaN."""
    code = np.arange(256)
    exponent, bits = code >> 3 & 15, code & 7
    sizes = np.where(exponent > 0, np.ldexp(1 + bits / 8, exponent - 7), np.ldexp(bits / 8, -6))
    sizes[code & 127 == 127] = np.nan
    return np.where(code < 128, sizes, -sizes).astype(np.float32)


def to_torch(data: Bytes, name: str, width: int) -> Any:
    """Return bytes as a tensor [R, width] over the same memory."""
    import torch

    return torch.from_numpy(data).view(getattr(torch, name)).view(-1, width)


def new_tensor(name: str, *shape: int) -> torch.Tensor:
    """Return a tensor of a dtype and shape to be filled, on the CPU, in memory of numpy's.

    numpy asks for huge pages and torch does not: of a large tensor, the first write to all its small pages takes
    several times as long as the copy.
    """
    import torch

    dtype: torch.dtype = getattr(torch, name)
    raw = np.empty(math.prod(shape) * dtype.itemsize, np.uint8)
    return torch.from_numpy(raw).view(dtype).view(shape) if raw.size else torch.empty(shape, dtype=dtype)


def bytes_of(rows: Any) -> Bytes:
    """Return the bytes of a tensor or an array of rows; a copy only where they do not lie together."""
    if isinstance(rows, np.ndarray):
        return np.ascontiguousarray(rows).reshape(-1).view(np.uint8)
    import torch

    flat: Bytes = rows.detach().contiguous().view(-1).view(torch.uint8).numpy()
    return flat

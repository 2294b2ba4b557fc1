"""Every codec gives the bytes of `raw`, for any bytes and for any tensor."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vllm_tap import codec
from vllm_tap.legacy.payload import DTYPES, deserialize, serialize

COMPRESSING = [name for name in codec.names() if name != "raw"]


@st.composite
def repeated_bytes(draw: st.DrawFn) -> bytes:
    """Bytes from nothing to some MiB: a short pattern, repeated, with a few bytes of its own at the end."""
    pattern = draw(st.binary(min_size=1, max_size=64))
    return pattern * draw(st.sampled_from([0, 1, 2, 1000, 16384, 65536])) + draw(st.binary(max_size=9))


@st.composite
def tensors(draw: st.DrawFn) -> torch.Tensor:
    """A tensor of any dtype that may cross, of any bits, with up to three dims, some of them empty."""
    dtype = draw(st.sampled_from(list(DTYPES.values())))
    shape = draw(st.lists(st.integers(0, 6), max_size=3))
    count = torch.Size(shape).numel()
    data = bytearray(draw(st.binary(min_size=count * dtype.itemsize, max_size=count * dtype.itemsize)))
    flat = torch.frombuffer(data, dtype=torch.uint8).view(dtype) if data else torch.empty(0, dtype=dtype)
    return flat.reshape(shape)


@pytest.mark.parametrize("name", COMPRESSING)
@given(data=st.one_of(st.binary(max_size=4096), repeated_bytes()), itemsize=st.integers(1, 16))
def test_every_codec_gives_the_bytes_of_raw(name: str, data: bytes, itemsize: int) -> None:
    """Whatever the bytes and the size of their elements, decoding gives what `raw` gives."""
    results = []
    for this in (codec.get("raw"), codec.get(name)):
        encoded = this.encode(memoryview(data), itemsize)
        results.append(bytes(this.decode(memoryview(encoded), len(data), itemsize)))
    assert results[0] == results[1] == data


@pytest.mark.parametrize("name", COMPRESSING)
@given(tensor=tensors())
def test_every_codec_gives_the_tensor_of_raw(name: str, tensor: torch.Tensor) -> None:
    """Payloads of one tensor under any codec give the same dtype, shape and bits, and state the same checksum."""
    plain, packed = serialize({0: tensor}), serialize({0: tensor}, name)
    assert plain[0]["crc32"] == packed[0]["crc32"]
    left, right = deserialize(plain)[0], deserialize(packed)[0]
    assert left.dtype == right.dtype == tensor.dtype
    assert left.shape == right.shape == tensor.shape
    assert left.reshape(-1).view(torch.uint8).equal(right.reshape(-1).view(torch.uint8)) or not tensor.numel()

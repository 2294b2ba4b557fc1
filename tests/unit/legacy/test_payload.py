"""Payloads of all three forms: what is read, what is refused, and what may be shared or allocated."""

from __future__ import annotations

import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from vllm_tap import codec
from vllm_tap.errors import DescriptorError, SpecError
from vllm_tap.legacy.payload import DTYPES, deserialize, serialize

PLAIN = (dict, str, int, list, bytes)


def noise(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Return a tensor of any dtype with values of both signs where it has signs."""
    values = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 50
    return values.abs().to(dtype) if dtype == torch.uint8 else values.to(dtype)


def same_bits(left: torch.Tensor, right: torch.Tensor) -> bool:
    """Tell whether two tensors agree in dtype, shape and every bit."""
    return (
        left.dtype == right.dtype
        and left.shape == right.shape
        and left.contiguous().reshape(-1).view(torch.uint8).equal(right.contiguous().reshape(-1).view(torch.uint8))
    )


@pytest.mark.parametrize("name", codec.names())
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=str)
@pytest.mark.parametrize("shape", [(3, 4), (0, 5), (), (7,), (2, 0, 3), (1, 2, 3, 4)], ids=str)
def test_written_payloads_read_back_bit_for_bit(name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    """Form 2 keeps dtype, shape and every bit, for all dtypes that may cross, empty tensors and scalars included."""
    tensor = noise(shape, dtype)
    assert same_bits(deserialize(serialize({3: tensor}, name))[3], tensor)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=str)
@pytest.mark.parametrize("shape", [(3, 4), (0, 5), (), (2, 0, 3)], ids=str)
def test_lists_are_read_by_their_dtype(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    """The list form, as `tolist()` gives it, comes back in its own dtype."""
    tensor = noise(shape, dtype)
    entry = {"data": tensor.tolist(), "shape": list(shape), "dtype": str(dtype)}
    assert same_bits(deserialize({0: entry})[0], tensor)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_widened_bytes_are_narrowed_to_their_dtype(dtype: torch.dtype) -> None:
    """Float32 bytes come back as the dtype that was widened, also across the chunks of the cast."""
    tensor = noise((600, 1000), dtype)
    entry = {"data": tensor.float().numpy().tobytes(), "shape": [600, 1000], "dtype": str(dtype)}
    assert same_bits(deserialize({0: entry})[0], tensor)


def test_nan_and_infinities_survive() -> None:
    """Values that no comparison finds equal keep their bits through form 2 and their kind through lists."""
    tensor = torch.tensor([float("nan"), float("inf"), float("-inf"), -0.0], dtype=torch.bfloat16)
    assert same_bits(deserialize(serialize({0: tensor}))[0], tensor)
    listed = deserialize({0: {"data": tensor.tolist(), "shape": [4], "dtype": "torch.bfloat16"}})[0]
    assert listed.isnan().tolist() == [True, False, False, False]
    assert listed[1:3].tolist() == [float("inf"), float("-inf")]


def test_strided_and_differentiable_tensors_are_written_by_value() -> None:
    """A transposed tensor that requires a gradient is stored as its values in row order."""
    tensor = torch.arange(6.0).reshape(2, 3).requires_grad_().T
    assert deserialize(serialize({0: tensor}))[0].tolist() == [[0, 3], [1, 4], [2, 5]]


def test_layers_may_be_strings_and_come_back_sorted() -> None:
    """Keys that a JSON trip turned into digits are layers again, in ascending order."""
    payload = serialize({layer: torch.full((1, 2), float(layer)) for layer in (10, 2, 0)})
    tensors = deserialize({str(layer): entry for layer, entry in payload.items()})
    assert [(layer, tensor[0, 0].item()) for layer, tensor in tensors.items()] == [(0, 0), (2, 2), (10, 10)]


def test_empty_payload_is_no_layers() -> None:
    """A model without experts has an empty payload, which is an empty result."""
    assert deserialize({}) == {} == serialize({})


def test_payload_is_made_of_plain_values() -> None:
    """Nothing but dicts, strings, ints, lists and bytes is in a payload, not even subclasses."""

    def walk(value: Any) -> None:
        assert type(value) in PLAIN
        for item in value.items() if type(value) is dict else value if type(value) is list else ():
            for part in item if type(value) is dict else [item]:
                walk(part)

    walk(serialize({0: torch.ones(2, 3), 5: torch.ones(2, 3, dtype=torch.bfloat16)}, "bytesplit"))


def test_raw_float32_reads_as_the_widened_form_too() -> None:
    """A reader that knows only float32 bytes finds them under the same three keys when the dtype is float32."""
    entry = serialize({0: torch.arange(6.0).reshape(2, 3)})[0]
    assert np.frombuffer(entry["data"], np.float32).reshape(entry["shape"]).tolist() == [[0, 1, 2], [3, 4, 5]]


@pytest.mark.parametrize("buffer", [bytearray, lambda data: memoryview(bytearray(data))], ids=["bytearray", "view"])
def test_tensors_own_their_memory(buffer: Callable[[bytes], Any]) -> None:
    """Overwriting the payload's buffer afterwards changes no tensor, in either form that carries bytes."""
    new = serialize({0: torch.ones(4)})
    old = {0: {"data": torch.ones(4).numpy().tobytes(), "shape": [4], "dtype": "torch.float32"}}
    for payload in (new, old):
        data = payload[0]["data"] = buffer(payload[0]["data"])
        tensor = deserialize(payload)[0]
        memoryview(data)[:] = bytes(16)
        assert tensor.tolist() == [1, 1, 1, 1]
        tensor += 1
        assert bytes(data) == bytes(16)


GOOD: dict[str, Any] = serialize({7: torch.arange(6.0).reshape(2, 3)})[7]
OLD = {key: GOOD[key] for key in ("data", "shape", "dtype")}
LISTS = {**OLD, "data": [[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]]}


@pytest.mark.parametrize(
    ("entry", "problem"),
    [
        ({**GOOD, "format": 3}, "is of format 3.*update"),
        ({**GOOD, "format": True}, "is of format True"),
        ({**GOOD, "format": None}, "is of format None"),
        ({**GOOD, "codec": "gzip"}, "encoded with 'gzip'.*expected one of"),
        ({**GOOD, "codec": ["raw"]}, r"encoded with \['raw'\]"),
        ({**GOOD, "crc32": GOOD["crc32"] ^ 1}, "its header says"),
        ({**GOOD, "crc32": -1}, "crc32 -1"),
        ({**GOOD, "crc32": 1 << 32}, "number of 32 bits"),
        ({**GOOD, "dtype": "torch.complex64"}, "dtype 'torch.complex64'.*expected one of"),
        ({**GOOD, "dtype": "float32"}, "dtype 'float32'"),
        ({**GOOD, "dtype": None}, "dtype None"),
        ({**GOOD, "dtype": "torch.int32"}, "its header says"),
        ({**GOOD, "data": GOOD["data"][:-1]}, "23 bytes, its shape .* needs 24"),
        ({**GOOD, "data": GOOD["data"] + b"\0"}, "25 bytes"),
        ({**GOOD, "data": [[0.0, 1, 2], [3, 4, 5]]}, "format 2 holds bytes"),
        ({**GOOD, "shape": [3, 2]}, "its header says"),
        ({**GOOD, "shape": [2, -3]}, "sizes of 0 or more"),
        ({**GOOD, "shape": [-2, -3]}, "sizes of 0 or more"),
        ({**GOOD, "shape": [2, 3.0]}, "sizes of 0 or more"),
        ({**GOOD, "shape": [2, True]}, "sizes of 0 or more"),
        ({**GOOD, "shape": "23"}, "list of at most 8 sizes"),
        ({**GOOD, "shape": [1] * 9}, "list of at most 8 sizes"),
        ({**GOOD, "shape": [1 << 62, 1 << 62]}, "more bytes than an address has"),
        ({**GOOD, "shape": [0, 1 << 62, 2]}, "more bytes than an address has"),
        ({**GOOD, "shape": [1 << 40, 3]}, "24 bytes"),
        ({**GOOD, "shape": [10**5000]}, "sizes of 0 or more"),
        ({**GOOD, "note": 1}, "has the keys"),
        ({key: GOOD[key] for key in GOOD if key != "crc32"}, "has the keys"),
        ({key: GOOD[key] for key in GOOD if key != "format"}, "has the keys"),
        ({key: OLD[key] for key in OLD if key != "data"}, "has the keys"),
        ({**OLD, "shape": [2, 4]}, "24 bytes, its shape .* needs 32"),
        ({**OLD, "dtype": "torch.int64"}, "torch.int64 in float32 bytes"),
        ({**OLD, "data": None}, "data of type NoneType"),
        ({**OLD, "data": "AAAA"}, "data of type str"),
        ({**LISTS, "data": [[0.0, 1.0, 2.0], [3.0, 4.0]]}, "a list of 2 items in dim 1"),
        ({**LISTS, "data": [[0.0, 1.0, 2.0]]}, "a list of 1 items in dim 0"),
        ({**LISTS, "data": [[0.0, 1.0, 2.0], 3.0]}, "a list of float in dim 1"),
        ({**LISTS, "data": [[0.0, 1.0, [2.0]], [3.0, 4.0, 5.0]]}, r"has \[2.0\] among its numbers"),
        ({**LISTS, "data": [[0.0, 1.0, "2"], [3.0, 4.0, 5.0]]}, "has '2' among its numbers"),
        ({**LISTS, "data": [[0.0, 1.0, None], [3.0, 4.0, 5.0]]}, "has None among its numbers"),
        ({**LISTS, "data": [[0.0, 1.0, 1e300], [3.0, 4.0, 5.0]]}, "a number that float32 cannot hold"),
        ({**LISTS, "data": [[0.0, 1.0, 10**400], [3.0, 4.0, 5.0]]}, "a number that float32 cannot hold"),
        ({"data": [1.0, 1e6], "shape": [2], "dtype": "torch.float16"}, "a number that torch.float16 cannot hold"),
        ({**LISTS, "dtype": "torch.int64"}, "has 0.0 among its numbers"),
        ({"data": [300], "shape": [1], "dtype": "torch.uint8"}, "torch.uint8 cannot hold"),
        ({"data": [1 << 64], "shape": [1], "dtype": "torch.int64"}, "int64 cannot hold"),
        ({"data": 1.0, "shape": [1], "dtype": "torch.float32"}, "a list of float in dim 0"),
        (None, "is of type NoneType"),
        (b"bytes", "is of type bytes"),
    ],
)
def test_wrong_layers_are_refused_by_number_and_reason(entry: Any, problem: str) -> None:
    """Whatever does not validate is a DescriptorError that names the layer, in the text and as an attribute."""
    with pytest.raises(DescriptorError, match=rf"(?s)layer 7.*{problem}") as caught:
        deserialize({7: entry})
    assert caught.value.layer == 7
    assert len(str(caught.value)) < 500


NO_LAYERS = [-1, 1 << 20, True, 1.0, None, "", "-1", "07", "1.0", "x", "²", "9" * 5000, 10**5000, b"1", (1,)]


@pytest.mark.parametrize("key", NO_LAYERS, ids=range(len(NO_LAYERS)))
def test_keys_that_are_no_layers_are_refused(key: Any) -> None:
    """A key is a layer number or its decimal digits, and nothing that merely compares equal to one."""
    with pytest.raises(DescriptorError, match="expected a layer"):
        deserialize({key: GOOD})


def test_layer_that_is_there_twice_is_refused() -> None:
    """The number 3 and the string '3' are one layer: neither wins in silence."""
    payload = serialize({3: torch.ones(2)})
    with pytest.raises(DescriptorError, match="layer 3 is there twice"):
        deserialize({3: payload[3], "3": payload[3]})


def test_layer_under_another_number_is_refused() -> None:
    """The checksum covers the layer: a layer that arrives under another's number is noticed."""
    with pytest.raises(DescriptorError, match="layer 4 has crc32"):
        deserialize({4: serialize({3: torch.ones(2)})[3]})


@pytest.mark.parametrize("payload", [[GOOD], None, b"", 3])
def test_payload_that_is_no_dict_is_refused_with_the_remedy(payload: Any) -> None:
    """The RPC's list of one payload per worker is the likely mistake, and the message says so."""
    with pytest.raises(DescriptorError, match="pass one item"):
        deserialize(payload)


@pytest.mark.parametrize("name", ["lz4", "zstd", "bytesplit"])
def test_limit_covers_all_compressed_layers_together(name: str) -> None:
    """Four layers of 1 MiB of zeros, a few KB long, are refused under 4 MiB - 1 and read under 4 MiB."""
    payload = serialize({layer: torch.zeros(1 << 18) for layer in range(4)}, name)
    with pytest.raises(DescriptorError, match=r"4194304 bytes, the limit is 4194303.*larger limit_bytes"):
        deserialize(payload, limit_bytes=(1 << 22) - 1)
    assert len(deserialize(payload, limit_bytes=1 << 22)) == 4


def test_limit_covers_lists_that_repeat_themselves() -> None:
    """Lists that hold one another a thousand times at each depth are refused by their shape's size, before the walk."""
    data: Any = [0.0] * 1000
    for _ in range(3):
        data = [data] * 1000
    with pytest.raises(DescriptorError, match=r"lists .* would take 4000000000000 bytes"):
        deserialize({0: {"data": data, "shape": [1000] * 4, "dtype": "torch.float32"}})


def test_limit_covers_empty_lists_that_repeat_themselves() -> None:
    """Lists of empty lists hold no numbers, but walking them a trillion times is refused as well."""
    data: Any = []
    for _ in range(4):
        data = [data] * 1000
    with pytest.raises(DescriptorError, match="4000000000000 bytes"):
        deserialize({0: {"data": data, "shape": [1000] * 4 + [0], "dtype": "torch.float32"}})


def test_raw_layers_are_not_limited() -> None:
    """Raw bytes are as long as their tensors, so that no limit applies."""
    assert deserialize(serialize({0: torch.zeros(1 << 10)}), limit_bytes=0)[0].numel() == 1 << 10


@pytest.mark.parametrize("name", ["lz4", "zstd", "bytesplit"])
def test_declared_sizes_beyond_a_codecs_reach_are_refused_before_allocation(name: str) -> None:
    """A few bytes that claim to be 1 GB are refused with less than 1 MiB allocated."""
    entry = serialize({0: torch.zeros(64)}, name)[0] | {"shape": [1 << 28]}
    tracemalloc.start()
    with pytest.raises(DescriptorError, match="layer 0"):
        deserialize({0: entry}, limit_bytes=1 << 40)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20


@pytest.mark.parametrize(
    ("states", "name", "problem"),
    [
        ({0: torch.ones(2, dtype=torch.complex64)}, "raw", "layer 0: dtype torch.complex64 is not one of"),
        ({0: torch.ones([1] * 9)}, "raw", "layer 0: 9 dims"),
        ({-1: torch.ones(2)}, "raw", "layer -1"),
        ({"0": torch.ones(2)}, "raw", "layer '0'"),
        ({0: torch.ones(2)}, "zst", "did you mean 'zstd'"),
    ],
)
def test_what_no_payload_can_carry_is_not_written(states: Any, name: str, problem: str) -> None:
    """Writing refuses what reading would refuse, in the process that can do something about it."""
    with pytest.raises(SpecError, match=problem):
        serialize(states, name)


def test_big_endian_machines_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Form 2 states its byte order; a machine of the other one says so, and swaps nothing in silence."""
    monkeypatch.setattr(sys, "byteorder", "big")
    with pytest.raises(SpecError, match="little-endian"):
        serialize({0: torch.ones(2)})
    with pytest.raises(SpecError, match="little-endian"):
        deserialize({7: GOOD})


RPC = """
import torch
from vllm.v1.serial_utils import MsgpackDecoder, MsgpackEncoder, UtilityResult
from vllm_tap.legacy.payload import deserialize, serialize

state = torch.randn(5, 8).to(torch.bfloat16)
for codec in ("raw", "bytesplit"):
    sent = MsgpackEncoder().encode(UtilityResult([serialize({3: state}, codec)]))
    received = MsgpackDecoder(UtilityResult).decode(sent)
    assert deserialize(received.result[0])[3].equal(state), codec
print("carried")
"""


@pytest.mark.engine
def test_vllms_secure_rpc_carries_payloads() -> None:
    """vLLM's own encoder and decoder for RPC results, pickle refused, carry a payload unchanged."""
    done = subprocess.run([sys.executable, "-c", RPC], capture_output=True, text=True, timeout=300, check=False)
    assert done.stdout.endswith("carried\n"), done.stderr

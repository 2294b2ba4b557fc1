"""Payload files of every form, written by make_payloads.py without this package, read to the last bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch

from vllm_tap.legacy.payload import deserialize

HERE = Path(__file__).parent
SPECIAL = [0.0, -0.0, float("inf"), float("-inf"), 2.0**-133, -(2.0**-133), 1.0, (2 - 2**-7) * 2.0**127]


def load(name: str) -> dict[Any, Any]:
    """Return the payload as the RPC would hand it over."""
    content = (HERE / name).read_bytes()
    return json.loads(content) if name.endswith(".json") else msgspec.msgpack.decode(content)


def expected(layer: int) -> torch.Tensor:
    """Return the tensor of a layer, from the rule by which the files were made: eighths, special values first."""
    values = [((index * (layer + 1)) % 127 - 63) / 8 for index in range(240)]
    return torch.tensor(SPECIAL + values[len(SPECIAL) :], dtype=torch.float64).to(torch.bfloat16).reshape(12, 20)


@pytest.mark.parametrize("name", ["widened", "2-raw", "2-lz4", "2-zstd", "2-bytesplit"])
def test_stored_bytes_still_read_bit_for_bit(name: str) -> None:
    """Every form that carries bytes gives the bits it was made from, infinities and signed zeros included."""
    tensors = deserialize(load(f"payload-{name}.msgpack"))
    assert list(tensors) == [0, 7, 31]
    for layer, tensor in tensors.items():
        assert tensor.dtype == torch.bfloat16
        np.testing.assert_array_equal(tensor.view(torch.uint16).numpy(), expected(layer).view(torch.uint16).numpy())


def test_stored_lists_still_read_with_string_keys() -> None:
    """The list form, whose layers became strings on their way through JSON, gives the bits it was made from."""
    payload = load("payload-lists.json")
    assert list(payload) == ["0", "7", "31"]
    for layer, tensor in deserialize(payload).items():
        want = expected(layer)
        want = torch.where(want.isinf(), torch.zeros_like(want), want)
        np.testing.assert_array_equal(tensor.view(torch.uint16).numpy(), want.view(torch.uint16).numpy())


def test_files_are_small() -> None:
    """All golden payloads together take less than 50 KB."""
    assert sum(path.stat().st_size for path in HERE.glob("payload-*")) < 50_000

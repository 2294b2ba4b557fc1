"""Bodies of rows over HTTP whose heads lie: one kind of error, and nothing else. No server runs."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from vllm_tap.client.bodies import Blocks, Samples
from vllm_tap.errors import CaptureError, DescriptorError, RowsMissingError
from vllm_tap.frame import body
from vllm_tap.spec import Spec

PLANE = ("hidden_states", 0, "float32", 2)
BEGIN = {
    "id": "x", "spec": json.loads(Spec(hidden_states=[0]).to_json()), "num_layers": 4, "layers": {"hidden_states": [0]},
    "conventions": {"hidden_states": "x"}, "has_final_norm": True, "routing": {},
    "model": {"name": "tiny"},
}  # fmt: skip
ROWS = {"prompt": 0, "completion": 0, "finished": True, "rows": 2, "planes": [PLANE]}
CHOICE = {"request_id": "r", "prompt": 0, "completion": 0, "prompt_token_ids": [1, 2], "token_ids": [3]}


def rows(first: int, **head: Any) -> bytes:
    """Return a frame of a row at a position."""
    labels = np.array([[first], [first + 1]], "<i4").tobytes()
    width = head.get("planes", [PLANE])[0][3]
    return body.encode("rows", labels + np.ones(max(width, 0), "<f4").tobytes(), **{**ROWS, "rows": 1, **head})


def samples_of(frames: list[bytes]) -> Any:
    """Return the samples of frames; the blocks are read as well."""
    samples, blocks = Samples(), Blocks()
    for frame in body.frames(b"".join(frames)):
        samples.add(frame)
        blocks.add(frame)
    return samples.samples()


def frames(begin: dict[str, Any], first: dict[str, Any], second: dict[str, Any], choice: dict[str, Any]) -> list[bytes]:
    """Return a body of two rows, with some fields of its heads changed."""
    begun, ended = body.encode("begin", **{**BEGIN, **begin}), body.encode("choice", **{**CHOICE, **choice})
    return [begun, rows(0, **first), rows(1, **second), ended, body.encode("end")]


def test_a_body_is_read() -> None:
    """As it is below, with nothing changed."""
    (sample,) = samples_of(frames({}, {}, {}, {}))
    assert sample.positions.tolist() == [0, 1]
    assert sample.hidden_states[0].shape == (2, 2)


@pytest.mark.parametrize(
    "changed",
    [
        ({"spec": {"hidden": 1}}, {}, {}, {}),
        ({"layers": 3}, {}, {}, {}),
        ({"routing": {"x": 1}}, {}, {}, {}),
        ({"model": None}, {}, {}, {}),
        ({"model": {"name": 1}}, {}, {}, {}),
        ({}, {}, {"planes": [("hidden_states", 0, "float32", 3)]}, {}),
        ({}, {}, {"planes": [("hidden_states", 1, "float32", 2)]}, {}),
        ({}, {}, {"planes": [("hidden_states", 0, "float32", -2)]}, {}),
        ({}, {}, {"rows": 10**30}, {}),
        ({}, {}, {"prompt": None}, {}),
        ({}, {}, {"codec": ["raw", 16, 0]}, {}),
        ({}, {}, {"codec": ["bytesplit", 16, 4]}, {}),
        ({}, {}, {"codec": [[], 16, 4]}, {}),
        ({}, {}, {}, {"token_ids": [3.5]}),
        ({}, {}, {}, {"token_ids": [10**20]}),
        ({}, {}, {}, {"token_ids": None}),
        ({}, {}, {}, {"token_ids": [-1]}),
        ({}, {}, {}, {"prompt_token_ids": {"a": 1}}),
        ({}, {}, {}, {"prompt_token_ids": "ab"}),
        ({}, {}, {}, {"completion": "x"}),
        ({}, {}, {}, {"completion": float("inf")}),
    ],
    ids=str,
)
def test_heads_that_lie_are_one_error(changed: tuple[Any, Any, Any, Any]) -> None:
    """Also where torch, struct or arithmetic would have theirs."""
    with pytest.raises((DescriptorError, RowsMissingError)):
        samples_of(frames(*changed))


def test_an_error_of_the_server_stays_what_it_is() -> None:
    """It is no fault of the frame."""
    with pytest.raises(CaptureError, match="it broke") as told:
        samples_of([body.encode("error", message="it broke")])
    assert not isinstance(told.value, DescriptorError)

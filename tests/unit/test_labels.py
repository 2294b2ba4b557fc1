"""The mark by which an engine knows a request that is to be captured, and the labels of a block."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_tap.labels import KEY, LABELS, NUM_LABELS, Mark, mark, read_mark


@given(st.text(), st.integers(0, 2**31), st.integers(1, 2**16))
def test_a_mark_comes_back_from_the_wire(capture_id: str, sample: int, num_completions: int) -> None:
    """What the client puts into a request is what the worker reads after a trip through msgpack."""
    extra = msgspec.msgpack.decode(msgspec.msgpack.encode(mark(capture_id, sample, num_completions)))
    assert read_mark(extra) == Mark(capture_id, sample, num_completions)


@pytest.mark.parametrize("extra", [None, {}, {"kv_transfer_params": {"do": 1}}, {KEY: None}])
def test_a_request_without_a_mark_is_left_alone(extra: dict[str, Any] | None) -> None:
    """Requests of others have extra arguments, or none, and are not captured."""
    assert read_mark(extra) is None


def test_a_mark_stands_beside_other_arguments() -> None:
    """A mark is found among arguments that are not ours."""
    assert read_mark({"other": 1, **mark("a", 3)}) == Mark("a", 3, 1)


@pytest.mark.parametrize("positions", [None, "last", [0, -1], {"or": [{"prompt": [-8, None]}, {"generated": []}]}])
@pytest.mark.parametrize("reads_cache", [None, (0, 8)])
def test_a_mark_carries_positions_and_where_the_cache_ends(positions: Any, reads_cache: Any) -> None:
    """Both may be left out; what is left out takes no bytes."""
    extra = msgspec.msgpack.decode(msgspec.msgpack.encode(mark("a", 1, 2, positions, reads_cache)))
    assert read_mark(extra) == Mark("a", 1, 2, positions, reads_cache)
    assert mark("a", 1, 2) == {KEY: ["a", 1, 2]}


NO_MARKS: list[Any] = [
    *(["a"], ["a", 1, 1, 1], ["a", "x", 1], [1, 1, 1], ["a", 1, True], 7, "abc", {"a": 1}, ["a", 1, 1, None, 5]),
    *(["a", 1, 1, None, [1]], ["a", 1, 1, None, [1, "x"]], ["a", 1, 1, None, [1, 2], 3], ["a", 1, 1, b"x"]),
]


@pytest.mark.parametrize("value", NO_MARKS)
def test_what_is_no_mark_is_left_alone(value: object) -> None:
    """A server's client may send anything under our key: the engine goes on, and nothing is captured by chance."""
    assert read_mark({KEY: value}) is None


def test_labels_are_pinned() -> None:
    """The order of the label arrays is part of the format."""
    assert LABELS == ("request", "position", "token_id")
    assert NUM_LABELS == 3

"""Positions that a prompt or a completion does not have: said as soon as they are known, with a way out that works."""

from __future__ import annotations

import contextlib
import gc
import weakref
from types import SimpleNamespace
from typing import Any

import pytest

from vllm_tap import PositionError, Spec
from vllm_tap.client import missing
from vllm_tap.client.sequences import Sequences


def ids(length: int, **more: Any) -> dict[str, Any]:
    """A prompt of token ids."""
    return {"prompt_token_ids": list(range(length)), **more}


def output(prompt_len: int, *generated: int) -> Any:
    """An output of completions of so many tokens."""
    completions = [SimpleNamespace(index=index, token_ids=[7] * count) for index, count in enumerate(generated)]
    return SimpleNamespace(request_id="r", prompt_token_ids=[5] * prompt_len, outputs=completions)


def spec(positions: Any, how: str = "error") -> Spec:
    """A specification of some positions."""
    return Spec(hidden_states=[0], positions=positions, missing=how)


@pytest.mark.parametrize("position", [3, -3])
def test_a_prompt_of_known_length_is_refused_before_anything_runs(position):
    """The first one that is too short is named with its length; prompts of unknown length wait for their output."""
    unknown = ["text", {"prompt": "text"}, ids(1, multi_modal_data={"image": 1}), {"decoder_prompt": ids(1)}]
    with pytest.raises(PositionError, match=rf"prompt 5 has 2 tokens and no position {position},") as caught:
        missing.check_prompts(spec([position, 0]), [*unknown, ids(6), ids(2), ids(1)])
    assert caught.value.identity == {"sample": 5, "prompt_len": 2}
    missing.check_prompts(spec([position, 0]), [*unknown, ids(4)])
    missing.check_prompts(spec([position], "skip"), [ids(2)])
    for named in ("all", "prompt", "generated", "last", "last_generated"):
        missing.check_prompts(spec(named), [ids(1)])


@pytest.mark.parametrize("positions", ["generated", "last_generated"])
def test_a_request_that_generates_nothing_usable_is_refused(positions):
    """One token never enters the model, and an engine that pools generates none; prompt positions need neither."""
    one, pooling = SimpleNamespace(max_tokens=1), SimpleNamespace()
    with pytest.raises(PositionError, match=r"prompt 4.*generates one token \(max_tokens=1\)"):
        missing.check_params(spec(positions), one, 4)
    with pytest.raises(PositionError, match="pools: it generates nothing"):
        missing.check_params(spec(positions), pooling, 4)
    for params in (SimpleNamespace(max_tokens=2), SimpleNamespace(max_tokens=None)):
        missing.check_params(spec(positions), params, 0)
    for params in (one, pooling):
        missing.check_params(spec(positions, "skip"), params, 0)
        missing.check_params(spec("last"), params, 0)


@pytest.mark.parametrize(
    ("positions", "outputs", "message", "identity"),
    [
        ([1, -4], [output(4, 1), None, output(3, 1), output(1, 1)], "prompt 2 has 3 tokens and no position -4,.*2 of",
         {"sample": 2, "completion": 0, "prompt_len": 3}),
        ("generated", [output(4, 2, 1)], "prompt 0, completion 1 has no row.*stopped at its first.*1 of 2 sequences",
         {"sample": 0, "completion": 1}),
        ("last_generated", [output(4, 1)], "prompt 0, completion 0 has no row", {"sample": 0, "completion": 0}),
    ],
)  # fmt: skip
def test_a_result_that_lacks_rows_is_in_the_error(positions, outputs, message, identity):
    """What was computed is not lost: the error has the result, and says how many sequences lack rows."""
    result: Any = object()
    sequences = Sequences(outputs, positions)
    with pytest.raises(PositionError, match=message) as caught:
        missing.check_result(spec(positions), sequences, result)
    assert caught.value.result is result
    assert {**caught.value.identity, "result": None} == {**identity, "result": None}
    missing.check_result(spec(positions, "skip"), sequences, result)


def test_a_result_that_lacks_nothing_passes():
    """Positions that all prompts have, and generated rows of all completions."""
    for positions in ([2, -3], "generated", "last_generated", "last", "all", "prompt"):
        missing.check_result(spec(positions), Sequences([output(3, 2), output(9, 5, 3)], positions), None)  # type: ignore[arg-type]


def test_an_error_that_is_over_keeps_no_rows() -> None:
    """The result that it has goes with it, without a collection of garbage."""

    class Result:
        pass

    result: Any = Result()
    kept = weakref.ref(result)
    gc.disable()
    try:
        with contextlib.suppress(PositionError):
            missing.check_result(spec([3]), Sequences([output(2, 1)], [3]), result)
        del result
        assert kept() is None
    finally:
        gc.enable()

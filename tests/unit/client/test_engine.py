"""How requests are sent to an engine, and when a call learns that it has ended them. Without an engine."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import pytest

from vllm_tap.errors import SpecError
from vllm_tap.vllm import frontend
from vllm_tap.vllm.frontend import STEPS_BETWEEN, _first_step_first, _outputs_watched, _token_lists


class Core:
    """Takes requests, and hands out what an engine core has sent: pieces of requests, and whether they have ended."""

    def __init__(self, *pieces: dict[str, bool]) -> None:
        self.pieces = list(pieces)
        self.events: list[Any] = []

    def add_request(self, request: Any) -> None:
        self.events.append(request)

    def get_output(self) -> Any:
        piece = self.pieces.pop(0)
        outputs = [SimpleNamespace(request_id=name, finished=finished) for name, finished in piece.items()]
        return SimpleNamespace(outputs=outputs)


def calls_after_each(core: Core, request_ids: set[str]) -> list[int]:
    """Read all pieces; return how often the function had been called after each."""
    llm = SimpleNamespace(llm_engine=SimpleNamespace(engine_core=core))
    called: list[bool] = []
    counts = []
    with _outputs_watched(llm, request_ids, lambda: None, lambda: called.append(True)):
        while core.pieces:
            assert core.get_output().outputs is not None
            counts.append(len(called))
    return counts


@pytest.mark.parametrize(
    ("lengths", "executor", "pauses"),
    [
        ([60, 40, 10, 200, 1], "uni", [2]),
        ([60, 60, 60], "uni", [2]),
        ([500, 1, 1], "uni", [1]),
        ([60, 40], "uni", []),
        ([1] * 50, "uni", []),
        ([None, 100, None, 100], "uni", [2]),
        ([60, 40, 10, 200, 1], "mp", []),
    ],
    ids=["full", "more than full", "long prompt", "no more", "short prompts", "embeddings", "workers of their own"],
)
def test_requests_beyond_a_full_step_are_sent_a_moment_later(
    monkeypatch: pytest.MonkeyPatch, lengths: list[int | None], executor: str, pauses: list[int]
) -> None:
    """All of them, in their order; `pauses` are before requests of these numbers."""
    core = Core()
    monkeypatch.setattr(frontend, "time", SimpleNamespace(sleep=core.events.append))
    config = SimpleNamespace(
        scheduler_config=SimpleNamespace(max_num_batched_tokens=100),
        parallel_config=SimpleNamespace(distributed_executor_backend=executor),
    )
    llm_engine = SimpleNamespace(engine_core=core, vllm_config=config)
    requests = [SimpleNamespace(prompt_token_ids=None if n is None else [0] * n) for n in lengths]
    with _first_step_first(SimpleNamespace(llm_engine=llm_engine)):
        for request in requests:
            core.add_request(request)
    expected: list[Any] = list(requests)
    for number in pauses:
        expected.insert(number, frontend.FIRST_STEP_SECONDS)
    assert core.events == expected
    assert "add_request" not in vars(core)


def test_the_end_of_the_last_request_is_told_once() -> None:
    """Other requests of the engine do not count, ended or not."""
    core = Core({"a": False, "b": True, "other": True}, {}, {"a": True, "another": False}, {"another": True})
    assert calls_after_each(core, {"a", "b"}) == [0, 0, 1, 1]


def test_requests_that_the_engine_does_not_end_are_not_told() -> None:
    """As at a stop string, which vLLM finds in the client."""
    assert calls_after_each(Core({"a": False}, {"a": False}), {"a"}) == [0, 0]
    assert calls_after_each(Core({"other": True}), set()) == [0]


def test_what_was_generated_is_read_now_and_then_before_a_wait() -> None:
    """Not behind one, where the engine may have ended."""
    core = Core(*[{"a": False}] * (2 * STEPS_BETWEEN))
    llm = SimpleNamespace(llm_engine=SimpleNamespace(engine_core=core))
    left: list[int] = []
    with _outputs_watched(llm, {"a"}, lambda: left.append(len(core.pieces)), lambda: None):
        while core.pieces:
            core.get_output()
    assert left == [STEPS_BETWEEN + 1, 1]


def test_lists_of_tokens_are_those_that_grow() -> None:
    """Of the requests that are asked for; embeddings as a prompt and a request without a text have none."""
    states = {
        "a": SimpleNamespace(prompt_token_ids=[1], detokenizer=SimpleNamespace(token_ids=[2])),
        "b": SimpleNamespace(prompt_token_ids=None, detokenizer=None),
        "c": SimpleNamespace(prompt_token_ids=[3], detokenizer=SimpleNamespace(token_ids=[])),
    }
    llm = SimpleNamespace(llm_engine=SimpleNamespace(output_processor=SimpleNamespace(request_states=states)))
    lists = _token_lists(llm, {"a", "b"})
    states["a"].detokenizer.token_ids.append(4)
    assert lists == [[1], [2, 4]]


@pytest.mark.parametrize("is_replaced", [False, True])
def test_the_client_of_the_core_is_left_as_it_was(is_replaced: bool) -> None:
    """Also where somebody else has put a method of their own into it, and when the wait fails."""
    core = Core()
    if is_replaced:
        core.get_output = mine = lambda: SimpleNamespace(outputs=[])  # type: ignore[method-assign]
    before = vars(core).copy()
    llm = SimpleNamespace(llm_engine=SimpleNamespace(engine_core=core))
    with pytest.raises(KeyError), _outputs_watched(llm, {"a"}, lambda: None, lambda: None):
        raise KeyError
    assert vars(core) == before
    if is_replaced:
        assert core.get_output is mine


def test_parameters_are_made_of_copies_of_known_fields(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the caller passes stays the caller's; a name that is not known is said before anything is copied."""

    class SamplingParams:
        max_tokens: int
        stop: list[str]

        def __init__(self, **fields: Any) -> None:
            self.__dict__.update(fields)

    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(SamplingParams=SamplingParams))
    llm = SimpleNamespace(model_config=SimpleNamespace(runner_type="generate"))
    mine = ["."]
    params = frontend.new_params(llm, {"max_tokens": 3, "stop": mine})
    assert (params.max_tokens, params.stop) == (3, mine)
    assert params.stop is not mine
    with pytest.raises(SpecError, match="no field 'max_token'"):
        frontend.new_params(llm, {"max_token": (token for token in ())})


@pytest.mark.parametrize(
    ("own", "asked", "match"),
    [
        ("classify", None, ""),
        ("classify", "classify", ""),
        (None, "token_classify", ""),
        ("classify", "token_classify", r"start it with pooler_config=PoolerConfig\(task='token_classify'\)"),
        ("classify", "embed", "has no pooling task 'embed': it has classify, token_classify"),
    ],
)
def test_a_pooling_task_is_one_that_the_engine_runs(own: str | None, asked: str | None, match: str) -> None:
    """An engine is started for one of those that its model supports; vLLM runs no other."""
    llm = SimpleNamespace(supported_tasks=("classify", "token_classify"), pooling_task=own)
    params = SimpleNamespace(task=asked)
    if match:
        with pytest.raises(SpecError, match=match):
            frontend.pooling_task(llm, params)
    else:
        assert frontend.pooling_task(llm, params) == (asked or own)

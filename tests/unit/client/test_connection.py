"""The client's line to workers: what it sends when they ask for rows, and what it says when they are gone."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from vllm_tap.client import ways as ways_module
from vllm_tap.client.connection import Connection
from vllm_tap.errors import EngineDiedError, SpecError
from vllm_tap.transport import SEGMENT
from vllm_tap.vllm import frontend


@pytest.mark.parametrize(
    ("wanted", "longest", "lengths"),
    [(16, 2048, [16]), (513, 2048, [513]), (513, 200, [199] * 7 + [146]), (16, 2, [1] * 48), (16, 1, [1] * 48)],
)
def test_prompts_have_as_many_tokens_as_are_wanted(
    monkeypatch: pytest.MonkeyPatch, wanted: int, longest: int, lengths: list[int]
) -> None:
    """No prompt is longer than the model takes with a token to generate, and none of them is found in a cache."""
    sent: list[Any] = []
    given: list[Any] = []
    monkeypatch.setattr(frontend, "new_params", lambda llm, fields: SimpleNamespace(**fields))
    monkeypatch.setattr(
        frontend, "generate", lambda llm, prompts, params, use_tqdm: (sent.extend(prompts), given.extend(params))
    )
    llm = SimpleNamespace(
        model_config=SimpleNamespace(max_model_len=longest),
        llm_engine=SimpleNamespace(output_processor=SimpleNamespace(request_states={}), engine_core=None),
    )
    Connection._pass_rows(object.__new__(Connection), llm, wanted)
    assert all(params.skip_reading_prefix_cache for params in given)
    assert [len(prompt["prompt_token_ids"]) for prompt in sent] == lengths
    assert {token for prompt in sent for token in prompt["prompt_token_ids"]} <= set(range(1, 17))


def test_transports_go_by_their_names() -> None:
    """`shared_memory` is another name of `segment`; what is no transport is refused with those that are."""
    connection: Any = object.__new__(Connection)
    asked: list[str] = []
    connection._prepare(SimpleNamespace)
    connection.ways.readers = asked.append
    ways = [connection.choose_transport(name) for name in ("auto", "segment", "shared_memory", "tcp", "inline")]
    assert ways == ["auto", "segment", "segment", "tcp", ""]
    assert asked == ways[:4]
    for wrong in ("pigeon", ["segment"], None):
        with pytest.raises(SpecError, match='"auto", "segment", "tcp", "nixl" or "inline"'):
            connection.choose_transport(wrong)


@pytest.mark.parametrize("transport", ["auto", "segment", "tcp"])
def test_a_worker_that_is_gone_is_said_to_be_by_every_way(transport: str) -> None:
    """Also by one on which it was never reached, where nothing answers now."""
    connection = object.__new__(Connection)
    connection._prepare(None)
    connection.ways._readers[0, SEGMENT] = SimpleNamespace(alive=False)  # type: ignore[assignment]
    connection._met([SimpleNamespace(rank=SimpleNamespace(rank=0), host="", network="tcp://127.0.0.1:1", routing={},
                                      routing_version=0)])  # fmt: skip
    with pytest.raises(EngineDiedError, match="new LLM"):
        connection.choose_transport(transport)


def test_each_worker_is_reached_with_the_secret_that_it_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without VLLM_TAP_SECRET every rank makes one of its own, and tells it to who has the engine object."""
    monkeypatch.delenv("VLLM_TAP_SECRET", raising=False)
    used: dict[str, bytes] = {}
    monkeypatch.setattr(ways_module, "NetworkReader", lambda where, terms: used.setdefault(where, terms.secret))
    monkeypatch.setattr(ways_module, "caller", lambda where, terms: used[where] == terms.secret)
    connection = object.__new__(Connection)
    connection._prepare(None)
    secrets = {f"tcp://127.0.0.1:{rank}": f"a secret of rank {rank}" for rank in range(2)}
    connection.ways.hellos = [
        SimpleNamespace(rank=SimpleNamespace(rank=rank), host="", network=where, secret=secret)
        for rank, (where, secret) in enumerate(secrets.items())
    ]
    connection.ways.readers("tcp")
    assert used == {where: secret.encode() for where, secret in secrets.items()}
    assert all(connection.ways._callers.values())


def test_a_worker_that_was_lost_is_greeted_on_a_new_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each worker once, whatever other ways to it there are; none is forgotten."""
    made: list[str] = []

    def made_to(where: str, *terms: Any) -> Any:
        made.append(where)
        return SimpleNamespace(where=where, close=lambda: None)

    def greeted(callers: list[Any]) -> list[Any]:
        return [SimpleNamespace(rank=SimpleNamespace(rank=places.index(one.where))) for one in callers]

    for name in ("caller", "Caller"):
        monkeypatch.setattr(ways_module, name, made_to)
    monkeypatch.setattr(ways_module, "greeted", greeted)
    access: Any = SimpleNamespace()
    ways, places = ways_module.Ways(access), ["tcp://10.0.0.7:7300", "calls", "tcp://10.0.0.8:7300"]
    ways.greet_at(places)
    for rank, way, alive in [(0, "tcp", True), (1, "nixl", True), (2, "tcp", False)]:
        ways._readers[rank, way] = reader = SimpleNamespace(alive=alive, close=lambda: None)  # type: ignore[assignment]
        ways._callers.setdefault((rank, way), reader)  # type: ignore[arg-type]
    assert ways.let_go_of_lost() == {"tcp"}
    for _ in range(2):
        assert [hello.rank.rank for hello in ways.greet_again()] == [0, 1, 2]
    assert made == [*places, places[2]]

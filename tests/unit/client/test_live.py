"""Requests that share a capture in an event loop: when they ask the workers for rows. No engine runs."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from vllm_tap.client import live
from vllm_tap.client.live import Request
from vllm_tap.spec import Spec
from vllm_tap.vllm.asynchronous import Tokens

PROMPT = [1, 2, 3]
NUM_TOKENS = 5


class Live:
    """A capture of no engine, that keeps which positions were asked for."""

    def __init__(self, spec: Spec) -> None:
        self.spec = spec
        self.recording = SimpleNamespace(mark=lambda params, sample: params)
        self.asked: list[tuple[int, int]] = []
        self.num_taken = 0
        self.row_bytes, self.num_users, self.budget_bytes = 100, 2, 8000

    def new_sample(self) -> int:
        return 0

    async def ask(self, function: Callable[[Any], Any], *, takes: bool) -> Any:
        self.num_taken += takes
        return function(self)

    def rows_until(self, sample: int, tokens: Tokens, begin: int, end: int) -> Any:
        self.asked.append((begin, end))
        return SimpleNamespace(num_rows=end - begin)


@pytest.mark.parametrize(
    ("spec", "asked", "num_taken"),
    [
        (Spec(hidden_states=[0], positions="all"), [(0, 3), (3, 4), (4, 5), (5, 6), (6, 7)], 5),
        (Spec(hidden_states=[0], positions="last"), [(0, 3), (3, 7)], 1),
        (Spec(hidden_states=[0], positions="prompt"), [(0, 3), (3, 7)], 1),
        (Spec(hidden_states=[0], positions=[0, -1]), [(0, 3), (3, 7)], 1),
        (Spec(hidden_states=[0], positions="all", reduce="mean"), [(0, 7)], 1),
    ],
)
def test_rows_of_prompts_are_not_asked_for_with_every_token(
    spec: Spec, asked: list[tuple[int, int]], num_taken: int
) -> None:
    """Once when they are final; those of generated tokens as they come. At the end nothing is left in the workers."""
    live, tokens = Live(spec), Tokens(is_delta=True)

    async def run() -> None:
        request = Request(live, None)  # type: ignore[arg-type]
        for number in range(NUM_TOKENS):
            one = SimpleNamespace(index=0, token_ids=[number])
            finished = number == NUM_TOKENS - 1
            tokens.add(SimpleNamespace(request_id="", finished=finished, prompt_token_ids=PROMPT, outputs=[one]))
            await request.rows(tokens)

    asyncio.run(run())
    assert live.asked == asked
    assert live.num_taken == num_taken


def test_rows_that_nobody_waits_for_are_due_after_a_while_or_when_they_are_many(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of two requests, each may have a sixteenth of the budget in the workers: 5 rows."""
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr(live, "time", SimpleNamespace(monotonic=lambda: clock.now))

    async def run() -> None:
        request, tokens = Request(Live(Spec(hidden_states=[0], positions="all")), None), Tokens(True)  # type: ignore[arg-type]

        def come(*ids: int, finished: bool = False) -> bool:
            one = SimpleNamespace(index=0, token_ids=list(ids))
            tokens.add(SimpleNamespace(request_id="", finished=finished, prompt_token_ids=PROMPT, outputs=[one]))
            return request.is_due(tokens)

        assert not come(1, 2)
        assert come(3)
        await request.rows(tokens)
        assert not come(4)
        clock.now += 2 * live.REST_S
        assert come(5)
        await request.rows(tokens)
        assert not come(6)
        assert come(7, finished=True)

    asyncio.run(run())

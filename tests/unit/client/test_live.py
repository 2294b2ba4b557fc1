"""Requests that share a capture in an event loop: when they ask the workers for rows. No engine runs."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

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

    def new_sample(self) -> int:
        return 0

    async def take(self) -> None:
        self.num_taken += 1

    async def locked(self, function: Callable[[Any], Any]) -> Any:
        return function(self)

    def rows_until(self, sample: int, tokens: Tokens, begin: int, end: int) -> Any:
        self.asked.append((begin, end))
        return SimpleNamespace(num_rows=end - begin)


@pytest.mark.parametrize(
    ("spec", "asked"),
    [
        (Spec(hidden_states=[0], positions="all"), [(0, 3), (3, 4), (4, 5), (5, 6), (6, 7)]),
        (Spec(hidden_states=[0], positions="last"), [(0, 3), (3, 7)]),
        (Spec(hidden_states=[0], positions="prompt"), [(0, 3), (3, 7)]),
        (Spec(hidden_states=[0], positions=[0, -1]), [(0, 3), (3, 7)]),
        (Spec(hidden_states=[0], positions="all", reduce="mean"), [(0, 7)]),
    ],
)
def test_rows_of_prompts_are_not_asked_for_with_every_token(spec: Spec, asked: list[tuple[int, int]]) -> None:
    """Once when they are final, and at the end; those of generated tokens as they come."""
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
    assert live.num_taken == len(asked)

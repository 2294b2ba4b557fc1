"""What outputs say that every row must be."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np

from vllm_tap.client.sequences import PromptArrays, Sequences


def output(prompt: list[int], *completions: list[int]) -> Any:
    """An output of vLLM."""
    generated = [SimpleNamespace(index=index, token_ids=ids) for index, ids in enumerate(completions)]
    return SimpleNamespace(prompt_token_ids=prompt, outputs=generated)


def test_prompts_that_were_read_ahead_give_the_same_sequences() -> None:
    """Those that were not, or have grown since, are read from the outputs."""
    prompts = [[5, 6, 7], [8], [9, 10], [11]]
    ahead = PromptArrays()
    ahead.add(prompts[:3])
    prompts[2].append(100)
    outputs = [output(prompts[0], [1, 2], [3]), None, output(prompts[1], [4]), *map(output, prompts[2:], [[5, 6]] * 2)]
    plain, faster = Sequences(outputs, "all"), Sequences(outputs, "all", ahead)
    assert plain.token_ids.tolist() == [5, 6, 7, 1, 5, 6, 7, 8, 9, 10, 100, 5, 11, 5]
    for name in ("token_ids", "starts", "wanted", "wanted_starts"):
        np.testing.assert_array_equal(getattr(plain, name), getattr(faster, name))
    assert plain.slots == faster.slots


def test_a_list_of_the_same_tokens_is_not_taken_for_another() -> None:
    """Lists are told apart by what they are, not by what is in them; one that was read stays as long as needed."""
    ahead = PromptArrays()
    ahead.add([[1, 2, 3] for _ in range(100)])
    fresh = [[number, 0, 0] for number in range(100)]
    assert all(ahead.of(prompt) is prompt for prompt in fresh)

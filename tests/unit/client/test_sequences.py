"""What outputs say that every row must be."""

from __future__ import annotations

from array import array
from types import SimpleNamespace
from typing import Any

import numpy as np

from vllm_tap.client.sequences import Sequences, TokenArrays


def output(prompt: list[int], *completions: list[int]) -> Any:
    """An output of vLLM."""
    generated = [SimpleNamespace(index=index, token_ids=ids) for index, ids in enumerate(completions)]
    return SimpleNamespace(request_id="r", prompt_token_ids=prompt, outputs=generated)


def test_tokens_that_were_read_ahead_give_the_same_sequences() -> None:
    """Lists that were read, in part or not at all, that have grown since or been cut short."""
    prompts = [[5, 6, 7], [8], [9, 10], [11]]
    generated = [[1, 2], [3], [4], [5, 6, 7, 8], [12, 13, 14]]
    ahead = TokenArrays()
    ahead.read([*prompts[:3], *generated[1:]])
    prompts[2].append(100)
    generated[2] += [20, 21]
    ahead.read([*prompts[:1], generated[2]])
    generated[2].append(22)
    del generated[4][1:]
    outputs = [output(prompts[0], *generated[:2]), None, *map(output, prompts[1:], generated[2:])]
    plain, faster = Sequences(outputs, "all"), Sequences(outputs, "all", ahead)
    assert plain.token_ids.tolist() == [5, 6, 7, 1, 5, 6, 7, 8, 4, 20, 21, 9, 10, 100, 5, 6, 7, 11]
    for name in ("token_ids", "starts", "wanted", "wanted_starts"):
        np.testing.assert_array_equal(getattr(plain, name), getattr(faster, name))
    assert plain.slots == faster.slots


def test_a_capture_without_outputs_has_no_tokens() -> None:
    """As when all of its requests were aborted."""
    assert len(Sequences([None], "all").token_ids) == 0


def test_a_list_of_the_same_tokens_is_not_taken_for_another() -> None:
    """Lists are told apart by what they are, not by what is in them; one that was read stays as long as needed."""
    ahead = TokenArrays()
    ahead.read([[1, 2, 3] for _ in range(100)])
    for number in range(100):
        tokens = array("i")
        ahead.append(tokens, [number, 0, 0], 3)
        assert tokens.tolist() == [number, 0, 0]

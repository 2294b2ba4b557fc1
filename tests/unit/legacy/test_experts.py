"""The expert usage against a plain loop over tokens, and its refusals."""

from __future__ import annotations

import math
import statistics
from typing import Any

import pytest
import torch

from vllm_tap.errors import SpecError
from vllm_tap.legacy.experts import analyze_expert_usage

LOGITS = {layer: torch.randn(9, 6, generator=torch.Generator().manual_seed(layer)) for layer in (1, 3)}
KEYS = {"expert_selection", "expert_weights", "expert_usage_counts", "load_balance", "num_tokens_analyzed"}


def by_hand(logits: torch.Tensor, top_k: int) -> tuple[list[list[int]], list[list[float]], list[int]]:
    """Return selection, weights and counts, worked out token by token in Python floats."""
    selection, weights, counts = [], [], [0] * logits.shape[1]
    for row in logits.tolist():
        total = sum(math.exp(value) for value in row)
        best = sorted(range(len(row)), key=lambda expert: -row[expert])[:top_k]
        selection.append(best)
        weights.append([math.exp(row[expert]) / total for expert in best])
        for expert in best:
            counts[expert] += 1
    return selection, weights, counts


@pytest.mark.parametrize("top_k", [1, 2, 6])
def test_selection_weights_and_counts_are_those_of_a_loop(top_k: int) -> None:
    """Selections and counts agree exactly; weights to 1e-6, since float32 softmax is compared with Python's floats."""
    usage = analyze_expert_usage(LOGITS, top_k=top_k)
    assert set(usage) == KEYS
    assert usage["num_tokens_analyzed"] == 9
    for layer, logits in LOGITS.items():
        selection, weights, counts = by_hand(logits, top_k)
        assert usage["expert_selection"][layer].dtype == torch.int64
        assert usage["expert_selection"][layer].tolist() == selection
        torch.testing.assert_close(usage["expert_weights"][layer], torch.tensor(weights), rtol=0, atol=1e-6)
        assert usage["expert_usage_counts"][layer] == counts
        assert all(type(count) is float for count in usage["expert_usage_counts"][layer])


def test_load_balance_is_deviation_over_mean() -> None:
    """The measure is the sample deviation over the mean, to float32's precision, and a perfect balance is 0."""
    usage = analyze_expert_usage(LOGITS)
    for layer, counts in usage["expert_usage_counts"].items():
        want = statistics.stdev(counts) / statistics.mean(counts)
        assert usage["load_balance"][layer] == pytest.approx(want, rel=1e-6)
    assert analyze_expert_usage({0: torch.eye(4)}, top_k=1)["load_balance"] == {0: 0.0}


def test_normalized_counts_are_parts_of_the_tokens() -> None:
    """With `normalize` counts are divided by the tokens and sum to `top_k`; the balance is what it was.

    Divided in float32, against Python's floats: a few roundings (6e-8) off; 1e-6 is what `approx` allows.
    """
    plain, parts = analyze_expert_usage(LOGITS), analyze_expert_usage(LOGITS, normalize=True)
    for layer, fractions in parts["expert_usage_counts"].items():
        assert fractions == pytest.approx([count / 9 for count in plain["expert_usage_counts"][layer]])
        assert sum(fractions) == pytest.approx(2)
    assert parts["load_balance"] == plain["load_balance"]


@pytest.mark.parametrize("token_range", [(2, 5), (None, 4), (4, None), (None, None), (-3, None), (5, 100), (6, 2)])
def test_token_range_is_a_slice(token_range: Any) -> None:
    """A range gives what the sliced logits give, open and negative bounds included, and an empty one counts nothing."""
    usage = analyze_expert_usage(LOGITS, token_range=token_range)
    sliced = analyze_expert_usage({layer: logits[slice(*token_range)] for layer, logits in LOGITS.items()})
    assert usage["num_tokens_analyzed"] == sliced["num_tokens_analyzed"] == len(range(9)[slice(*token_range)])
    assert usage["expert_usage_counts"] == sliced["expert_usage_counts"]
    assert usage["expert_selection"][3].equal(sliced["expert_selection"][3])


def test_no_layers_give_no_usage() -> None:
    """A model without experts has no usage: empty dicts and no tokens."""
    usage = analyze_expert_usage({})
    assert usage.pop("num_tokens_analyzed") == 0  # type: ignore[misc]
    assert all(value == {} for value in usage.values())


def test_empty_range_normalizes_to_zeros() -> None:
    """No tokens: parts are 0, not a division by zero."""
    usage = analyze_expert_usage(LOGITS, token_range=(0, 0), normalize=True)
    assert usage["expert_usage_counts"][1] == [0.0] * 6
    assert usage["load_balance"][1] == 0.0


def test_one_expert_is_in_balance() -> None:
    """A sample deviation of one expert would not be a number: the balance is 0."""
    assert analyze_expert_usage({0: torch.zeros(3, 1)}, top_k=1)["load_balance"] == {0: 0.0}


def test_bfloat16_is_compared_in_float32() -> None:
    """Logits that bfloat16 tells apart, while bfloat16 weights would not, are ranked by the logits."""
    logits = torch.tensor([[1.0, 1.0078125, 1.015625, 1.0]], dtype=torch.bfloat16)
    assert analyze_expert_usage({0: logits}, top_k=2)["expert_selection"][0].tolist() == [[2, 1]]


@pytest.mark.parametrize(
    ("logits", "options", "problem"),
    [
        ({5: torch.zeros(2, 3, 4)}, {}, r"layer 5: expected router logits \[T, E\], got \(2, 3, 4\)"),
        ({5: torch.zeros(2, 4)}, {"top_k": 5}, "top_k is 5, layer 5 has 4 experts"),
        ({5: torch.zeros(2, 4)}, {"top_k": 0}, "top_k is 0"),
        ({5: torch.zeros(2, 4), 6: torch.zeros(3, 4)}, {}, r"\{5: 2, 6: 3\}"),
        ({5: torch.zeros(2, 4)}, {"token_range": (1,)}, r"expected \(start, end\)"),
        ({5: torch.zeros(2, 4)}, {"token_range": (0.5, 1)}, r"expected \(start, end\)"),
    ],
)
def test_arguments_that_cannot_be_are_refused(logits: Any, options: Any, problem: str) -> None:
    """Every refusal says what was expected and, where there is one, which layer."""
    with pytest.raises(SpecError, match=problem):
        analyze_expert_usage(logits, **options)

"""Spread of tokens over experts by router logits: the old `analyze_expert_usage`.

Runs in the client.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypedDict

import torch

from vllm_tap.errors import SpecError

TokenRange = tuple[int | None, int | None]


class ExpertUsage(TypedDict):
    """Result of `analyze_expert_usage`, by layer."""

    expert_selection: dict[int, torch.Tensor]
    expert_weights: dict[int, torch.Tensor]
    expert_usage_counts: dict[int, list[float]]
    load_balance: dict[int, float]
    num_tokens_analyzed: int


def analyze_expert_usage(
    router_logits: Mapping[int, torch.Tensor],
    top_k: int = 2,
    token_range: TokenRange | None = None,
    normalize: bool = False,
) -> ExpertUsage:
    """Select the `top_k` experts of every token by softmax, and count how often each expert was selected.

    A model may select otherwise (sigmoid, groups, a bias): for what it really did, capture `routed_experts`.

    Args:
        router_logits: tensors [T, E] by layer, e.g. of `get_moe_router_logits`.
        top_k: experts per token.
        token_range: (start, end) of the tokens to look at, as a slice; None is open.
        normalize: counts are divided by the number of tokens, so that each is the part of the tokens that selected the
            expert and those of a layer sum to `top_k`.

    Returns:
        `expert_selection` {layer: LongTensor [T, K]}, heaviest first; `expert_weights` {layer: Tensor [T, K]}, float32,
        softmax over all experts, not renormalised; `expert_usage_counts` {layer: [float]}, one per expert;
        `load_balance` {layer: standard deviation of the counts / (mean + 1e-8)}, the deviation of a sample (n - 1), 0.0
        for one expert and the same with `normalize`; `num_tokens_analyzed`. No layers give empty dicts and 0 tokens.
        Tensors are on the device of the logits.

    Raises:
        SpecError: logits that are not [T, E], layers with different token counts, a `top_k` outside 1 to E, or a
            `token_range` that is not a pair.

    Source:
        `router_logits` as given; softmax in float32.

    Cost:
        One softmax and one top-k per layer; one device sync per layer, for the counts.
    """
    tokens = _token_slice(token_range)
    usage = ExpertUsage(
        expert_selection={}, expert_weights={}, expert_usage_counts={}, load_balance={}, num_tokens_analyzed=0
    )
    _check(router_logits, top_k)
    for layer, logits in router_logits.items():
        weights, selection = torch.softmax(logits[tokens].float(), dim=-1).topk(top_k, dim=-1)
        counts = torch.bincount(selection.flatten(), minlength=logits.shape[1]).float().cpu()
        usage["expert_selection"][layer] = selection
        usage["expert_weights"][layer] = weights
        usage["expert_usage_counts"][layer] = (counts / max(1, len(selection)) if normalize else counts).tolist()
        usage["load_balance"][layer] = _load_balance(counts)
        usage["num_tokens_analyzed"] = len(selection)
    return usage


def _token_slice(token_range: TokenRange | None) -> slice:
    if token_range is None:
        return slice(None)
    pair = tuple(token_range)
    if len(pair) != 2 or any(type(bound) not in (int, type(None)) for bound in pair):
        raise SpecError(f"token_range is {token_range!r}: expected (start, end), each an int or None")
    return slice(*pair)


def _check(router_logits: Mapping[int, torch.Tensor], top_k: int) -> None:
    lengths = set()
    for layer, logits in router_logits.items():
        if logits.dim() != 2:
            raise SpecError(f"layer {layer}: expected router logits [T, E], got {tuple(logits.shape)}", layer=layer)
        if not 1 <= top_k <= logits.shape[1]:
            raise SpecError(f"top_k is {top_k}, layer {layer} has {logits.shape[1]} experts: lower it", layer=layer)
        lengths.add(logits.shape[0])
    if len(lengths) > 1:
        counts = {layer: logits.shape[0] for layer, logits in router_logits.items()}
        raise SpecError(f"layers have different numbers of tokens: {counts}: pass one capture")


def _load_balance(counts: torch.Tensor) -> float:
    deviation = counts.std() if len(counts) > 1 else counts.new_zeros(())
    return float(deviation / (counts.mean() + 1e-8))

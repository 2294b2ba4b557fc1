"""A check that a router does what it states: experts and weights of a few rows against their logits.

Runs in the worker process. vLLM's routers hold settings that some of them do not apply (the one for processors leaves
out a bias without groups), so a statement is made only after it has come true.
"""

from __future__ import annotations

from typing import Final

import msgspec
import torch

from vllm_tap.engine.model.residual import NO_ROWS
from vllm_tap.frame.routing import UNKNOWN, Routing, unknown

# Some routers round scores to bfloat16 before they choose and weight (2 ** -8 each, of the largest), and then choose
# other experts among nearly equal ones. A factor, a sum or a softmax too many or too few is off by tenths.
TOLERANCE: Final = 0.02

SCORINGS: Final = ("softmax", "sigmoid", "sqrtsoftplus")


@torch.inference_mode()
def confirm(stated: Routing, logits: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> Routing:
    """Return a router's statement, confirmed by rows that it has chosen for, or why it does not hold.

    Args:
        stated: What the router states.
        logits: Router logits, [R, E].
        ids: Experts that it chose by them, [R, K], in any order.
        weights: Weights of these, [R, K].
    """
    if stated.scoring == UNKNOWN:
        return stated
    if not _fits(stated, logits.shape[-1]):
        return unknown(f"what vLLM's router states does not fit {logits.shape[-1]} experts")
    if not (*logits.shape[:1], stated.num_chosen) == ids.shape == weights.shape:
        shapes = f"{tuple(logits.shape)}, {tuple(ids.shape)}, {tuple(weights.shape)}"
        return unknown(f"shapes of logits, ids and weights do not fit together: {shapes}")
    # Padding has equal logits for all experts, which any K of them follow from.
    usable = torch.isfinite(logits).all(-1) & (logits.amax(-1) > logits.amin(-1))
    usable &= _is_decisive(stated, logits.float())
    if not usable.any():
        return unknown(NO_ROWS)
    errors = _errors(stated, logits[usable].float(), ids[usable].long(), weights[usable].float())
    if errors is None or max(errors) > TOLERANCE:
        seen = "some are no experts" if errors is None else f"scores off by {errors[0]:.2g}, weights by {errors[1]:.2g}"
        return unknown(
            f"the experts that vLLM chooses do not follow from the logits by what its router states ({seen})"
        )
    return msgspec.structs.replace(stated, checked=True)


def _fits(stated: Routing, num_experts: int) -> bool:
    """Tell whether a statement has a meaning for this many experts."""
    grouped = num_experts % stated.num_groups == 0 and num_experts > stated.num_groups >= stated.num_chosen_groups > 0
    return (grouped or stated.num_groups == 1) and len(stated.bias) in (0, num_experts) and stated.scoring in SCORINGS


def _errors(
    stated: Routing, logits: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor
) -> tuple[float, float] | None:
    """Return how far chosen scores and weights are off, relative to the largest; None if ids are no K experts each."""
    ordered = ids.sort(-1).values
    if ordered.min() < 0 or ordered.max() >= logits.shape[-1] or (ordered.diff(dim=-1) == 0).any():
        return None
    scores = _scores(stated.scoring, logits)
    preference = _preference(stated, scores)
    chosen = preference.gather(-1, ids).sort(-1, descending=True).values
    expected = scores.gather(-1, ids)
    if stated.renormalized:
        expected = expected / expected.sum(-1, keepdim=True)
    return _off(chosen, preference.topk(stated.num_chosen).values), _off(weights, expected * stated.scale)


def _scores(scoring: str, logits: torch.Tensor) -> torch.Tensor:
    if scoring == "softmax":
        return logits.softmax(-1)
    return logits.sigmoid() if scoring == "sigmoid" else torch.nn.functional.softplus(logits).sqrt()


def _groups(stated: Routing, scores: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what experts are chosen by, [R, G, E / G], and what their groups count, [R, G]."""
    if stated.bias:
        scores = scores + scores.new_tensor(stated.bias)
    groups = scores.view(len(scores), stated.num_groups, -1)
    return groups, groups.topk(2 if stated.bias and stated.num_groups > 1 else 1).values.sum(-1)


def _preference(stated: Routing, scores: torch.Tensor) -> torch.Tensor:
    """Return what experts are chosen by, [R, E]; minus infinity in groups that are not."""
    groups, ranks = _groups(stated, scores)
    is_out = ranks < ranks.topk(stated.num_chosen_groups).values[:, -1:]
    return groups.masked_fill(is_out[:, :, None], -torch.inf).view(scores.shape)


def _is_decisive(stated: Routing, logits: torch.Tensor) -> torch.Tensor:
    """Tell which rows [R] do not hang on rounding: of two groups about equal, either may be the last one chosen."""
    if stated.num_chosen_groups >= stated.num_groups:
        return torch.ones(len(logits), dtype=torch.bool, device=logits.device)
    _, ranks = _groups(stated, _scores(stated.scoring, logits))
    best = ranks.topk(stated.num_chosen_groups + 1).values
    return best[:, -2] - best[:, -1] > TOLERANCE * best[:, 0].abs()


def _off(actual: torch.Tensor, expected: torch.Tensor) -> float:
    # An expert of a group that is not chosen is infinitely far off.
    error = (actual - expected).abs().max() / expected.abs().max()
    return float(error.nan_to_num(nan=torch.inf, posinf=torch.inf))

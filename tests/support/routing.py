"""Chooses experts as a stated routing says, token by token, in plain torch; runs in the test process."""

from __future__ import annotations

from typing import Any

import torch

from vllm_tap.frame.routing import Routing

SCORES = {
    "softmax": lambda logits: torch.softmax(logits, -1),
    "sigmoid": torch.sigmoid,
    "sqrtsoftplus": lambda logits: torch.nn.functional.softplus(logits).sqrt(),
}


def follow(routing: Routing, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what follows from logits [R, E]: ids [R, K] in ascending order, and their weights [R, K]."""
    pairs = [_follow_one(routing, row) for row in logits.float()]
    return torch.stack([ids for ids, _ in pairs]), torch.stack([weights for _, weights in pairs])


def _follow_one(routing: Routing, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    scores = SCORES[routing.scoring](logits)
    preference = scores + torch.tensor(routing.bias) if routing.bias else scores
    size = len(logits) // routing.num_groups
    groups = [range(group * size, (group + 1) * size) for group in range(routing.num_groups)]
    counted = 2 if routing.bias else 1
    rank = [float(preference[list(group)].topk(min(counted, size)).values.sum()) for group in groups]
    best = sorted(range(len(groups)), key=lambda group: -rank[group])[: routing.num_chosen_groups]
    reachable = [expert for group in best for expert in groups[group]]
    chosen = sorted(sorted(reachable, key=lambda expert: -float(preference[expert]))[: routing.num_chosen])
    weights = scores[chosen]
    if routing.renormalized:
        weights = weights / weights.sum()
    return torch.tensor(chosen), weights * routing.scale


def in_order(ids: torch.Tensor, weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ids and weights [R, K] with the ids of each row in ascending order: routers need not sort."""
    ids, order = ids.long().sort(-1)
    return ids, weights.float().gather(-1, order)


def check_followed(result: Any) -> None:
    """Check that the experts and weights of all rows of a capture follow from its logits and the stated routing."""
    for layer, routing in result.routing.items():
        for sample in result:
            found_ids, found_weights = in_order(sample.expert_ids[layer], sample.expert_weights[layer])
            expected_ids, expected_weights = follow(routing, sample.router_logits[layer])
            assert torch.equal(found_ids, expected_ids)
            # Both in float32, with exponentials divided by another sum: a few roundings (6e-8) of a weight up to one.
            torch.testing.assert_close(found_weights, expected_weights, rtol=0, atol=1e-6)

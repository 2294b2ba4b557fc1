"""A linear probe: which of two kinds of text is this, by the last token's row of one layer?"""

from __future__ import annotations

from typing import Any

import torch

from vllm_tap import Spec, capture

STEPS, RATE = 200, 0.1


def last_rows(llm: Any, prompts: list[Any], layer: int) -> torch.Tensor:
    """Return the row of each prompt's last token: float32 [N, D]. Prompts may be conversations."""
    spec = Spec(hidden_states=[layer], positions="last", dtype="float32")
    return capture(llm, prompts, spec, max_tokens=1, temperature=0, progress=False).rows("hidden_states", layer).clone()


def train(rows: torch.Tensor, labels: torch.Tensor) -> torch.nn.Linear:
    """Fit a logistic regression to rows [N, D] with labels 0 and 1 [N]."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        probe = torch.nn.Linear(rows.shape[1], 1)
    optimizer = torch.optim.AdamW(probe.parameters(), lr=RATE)
    for _ in range(STEPS):
        optimizer.zero_grad()
        torch.nn.functional.binary_cross_entropy_with_logits(probe(rows)[:, 0], labels.float()).backward()
        optimizer.step()
    return probe


def accuracy(probe: torch.nn.Linear, rows: torch.Tensor, labels: torch.Tensor) -> float:
    """Return the part of the rows whose label the probe tells."""
    return ((probe(rows)[:, 0] > 0) == labels.bool()).float().mean().item()


def run(llm: Any, first: list[Any], second: list[Any], layer: int) -> float:
    """Train on the even prompts of two kinds, and return the accuracy on the odd ones."""
    rows = last_rows(llm, [*first, *second], layer)
    labels = torch.tensor([0] * len(first) + [1] * len(second))
    center, scale = rows[::2].mean(0), rows[::2].std() + 1e-6
    rows = (rows - center) / scale
    return accuracy(train(rows[::2], labels[::2]), rows[1::2], labels[1::2])

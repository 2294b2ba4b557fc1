"""An SAE's training set: recorded to disk, read in shuffled batches, and a small sparse autoencoder trained on it."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import torch

import vllm_tap
from vllm_tap import Spec
from vllm_tap.interchange import activations

SPARSITY = 1e-3


class SparseAutoencoder(torch.nn.Module):
    """Rows as sparse sums of learned directions."""

    def __init__(self, width: int, num_features: int) -> None:
        super().__init__()
        self.encode, self.decode = torch.nn.Linear(width, num_features), torch.nn.Linear(num_features, width)

    def forward(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the rows made again, and the features [B, F]."""
        features = self.encode(rows).relu()
        return self.decode(features), features


def run(llm: Any, prompts: list[Any], layer: int, folder: Path, steps: int = 200) -> list[float]:
    """Record a layer of all prompts and train on it; return the error of each step."""
    dataset = vllm_tap.record(llm, prompts, Spec(hidden_states=[layer]), folder, max_tokens=8, temperature=0)
    batches = activations(dataset, layer, batch_size=32)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        width = dataset.rows("hidden_states", layer).shape[1]
        sae = SparseAutoencoder(width, 4 * width)
    optimizer = torch.optim.Adam(sae.parameters(), lr=1e-3)
    errors = []
    for batch in itertools.islice(batches, steps):
        rows = batch.float()
        again, features = sae(rows)
        error = (again - rows).square().mean()
        optimizer.zero_grad()
        (error + SPARSITY * features.abs().mean()).backward()
        optimizer.step()
        errors.append(error.item())
    return errors

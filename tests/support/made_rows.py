"""Captures of rows that were never computed, as `capture` returns them, for readers of other packages.

Runs in the test process. States lie near a plane of four directions, so that there is something to learn.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from vllm_tap import Spec
from vllm_tap.client.owned import OwnedRows
from vllm_tap.client.result import Capture
from vllm_tap.client.sequences import Sequences
from vllm_tap.frame.routing import Routing

NUM_LAYERS = 8
EXPERT_LAYERS = (1, 2, 3, 4, 5, 6, 7)
"""The first layer is dense."""

NUM_EXPERTS, NUM_CHOSEN = 300, 4
"""More experts than a byte holds."""

VOCABULARY = 128


def outputs(count: int, seed: int = 0, num_completions: int = 1) -> list[Any]:
    """Return what vLLM would: prompts of 3 to 14 tokens, completions of 2 to 9."""
    rng = np.random.default_rng(seed)
    made = []
    for number in range(count):
        prompt = rng.integers(0, VOCABULARY, rng.integers(3, 15)).tolist()
        done = [
            SimpleNamespace(
                index=index,
                token_ids=rng.integers(0, VOCABULARY, rng.integers(2, 10)).tolist(),
                text=f"text {index}",
                finish_reason="length",
            )
            for index in range(num_completions)
        ]
        made.append(SimpleNamespace(request_id=str(number), prompt=None, prompt_token_ids=prompt, outputs=done))
    return made


def made(
    count: int = 6,
    *,
    width: int = 16,
    layers: tuple[int, ...] = tuple(range(NUM_LAYERS)),
    final: bool = True,
    experts: bool = False,
    positions: str = "all",
    num_completions: int = 1,
    dtype: torch.dtype = torch.bfloat16,
) -> Capture:
    """Return a capture of so many prompts."""
    given = outputs(count, num_completions=num_completions)
    sequences = Sequences(given, positions)
    rng = torch.Generator().manual_seed(0)
    num_rows = len(sequences.wanted)
    directions = torch.randn(4, width, generator=rng)
    tensors: dict[tuple[str, int], torch.Tensor] = {}
    for layer in layers:
        mixed = torch.randn(num_rows, 4, generator=rng) @ directions
        tensors["hidden_states", layer] = (mixed + 0.05 * torch.randn(num_rows, width, generator=rng)).to(dtype)
    if final:
        tensors["final_hidden_states", NUM_LAYERS - 1] = torch.randn(num_rows, width, generator=rng).to(dtype)
    if experts:
        for layer in EXPERT_LAYERS:
            drawn = torch.rand(num_rows, NUM_EXPERTS, generator=rng).topk(NUM_CHOSEN)
            tensors["expert_ids", layer] = drawn.indices.to(torch.int16)
            tensors["expert_weights", layer] = drawn.values.softmax(-1)
    streams = list(dict.fromkeys(stream for stream, _ in tensors))
    capture = Capture(
        Spec(hidden_states=list(layers), final_hidden_states=final, positions=positions),
        given,
        sequences,
        [OwnedRows(tensors)],
        dict.fromkeys(streams, "made up"),
        {layer: Routing(scoring="softmax", num_chosen=NUM_CHOSEN, checked=True) for layer in EXPERT_LAYERS},
        streams,
        NUM_LAYERS,
        True,
    )
    capture.model = {"name": "made/up", "dtype": str(dtype).removeprefix("torch.")}
    return capture

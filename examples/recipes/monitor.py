"""A monitor: look at each token's row while the next tokens come, and end a generation early."""

from __future__ import annotations

from typing import Any

import torch

from vllm_tap import Spec, Tap


def run(llm: Any, prompt: Any, layer: int, vector: torch.Tensor, limit: float, **sampling: Any) -> list[float]:
    """Generate until a row has a product with a vector [D] beyond a limit; return the products that were seen."""
    products: list[float] = []
    with Tap(llm).stream_rows([prompt], Spec(hidden_states=[layer], positions="generated"), **sampling) as blocks:
        for block in blocks:
            products += (block.hidden_states[layer].float() @ vector).tolist()
            if products and products[-1] > limit:
                break  # leaving the block aborts the request
    return products

"""A heat map of a mixture of experts: how often each layer's router chose each expert, as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

import vllm_tap
from vllm_tap import Spec
from vllm_tap.viz import plots


def run(llm: Any, prompts: list[Any], folder: Path) -> np.ndarray:
    """Record the routers' choices, save `experts.png` beside them, and return the counts by layer: [L, E]."""
    spec = Spec(router_logits="all", routed_experts="all")
    dataset = vllm_tap.record(llm, prompts, spec, folder / "run", max_tokens=8, temperature=0)
    plots.save(plots.experts(dataset), folder / "experts.png")
    num_experts = dataset.rows("router_logits", dataset.layers["router_logits"][0]).shape[1]
    ids = [dataset.rows("expert_ids", layer)[:].long() for layer in dataset.layers["expert_ids"]]
    return np.stack([one.flatten().bincount(minlength=num_experts).numpy() for one in ids])

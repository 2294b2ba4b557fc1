"""A logit lens: what each layer would say next, by the model's own final norm and head."""

from __future__ import annotations

from typing import Any

import torch

from vllm_tap import Spec, capture


def run(llm: Any, prompt: Any, model: Any) -> list[int]:
    """Return the likeliest next token after a prompt by layer.

    Args:
        llm: A `vllm.LLM`.
        prompt: What to say something after.
        model: The same model in transformers, for its norm and its head.
    """
    spec = Spec(hidden_states="all", positions="last")
    sample = capture(llm, [prompt], spec, max_tokens=1, temperature=0, progress=False)[0]
    rows = torch.cat(list(sample.hidden_states.values())).to(model.dtype)
    with torch.no_grad():
        return model.lm_head(model.model.norm(rows)).argmax(-1).tolist()

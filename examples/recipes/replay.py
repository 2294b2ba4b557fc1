"""Router replay: experts as vLLM chose them, as arrays that RL trainers take, and forced upon a Hugging Face model."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch

from vllm_tap import Spec, capture
from vllm_tap.interchange import envelopes, replay


def run(llm: Any, prompts: list[Any], **sampling: Any) -> list[tuple[Any, Any]]:
    """Generate, and return for each prompt its tokens and experts: `record.ids` and `record.weights` are [T, L, K]."""
    result = capture(llm, prompts, Spec(routed_experts="all"), progress=False, **sampling)
    records = [replay(sample) for sample in result]
    for record in records:
        envelopes.skyrl(record)  # or vllm, verl, slime, prime_rl, ...
    return [(sample.token_ids, record) for sample, record in zip(result, records, strict=True)]


@contextlib.contextmanager
def forced(model: Any, record: Any) -> Iterator[None]:
    """Have a Hugging Face model take the recorded experts and weights, as long as the block runs.

    The model is given the tokens of the record alone, and all of them: a row of the record for each. A gate of
    transformers 5 returns logits, weights and ids. Return `weights` of its own for these ids to train it.
    """

    def force(layer: int) -> Callable[[Any, Any, Any], Any]:
        ids = torch.from_numpy(record.ids[:, layer].astype("int64"))
        weights = torch.from_numpy(record.weights[:, layer])
        return lambda _gate, _args, found: (found[0], weights.to(found[1]), ids.to(found[2]))

    layers = model.model.layers
    hooks = [layers[layer].mlp.gate.register_forward_hook(force(layer)) for layer in record.expert_layers]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()

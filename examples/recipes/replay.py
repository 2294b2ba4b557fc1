"""Router replay: experts as vLLM chose them, as the arrays that RL trainers take."""

from __future__ import annotations

from typing import Any

from vllm_tap import Spec, capture
from vllm_tap.interchange import envelopes, replay


def run(llm: Any, prompts: list[Any], **sampling: Any) -> list[tuple[Any, Any]]:
    """Generate, and return for each prompt its tokens and experts: `record.ids` and `record.weights` are [T, L, K]."""
    result = capture(llm, prompts, Spec(routed_experts="all"), progress=False, **sampling)
    records = [replay(sample) for sample in result]
    for record in records:
        envelopes.skyrl(record)  # or vllm, verl, slime, prime_rl, ...
    return [(sample.token_ids, record) for sample, record in zip(result, records, strict=True)]

"""toploc's proofs of what a model computed, from rows of `final_hidden_states`. In any process."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vllm_tap.errors import SpecError
from vllm_tap.interchange.source import require_whole

if TYPE_CHECKING:
    import torch


def toploc_activations(sample: Any) -> list[torch.Tensor]:
    """Return the states that toploc's functions take: those of the prompt [P, D], then one [D] for each later token.

    Raises:
        PositionError: A position has no row.
        SpecError: `final_hidden_states` were not captured.
    """
    require_whole(sample, "toploc")
    rows = sample.final_hidden_states.bfloat16().clone()
    num_prompt = len(sample.output.prompt_token_ids)
    return [rows[:num_prompt], *rows[num_prompt:]]


def toploc_proofs(sample: Any, *, decode_batching_size: int = 32, topk: int = 128) -> list[bytes]:
    """Return proofs of a sequence; `toploc.verify_proofs_bytes` checks them against the states of another run.

    Args:
        sample: A sample with `final_hidden_states` of all positions.
        decode_batching_size: Generated tokens of a proof.
        topk: Largest elements that a proof holds.

    Raises:
        PositionError: A position has no row.
        SpecError: toploc is not installed, or `final_hidden_states` were not captured.
    """
    try:
        from toploc import build_proofs_bytes
    except ImportError as error:
        raise SpecError("this needs toploc: pip install toploc.") from error
    activations = toploc_activations(sample)
    proofs: list[bytes] = build_proofs_bytes(activations, decode_batching_size, topk)
    return proofs

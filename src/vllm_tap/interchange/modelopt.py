"""Model-Optimizer: a `.pt` for each conversation, as `OfflineSupervisedDataset` reads it. In any process."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vllm_tap.interchange.drafts import Drafts, Last, Loss


def write(
    source: Any,
    folder: Path,
    *,
    last: Last,
    layers: Sequence[int] | str | None = None,
    loss: Loss = "generated",
) -> dict[str, Any]:
    """Write a file for each sequence. `last` is written into each, as `hidden_states_prenorm`.

    Layer ids are ours, as those of its script for Hugging Face. Its script for vLLM takes the layer before each.
    """
    import torch

    drafts = Drafts(source, "modelopt", layers, last, loss)
    for sample in drafts:
        entries = {
            "input_ids": sample.token_ids,
            "hidden_states": sample.last,
            "aux_hidden_states": sample.aux.flatten(1),
            "loss_mask": sample.loss_mask,
            "conversation_id": sample.name,
            "hidden_states_prenorm": last == "pre-norm",
        }
        torch.save(entries, folder / f"{sample.name}.pt")
    return {**drafts.facts, "aux_layer_ids": drafts.layers}

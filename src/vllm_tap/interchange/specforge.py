"""SpecForge: a `.ckpt` for each sequence, as its offline readers take them. In any process."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, Literal

from vllm_tap.interchange.drafts import Drafts, DraftSample, Loss
from vllm_tap.interchange.source import choice

Algorithm = Literal["eagle3", "dflash", "dspark"]
ALGORITHMS: Final = ("eagle3", "dflash", "dspark")


def write(
    source: Any,
    folder: Path,
    *,
    layers: Sequence[int] | str | None = None,
    loss: Loss = "generated",
    algorithm: Algorithm = "eagle3",
) -> dict[str, Any]:
    """Write a file for each sequence. The last state is that behind the final norm: SpecForge's head has no norm.

    SpecForge's layer ids are ours.
    """
    import torch

    choice("algorithm", algorithm, ALGORITHMS)
    drafts = Drafts(source, "specforge", layers, "post-norm", loss)
    for sample in drafts:
        torch.save(_entries(sample, algorithm), folder / f"{sample.name}.ckpt")
    return {**drafts.facts, "algorithm": algorithm, "aux_layer_ids": drafts.layers}


def _entries(sample: DraftSample, algorithm: Algorithm) -> dict[str, Any]:
    entries: dict[str, Any] = {"input_ids": sample.token_ids, "loss_mask": sample.loss_mask}
    aux = sample.aux.flatten(1)
    if algorithm == "eagle3":
        return {**entries, "hidden_state": sample.last[None], "aux_hidden_state": aux[None]}
    entries["hidden_states"] = aux
    return entries if algorithm == "dflash" else {**entries, "target_last_hidden_states": sample.last}

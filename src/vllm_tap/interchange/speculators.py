"""speculators: a folder of `datasets`, and `hidden_states/hs_{i}.safetensors` beside it. In any process."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vllm_tap.interchange import arrow
from vllm_tap.interchange.drafts import Drafts, DraftSample, Loss
from vllm_tap.store.dtypes import bytes_of
from vllm_tap.store.shard import Array, header


def write(
    source: Any, folder: Path, *, layers: Sequence[int] | str | None = None, loss: Loss = "generated"
) -> dict[str, Any]:
    """Write a sample for each sequence. The last state is that before the final norm, which speculators applies itself.

    speculators counts layers by what goes into them: its `target_layer_ids` are ours + 1, and the number of layers for
    the last state. They are in the returned facts.
    """
    drafts = Drafts(source, "speculators", layers, "pre-norm", loss)
    states = folder / "hidden_states"
    states.mkdir()
    features = {
        "input_ids": arrow.numbers("int64"),
        "loss_mask": arrow.numbers("int64"),
        "seq_len": arrow.value("int64"),
    }
    with arrow.ArrowFolder(folder, features, as_torch=True) as table:
        for number, sample in enumerate(drafts):
            _write_states(states / f"hs_{number}.safetensors", sample)
            tokens, mask = sample.token_ids.numpy(), sample.loss_mask.numpy()
            table.write({"input_ids": [tokens], "loss_mask": [mask], "seq_len": [len(tokens)]})
    ids = [layer + 1 for layer in drafts.layers]
    return {**drafts.facts, "target_layer_ids": ids, "last_layer_id": source.num_layers}


def _write_states(path: Path, sample: DraftSample) -> None:
    import torch

    tensors = {
        "token_ids": sample.token_ids,
        "hidden_states": torch.cat([sample.aux, sample.last[:, None]], 1),
    }
    arrays = {name: Array(str(one.dtype).removeprefix("torch."), tuple(one.shape)) for name, one in tensors.items()}
    with path.open("wb") as file:
        file.write(header(arrays, {"last": "pre-norm"}))
        for one in tensors.values():
            file.write(bytes_of(one).data)

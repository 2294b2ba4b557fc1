"""Samples that trainers of draft models read: token ids, a loss mask and states. In any process.

Layers are ours: `hidden_states[k]` is the residual stream after decoder layer k. Exporters translate.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Final, Literal, NamedTuple

import numpy as np

from vllm_tap.errors import RowsMissingError, SpecError
from vllm_tap.interchange import source as rows_of

if TYPE_CHECKING:
    import torch

Last = Literal["pre-norm", "post-norm"]
LASTS: Final = ("pre-norm", "post-norm")
Loss = Literal["generated", "all", "metadata"]
LOSSES: Final = ("generated", "all", "metadata")


class DraftSample(NamedTuple):
    """One sequence.

    Attributes:
        name: Of its file.
        token_ids: int64 [T].
        loss_mask: int64 [T]; 1 where a token counts.
        aux: States of the chosen layers, [T, A, H], the model's dtype.
        last: State of the last layer, [T, H].
    """

    name: str
    token_ids: torch.Tensor
    loss_mask: torch.Tensor
    aux: torch.Tensor
    last: torch.Tensor


class Drafts:
    """All sequences of a source, for one trainer.

    Args:
        source: A `Capture` or a `Dataset`, with all positions.
        reader: Name of the trainer, for errors.
        layers: Layers of `aux`, ascending, or None for those of EAGLE-3: 1, L // 2 - 1 and L - 4.
        last: Whether the last state is that before the final norm or behind it.
        loss: Tokens that count: those that were "generated", "all", or those of `metadata["loss_mask"]`, a list of 0
            and 1 for each row.

    Attributes:
        layers: Layers of `aux`, from the first on.
        last: As given.
        num_samples: Samples that were taken.

    Raises:
        LayerError: A layer is not there; the message names the `Spec`.
        SpecError: `layers` or an option cannot be.
    """

    def __init__(self, source: Any, reader: str, layers: Sequence[int] | str | None, last: Last, loss: Loss) -> None:
        rows_of.choice("last", last, LASTS)
        rows_of.choice("loss", loss, LOSSES)
        self._source, self._reader, self._loss = source, reader, loss
        self.layers = _layers_of(source.num_layers, layers, reader)
        self.last, self.num_samples = last, 0
        # A model without a final norm has one last state.
        is_normed = last == "post-norm" and source.has_final_norm
        self._last_stream = "final_hidden_states" if is_normed else "hidden_states"
        wanted = self.layers if is_normed else [*self.layers, source.num_layers - 1]
        rows_of.require(source, "hidden_states", wanted, reader)
        if is_normed:
            rows_of.require(source, "final_hidden_states", [source.num_layers - 1], reader)

    @property
    def hidden_size(self) -> int:
        """Elements of a state."""
        return rows_of.width_of(self._source, "hidden_states", self.layers[0])

    @property
    def facts(self) -> dict[str, Any]:
        """Statement of an export about itself, when all samples were taken."""
        return {"layers": self.layers, "last": self.last, "loss": self._loss, "samples": self.num_samples}

    def __iter__(self) -> Iterator[DraftSample]:
        import torch

        for sample in rows_of.sequences(self._source):
            rows_of.require_whole(sample, self._reader)
            states = sample.hidden_states
            self.num_samples += 1
            last = sample.final_hidden_states if self._last_stream == "final_hidden_states" else states[-1]
            yield DraftSample(
                rows_of.name_of(sample),
                sample.token_ids.long(),
                torch.from_numpy(self._mask(sample)),
                torch.stack([states[layer] for layer in self.layers], 1),
                last.clone(),  # of its own: a file would hold all that lies around a view
            )

    def _mask(self, sample: Any) -> Any:
        num_rows = len(sample)
        if self._loss == "all":
            return np.ones(num_rows, np.int64)
        if self._loss == "metadata":
            return _stated_mask(sample, num_rows)
        mask = (np.arange(num_rows) >= len(sample.output.prompt_token_ids)).astype(np.int64)
        if not mask.any():
            raise RowsMissingError(
                f"sample {sample.index} has no row of a generated token, so none would count. "
                'Pass loss="all", or loss="metadata" and a "loss_mask" in its metadata.',
                sample=sample.index,
            )
        return mask


def _stated_mask(sample: Any, num_rows: int) -> Any:
    stated = (getattr(sample, "metadata", None) or {}).get("loss_mask")
    if stated is None or len(stated) != num_rows or not set(stated) <= {0, 1}:
        given = "none" if stated is None else f"a list of {len(stated)}"
        raise SpecError(
            f"sample {sample.index} needs a metadata['loss_mask'] of {num_rows} times 0 or 1, one for each row; "
            f"it has {given}. Record with metadata=..., which `Capture` does not keep."
        )
    return np.asarray(stated, np.int64)


def _layers_of(num_layers: int, given: Sequence[int] | str | None, reader: str) -> list[int]:
    if given == "all":
        return list(range(num_layers))
    if isinstance(given, str):
        raise SpecError(f'layers are "all" or whole numbers, got {given!r}.')
    layers = [1, num_layers // 2 - 1, num_layers - 4] if given is None else list(given)
    if any(not -num_layers <= layer < num_layers for layer in layers):
        if given is None:
            raise SpecError(f"{reader}'s default layers do not fit a model of {num_layers}: pass layers=[...].")
        raise SpecError(f"layers {layers} cannot all be: this model has layers 0 to {num_layers - 1}.")
    layers = [layer % num_layers for layer in layers]
    if not layers or layers != sorted(set(layers)):
        why = f"{reader}'s default layers of a model of {num_layers} are" if given is None else "layers are"
        raise SpecError(f"{why} {layers}; layers ascend, each once: pass layers=[...].")
    return layers

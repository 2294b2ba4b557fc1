"""A logit lens: the next token out of any layer's rows, by a model's own norm and head. In the user's process."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt

from vllm_tap.errors import SpecError

CHUNK_ROWS: Final = 256
FINAL_NORMS: Final = ("norm", "final_layernorm", "final_layer_norm", "ln_f", "norm_f")
"""Names of the norm behind the last layer, in the models of transformers."""


class Guess(NamedTuple):
    """The likeliest next token for each row.

    Attributes:
        token_ids: int64 [R].
        shares: Their probabilities, float32 [R].
    """

    token_ids: npt.NDArray[np.int64]
    shares: npt.NDArray[np.float32]


Lens = Callable[[npt.NDArray[np.float32]], Guess]
"""Rows [R, D] of the residual stream to guesses."""


def lens_of(folder: str) -> Lens:
    """Return the lens of a model, which transformers loads in float32: its final norm, and all that makes logits of it.

    Raises:
        SpecError: It cannot be loaded, or has no final norm that is known.
    """
    try:
        import torch
        from transformers import AutoModelForCausalLM

        model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    except (ImportError, OSError, ValueError) as error:
        raise SpecError(f"the model of {folder} cannot be loaded: {error}", path=folder) from error
    base = model.eval().base_model
    norm = next((getattr(base, name) for name in FINAL_NORMS if hasattr(base, name)), None)
    if norm is None:
        raise SpecError(f"{type(model).__name__} has no final norm under a name that is known: {FINAL_NORMS}.")
    head = _Head(model, norm)
    return lambda rows: _guess(head, rows)


class _Head:
    """Everything of a model behind its last layer: the model runs with its layers taken out."""

    def __init__(self, model: Any, norm: Any) -> None:
        self._model, self._norm, self._rows = model, norm, None
        model.base_model.forward = self._normed

    def _normed(self, *_: Any, **__: Any) -> Any:
        from transformers.modeling_outputs import MoeModelOutputWithPast

        return MoeModelOutputWithPast(last_hidden_state=self._norm(self._rows))

    def logits(self, rows: Any) -> Any:
        """Return logits [R, V] of rows [R, D]."""
        self._rows = rows[None]
        return self._model(input_ids=rows.new_zeros((1, len(rows)), dtype=int), use_cache=False).logits[0]


def _guess(head: _Head, rows: npt.NDArray[np.float32]) -> Guess:
    import torch

    found = []
    with torch.inference_mode():
        for chunk in torch.from_numpy(np.array(rows, np.float32)).split(CHUNK_ROWS):
            found.append(head.logits(chunk).softmax(-1).max(-1))
    ids = [one.indices.numpy() for one in found] or [np.empty(0, np.int64)]
    shares = [one.values.numpy() for one in found] or [np.empty(0, np.float32)]
    return Guess(np.concatenate(ids), np.concatenate(shares))

"""A steering direction: the difference of means of two kinds of prompts, added to a layer of a Hugging Face model."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

from vllm_tap import Spec, capture
from vllm_tap.store.accumulators import LabelMeans


def direction(llm: Any, towards: list[Any], away: list[Any], layer: int) -> torch.Tensor:
    """Return the mean row of some prompts' last tokens minus that of others: float32 [D]."""
    means = LabelMeans()
    for label, prompts in (("towards", towards), ("away", away)):
        spec = Spec(hidden_states=[layer], positions="last")
        result = capture(llm, prompts, spec, max_tokens=1, temperature=0, progress=False)
        means.update(result.rows("hidden_states", layer), label)
    return torch.from_numpy(means.difference("towards", "away")).float()


@contextlib.contextmanager
def steered(model: Any, layer: int, vector: torch.Tensor) -> Iterator[None]:
    """Add a vector to what a decoder layer of a Hugging Face model returns, as long as the block runs."""

    def add(_: Any, __: Any, output: Any) -> Any:
        return (output[0] + vector, *output[1:]) if isinstance(output, tuple) else output + vector

    hook = model.model.layers[layer].register_forward_hook(add)
    try:
        yield
    finally:
        hook.remove()

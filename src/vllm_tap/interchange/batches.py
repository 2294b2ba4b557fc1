"""Iterators of activations, as trainers of sparse autoencoders take them. In any process."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from vllm_tap.errors import RowsMissingError
from vllm_tap.interchange import source as rows_of
from vllm_tap.store.loader import Order
from vllm_tap.store.rows import Rows

if TYPE_CHECKING:
    import torch


def activations(
    source: Any,
    layers: int | Sequence[int],
    *,
    batch_size: int,
    stream: str = "hidden_states",
    seed: int | None = 0,
    epochs: int | None = None,
    dtype: torch.dtype | None = None,
    hook: str = "blocks.{layer}.hook_resid_post",
) -> Iterator[Any]:
    """Yield shuffled batches: the `data` of dictionary_learning's `trainSAE`, the `data_provider` of `SAETrainer`.

    Args:
        source: A `Capture` or a `Dataset`.
        layers: A layer for tensors, or several for mappings of tensors by hook.
        batch_size: Rows of a batch. All batches have as many: what is left of an epoch is left out.
        stream: Stream of the rows.
        seed: Seed of the order, which each epoch draws anew; None for the rows' own order.
        epochs: Passes over the rows; without end unless it is given.
        dtype: Dtype of the batches, instead of the stream's.
        hook: Key of a layer's tensor where there are several layers.

    Returns:
        Iterator of tensors [B, D], or of {hook: tensor [B, D]}, CPU, of their own.

    Raises:
        LayerError: A layer is not there; the message names the `Spec` that has it.
        RowsMissingError: There are fewer rows than a batch has.

    Cost:
        One gather for each layer.
    """
    chosen = rows_of.absolute(source, [layers] if isinstance(layers, int) else layers)
    rows_of.require(source, stream, chosen, "activations")
    if source.num_rows < batch_size:
        raise RowsMissingError(f"{source.num_rows} rows do not fill a batch of {batch_size}: lower batch_size.")
    order = Order(source.num_rows, batch_size, 256, 256, seed)
    views = [source.rows(stream, layer) for layer in chosen]
    batches = _batches(order, views, epochs, dtype)
    if isinstance(layers, int):
        return (batch[0] for batch in batches)
    names = [hook.format(layer=layer) for layer in chosen]
    return (dict(zip(names, batch, strict=True)) for batch in batches)


def _batches(
    order: Order, views: list[Any], epochs: int | None, dtype: torch.dtype | None
) -> Iterator[list[torch.Tensor]]:
    for epoch in itertools.count() if epochs is None else range(epochs):
        for number in range(order.num_rows // order.batch_size):
            chosen = order.batch(epoch, number)
            yield [_gather(view, chosen).to(dtype) for view in views]


def _gather(view: Any, numbers: Any) -> torch.Tensor:
    if isinstance(view, Rows):
        return view.take(numbers)
    import torch

    rows: torch.Tensor = view[torch.from_numpy(numbers)]
    return rows

"""Replay records: the experts of each token of a sequence in all decoder layers, for trainers of MoE. In any process.

`envelopes` has them as those trainers read them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from vllm_tap.errors import PositionError, SpecError
from vllm_tap.interchange import source as rows_of


@dataclass(frozen=True, slots=True)
class Replay:
    """Experts of a sequence.

    Row r is position `start + r`. The last token that was generated never entered the model, so it has no row.

    Attributes:
        ids: [T, L, K] over all decoder layers, logical ids in the router's order, the stream's integer dtype.
        weights: float32 [T, L, K], in the order of the ids, as the router returned them.
        start: Position of the first row.
        num_tokens: Tokens of the sequence, the last one too.
        expert_layers: Layers that have experts; in the others `ids` are 0 and `weights` 0.
    """

    ids: npt.NDArray[Any]
    weights: npt.NDArray[np.float32]
    start: int
    num_tokens: int
    expert_layers: tuple[int, ...]

    def padded(self, fill: int | str) -> npt.NDArray[Any]:
        """Return `ids` with a row for every token: the last one is `fill`, or that before it for "repeat".

        Args:
            fill: A number, such as 0 or -1, or "repeat".

        Returns:
            [num_tokens - start, L, K]; signed where `fill` is negative.
        """
        missing = self.num_tokens - self.start - len(self.ids)
        if fill == "repeat":
            tail = self.ids[-1:].repeat(missing, axis=0)
        elif isinstance(fill, str):
            raise SpecError(f'fill is a number or "repeat", got {fill!r}.')
        else:
            kind = np.promote_types(self.ids.dtype, np.min_scalar_type(fill))
            tail = np.full((missing, *self.ids.shape[1:]), fill, kind)
        return np.concatenate([self.ids, tail])

    def without_experts(self, fill: int) -> npt.NDArray[Any]:
        """Return `ids` with another number in layers that have no experts, such as -1; signed if it is negative."""
        ids = self.ids.astype(np.promote_types(self.ids.dtype, np.min_scalar_type(fill)))
        dense = [layer for layer in range(ids.shape[1]) if layer not in self.expert_layers]
        ids[:, dense] = fill
        return ids


def replay(sample: Any, *, start: int | None = None) -> Replay:
    """Return the experts of each token of a sequence in all decoder layers.

    Args:
        sample: A sample of a `Capture` or a `Dataset` with routed experts of all layers that have any.
        start: First position of the record; that of the sample's first row unless it is given. For a further turn of
            a conversation: the number of rows that earlier turns have.

    Raises:
        LayerError: Experts of a layer are not there; the message names the `Spec` that has them.
        PositionError: A position from `start` to the end has no row.
        SpecError: Experts were not captured, or layers choose different numbers of experts.

    Source:
        Ids and weights that the router itself returned.

    Cost:
        One copy of the rows.
    """
    source = rows_of.source_of(sample)
    layers = sorted(source.routing)
    if not layers:
        source.require("expert_ids")
        raise SpecError("there is nothing to replay: no layer of this model has experts.")
    for stream in ("expert_ids", "expert_weights"):
        rows_of.require(source, stream, layers, "a replay record")
    num_tokens, skipped, first = _span(sample, start)
    ids = [sample.expert_ids[layer][skipped:].numpy() for layer in layers]
    weights = [sample.expert_weights[layer][skipped:].float().numpy() for layer in layers]
    widths = sorted({rows.shape[1] for rows in ids})
    if len(widths) > 1:
        raise SpecError(f"layers choose {widths} experts each, which one array does not hold.")
    shape = (len(ids[0]), source.num_layers, widths[0])
    all_ids, all_weights = np.zeros(shape, ids[0].dtype), np.zeros(shape, np.float32)
    for layer, one, weight in zip(layers, ids, weights, strict=True):
        all_ids[:, layer], all_weights[:, layer] = one, weight
    return Replay(all_ids, all_weights, first, num_tokens, tuple(layers))


def _span(sample: Any, start: int | None) -> tuple[int, int, int]:
    """Return the number of tokens, the rows to leave out, and the first position."""
    positions = sample.positions.numpy()
    first = int(positions[0]) if len(positions) else 0
    output = sample.output
    completions = getattr(output, "outputs", None) or ()
    done = next((one for one in completions if one.index == sample.completion), None)
    num_generated = len(done.token_ids) if done is not None else 0
    num_tokens = len(output.prompt_token_ids) + num_generated
    stop = num_tokens - (1 if num_generated else 0)
    begin = first if start is None else start
    if not first <= begin <= stop or not np.array_equal(positions, np.arange(first, stop)):
        shown = f"{first} to {int(positions[-1])}" if len(positions) else "none"
        raise PositionError(
            f"a replay record needs each position from {begin} to {stop - 1}, sample {sample.index} has positions "
            f'{shown}. Capture with Spec(positions="all"), or "generated" for those behind the prompt.',
            sample=sample.index,
            completion=sample.completion,
        )
    return num_tokens, begin - first, begin

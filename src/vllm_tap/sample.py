"""Attributes by which a sample, of a capture or of a dataset, hands out its streams. In any process."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Generic, NamedTuple, TypeVar

if TYPE_CHECKING:
    import torch

Layers = TypeVar("Layers", bound="Mapping[int, torch.Tensor]")


class ExpertRows(NamedTuple):
    """Experts of a layer: tensors [R, K]."""

    ids: torch.Tensor
    weights: torch.Tensor


class ExpertMap(Mapping[int, ExpertRows]):
    """Ids and weights of the chosen experts: {layer: (ids, weights)}."""

    def __init__(self, ids: Mapping[int, torch.Tensor], weights: Mapping[int, torch.Tensor]) -> None:
        self._ids, self._weights = ids, weights

    def __getitem__(self, layer: int) -> ExpertRows:
        return ExpertRows(self._ids[layer], self._weights[layer])

    def __contains__(self, layer: object) -> bool:
        return layer in self._ids

    def __iter__(self) -> Iterator[int]:
        return iter(self._ids)

    def __len__(self) -> int:
        return len(self._ids)

    def __repr__(self) -> str:
        return f"<routed_experts: layers {list(self)}>"


class SampleStreams(Generic[Layers]):
    """Streams of a sample by name; of whoever has them by `_layers`."""

    def _layers(self, stream: str) -> Layers:
        """Return the layers of a stream.

        Raises:
            SpecError: It is not there.
        """
        raise NotImplementedError

    @property
    def hidden_states(self) -> Layers:
        """The residual stream after each decoder layer, before the final norm: {layer: Tensor [R, D]}."""
        return self._layers("hidden_states")

    @property
    def hidden_states_fp8(self) -> Layers:
        """The same in e4m3, of dtype="fp8"; to be multiplied by `hidden_states_scale`: {layer: Tensor [R, D]}."""
        return self._layers("hidden_states_fp8")

    @property
    def hidden_states_scale(self) -> Layers:
        """A scale for each row of `hidden_states_fp8`: {layer: Tensor float32 [R, 1]}."""
        return self._layers("hidden_states_scale")

    @property
    def attention_output(self) -> Layers:
        """Rows that attention, or a block in its place, adds to the residual stream: {layer: Tensor [R, D]}."""
        return self._layers("attention_output")

    @property
    def mlp_output(self) -> Layers:
        """Rows that the MLP or the experts add to the residual stream: {layer: Tensor [R, D]}."""
        return self._layers("mlp_output")

    @property
    def router_logits(self) -> Layers:
        """The gate's output before softmax or sigmoid: {layer: Tensor [R, E]}."""
        return self._layers("router_logits")

    @property
    def expert_ids(self) -> Layers:
        """Experts as the router chose them: {layer: Tensor [R, K], the smallest integer dtype}."""
        return self._layers("expert_ids")

    @property
    def expert_weights(self) -> Layers:
        """Weights of the chosen experts as the router computed them: {layer: Tensor [R, K]}."""
        return self._layers("expert_weights")

    @property
    def routed_experts(self) -> ExpertMap:
        """`expert_ids` and `expert_weights` under the name that `Spec` has for both: {layer: (ids, weights)}."""
        return ExpertMap(self.expert_ids, self.expert_weights)

    @property
    def embeddings(self) -> torch.Tensor:
        """The input of decoder layer 0. Tensor [R, D]; see `LayerMap` for its lifetime and cost."""
        return self._layers("embeddings")[0]

    @property
    def final_hidden_states(self) -> torch.Tensor:
        """The output of the final norm. Tensor [R, D]; see `LayerMap` for its lifetime and cost."""
        return self._layers("final_hidden_states")[-1]

    @property
    def last_hidden_state(self) -> torch.Tensor:
        """Another name of `final_hidden_states`, which is Hugging Face's."""
        return self.final_hidden_states

"""A sample in the form in which Hugging Face's models return their hidden states and router logits. Client process."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Final, Protocol

import torch

from vllm_tap.errors import SpecError
from vllm_tap.spec import Spec
from vllm_tap.streams import SINGLE_STREAMS

if TYPE_CHECKING:
    from vllm_tap.client.model_output import HuggingFaceOutput

HIDDEN: Final = 'Spec(hidden_states="all", embeddings=True, final_hidden_states=True)'
HIDDEN_WITHOUT_NORM: Final = 'Spec(hidden_states="all", embeddings=True)'
ROUTER: Final = 'Spec(router_logits="all")'


class Sample(Protocol):
    """Attributes of a sample that are read here."""

    @property
    def hidden_states(self) -> Mapping[int, torch.Tensor]: ...
    @property
    def router_logits(self) -> Mapping[int, torch.Tensor]: ...
    @property
    def embeddings(self) -> torch.Tensor: ...
    @property
    def final_hidden_states(self) -> torch.Tensor: ...


class Capture(Protocol):
    """Attributes of its capture that are read here."""

    spec: Spec
    layers: dict[str, list[int]]
    num_layers: int
    has_final_norm: bool


def output_of(sample: Sample, capture: Capture, spec: Spec | None = None) -> HuggingFaceOutput:
    """Arrange the rows of a sample as Hugging Face does; see `Sample.as_hf`. `spec` is its own, if it has one."""
    spec = spec or capture.spec
    has_hidden, has_router = (name in capture.layers for name in ("hidden_states", "router_logits"))
    if not (has_hidden or has_router):
        raise SpecError(f"as_hf needs hidden states or router logits, this capture has neither. Use {HIDDEN}.")
    if spec.reduce is not None:
        raise SpecError(f"as_hf needs every position, this capture has the {spec.reduce} of them: leave reduce out.")
    if spec.positions != "all":
        raise SpecError(
            f"as_hf needs every position, this capture has positions={spec.positions!r}: leave positions out."
        )
    from vllm_tap.client.model_output import HuggingFaceOutput

    return HuggingFaceOutput(
        _hidden_states(sample, capture) if has_hidden else None,
        _router_logits(sample, capture) if has_router else None,
    )


def _hidden_states(sample: Sample, capture: Capture) -> tuple[torch.Tensor, ...]:
    norm = capture.has_final_norm
    layers = range(capture.num_layers - norm)
    missing = [name for name in (SINGLE_STREAMS if norm else ("embeddings",)) if name not in capture.layers]
    missing += [f"hidden_states[{layer}]" for layer in layers if layer not in capture.layers["hidden_states"]]
    if missing:
        whole = HIDDEN if norm else HIDDEN_WITHOUT_NORM
        raise SpecError(f"as_hf needs {', '.join(missing)}, which this capture lacks. Use {whole}.")
    streams = [sample.embeddings, *(sample.hidden_states[layer] for layer in layers)]
    return tuple(rows[None] for rows in [*streams, *([sample.final_hidden_states] if norm else [])])


def _router_logits(sample: Sample, capture: Capture) -> tuple[torch.Tensor, ...] | None:
    layers = capture.layers["router_logits"]
    if capture.spec.router_logits != "all" and len(layers) != capture.num_layers:
        raise SpecError(f"as_hf needs every layer with experts, this capture names layers {layers}. Use {ROUTER}.")
    return tuple(sample.router_logits[layer] for layer in layers) or None

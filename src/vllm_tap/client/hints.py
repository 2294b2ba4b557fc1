"""Hints of what to pass next time, for a stream or a layer that a capture lacks. Client process.

A hint is a call that works, or says why none would.
"""

from __future__ import annotations

from typing import Final, Protocol

from vllm_tap.frame.routing import Routing
from vllm_tap.spec import nearest
from vllm_tap.streams import IN_FP8, ROUTER_STREAMS, SINGLE_STREAMS, STREAMS, field_of


class Captured(Protocol):
    """Part of a capture that hints go by."""

    layers: dict[str, list[int]]
    routing: dict[int, Routing]
    num_layers: int
    has_experts: bool
    has_final_norm: bool


CHOICES: Final = {kind.name: f'{kind.field}="all"' if kind.per_layer else f"{kind.field}=True" for kind in STREAMS} | {
    name: f'{stream}="all", dtype="fp8"' for stream, names in IN_FP8.items() for name in names
}
"""Argument by which `Spec` asks for each stream of a result."""

NO_EXPERTS: Final = "No layer of this model has experts."


def for_stream(capture: Captured, stream: object, name: str = "this result") -> str:
    """Return what to say of a stream that is not in a capture."""
    if stream == "routed_experts":
        return 'routed_experts is captured as two streams: read "expert_ids" or "expert_weights".'
    if stream not in CHOICES:
        return f"there is no stream {stream!r}.{nearest(str(stream), CHOICES)}"
    has = f"{stream} was not captured: {name} has {list(capture.layers)}."
    if stream in ROUTER_STREAMS and not capture.has_experts:
        return f"{has} {NO_EXPERTS}"
    if stream == "final_hidden_states" and not capture.has_final_norm:
        return f"{has} This model has no final norm: its last layer's hidden_states are final."
    return f"{has} Use Spec({CHOICES[str(stream)]})."


def for_layer(capture: Captured, stream: str, layer: int) -> str:
    """Return what to say of a layer, counted from the first, that a stream of a capture lacks."""
    captured = capture.layers[stream]
    if stream in SINGLE_STREAMS:
        return f"There is one {stream} a model: read `sample.{stream}`."
    if not 0 <= layer < capture.num_layers:
        return f"Layers of this model are whole numbers from 0 to {capture.num_layers - 1}."
    if stream in ROUTER_STREAMS and layer not in capture.routing:
        with_experts = sorted(capture.routing)
        return f"Layers of this model with experts: {with_experts}." if with_experts else NO_EXPERTS
    return f"Capture again with Spec({field_of(stream)}={sorted({*captured, layer})})."

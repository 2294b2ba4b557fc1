"""What to pass next time, for a stream or a layer that a capture lacks. Client process.

A hint is a call that works, or says why none would.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from vllm_tap.frame.routing import ROUTED
from vllm_tap.spec import SINGLE_STREAMS, nearest

if TYPE_CHECKING:
    from vllm_tap.client.result import Capture

FIELDS: Final = {
    "hidden_states": 'hidden_states="all"',
    "router_logits": 'router_logits="all"',
    "expert_ids": 'routed_experts="all"',
    "expert_weights": 'routed_experts="all"',
    "embeddings": "embeddings=True",
    "final_hidden_states": "final_hidden_states=True",
}
"""What has `Spec` ask for each stream of a result."""

NO_EXPERTS: Final = "No layer of this model has experts."


def for_stream(capture: Capture, stream: object) -> str:
    """Return what to say of a stream that is not in a capture."""
    if stream == "routed_experts":
        return 'routed_experts is captured as two streams: read "expert_ids" or "expert_weights".'
    if stream not in FIELDS:
        return f"there is no stream {stream!r}.{nearest(str(stream), FIELDS)}"
    has = f"{stream} was not captured: this result has {list(capture.layers)}."
    if stream in ROUTED and not capture.has_experts:
        return f"{has} {NO_EXPERTS}"
    if stream == "final_hidden_states" and not capture.has_final_norm:
        return f"{has} This model has no final norm: its last layer's hidden_states are final."
    return f"{has} Use Spec({FIELDS[str(stream)]})."


def for_layer(capture: Capture, stream: str, layer: int) -> str:
    """Return what to say of a layer, counted from the first, that a stream of a capture lacks."""
    captured = capture.layers[stream]
    if stream in SINGLE_STREAMS:
        return f"There is one {stream} a model: read `sample.{stream}`."
    if not 0 <= layer < capture.num_layers:
        return f"Layers of this model are whole numbers from 0 to {capture.num_layers - 1}."
    if stream in ROUTED and layer not in capture.routing:
        with_experts = sorted(capture.routing)
        return f"Layers of this model with experts: {with_experts}." if with_experts else NO_EXPERTS
    field = FIELDS[stream].partition("=")[0]
    return f"Capture again with Spec({field}={sorted({*captured, layer})})."

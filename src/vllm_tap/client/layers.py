"""The layers of each stream that a Spec asks for, of those that a model has. Client process."""

from __future__ import annotations

from collections.abc import Iterable

from vllm_tap.client.connection import Connection
from vllm_tap.errors import EngineUnsupportedError, SpecError
from vllm_tap.spec import Layers, Spec, resolve_layers
from vllm_tap.streams import BLOCK_STREAMS, LAYERED_FIELDS, ROUTER_STREAMS, streams_of


def resolve(connection: Connection, spec: Spec) -> dict[str, tuple[int, ...]]:
    """Return the layers of each of the workers' streams that the specification asks for.

    Raises:
        LayerError: A layer that the model does not have.
        EngineUnsupportedError: A stream that it does not have.
    """
    has_experts = bool(connection.available("router_logits"))
    streams: dict[str, tuple[int, ...]] = {}
    for field in spec.streams:
        for stream in streams_of(field):
            available = connection.available(stream)
            reason = connection.why_not(stream)
            if not available and not reason and (stream not in ROUTER_STREAMS or has_experts):
                reason = "no forward pass went through the place where it is taken"
                if stream in BLOCK_STREAMS:
                    reason = "no layer that has run adds the output of such a block to the residual stream"
            if reason:
                raise EngineUnsupportedError(f"{stream} cannot be captured from this model: {reason}")
            if not available and getattr(spec, field) == "all" and spec.missing == "error":
                raise SpecError(
                    f'{field}="all" chooses no layer: no layer with experts was found in this model. Leave {field} '
                    'out, or pass Spec(..., missing="skip") to models of either kind.'
                )
            layers: Layers = getattr(spec, field) if field in LAYERED_FIELDS else "all"
            streams[stream] = tuple(resolve_layers(stream, layers, available, connection.num_layers))
    return streams


def union(streams: Iterable[dict[str, tuple[int, ...]]]) -> dict[str, tuple[int, ...]]:
    """Return the layers of all streams that any of several choices has."""
    union: dict[str, set[int]] = {}
    for layers_of in streams:
        for stream, layers in layers_of.items():
            union.setdefault(stream, set()).update(layers)
    return {stream: tuple(sorted(layers)) for stream, layers in union.items()}

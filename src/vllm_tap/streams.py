"""The streams: one row for each kind of tensor that can be taken. Every list of their names is derived from here.

A *field* is what a `Spec` calls a choice; it stands for one stream of the workers, or several that are taken together.
"""

from __future__ import annotations

from typing import Final, Literal, NamedTuple


class StreamKind(NamedTuple):
    """One kind of row.

    Attributes:
        name: Of the stream, as workers, results and files call it.
        field: Of the `Spec` that asks for it.
        part: Part of the model that hands it out: once a layer, but for those of the model.
        source: The tensor that its rows are; empty where that is decided for each model.
        about: The field in a few words, for options of commands.
    """

    name: str
    field: str
    part: Literal["model", "layer", "block", "router"]
    source: str
    about: str

    @property
    def per_layer(self) -> bool:
        """True if it exists once per decoder layer, and not once per model."""
        return self.part != "model"


STREAMS: Final = (
    StreamKind("hidden_states", "hidden_states", "layer", "", "the residual stream after these decoder layers"),
    StreamKind(
        "attention_output",
        "attention_output",
        "block",
        "",
        "what attention, or what stands in its place, adds to the stream in these layers",
    ),
    StreamKind("mlp_output", "mlp_output", "block", "", "what the MLP or the experts of these layers add to it"),
    StreamKind("embeddings", "embeddings", "model", "input of decoder layer 0", "the input of the first layer"),
    StreamKind(
        "final_hidden_states",
        "final_hidden_states",
        "model",
        "output of the final norm",
        "the output of the final norm",
    ),
    StreamKind(
        "router_logits",
        "router_logits",
        "router",
        "output of the gate, before softmax or sigmoid and before any bias that only chooses",
        "the gate's output of these layers",
    ),
    StreamKind(
        "expert_ids",
        "routed_experts",
        "router",
        "ids as the router chose them, in its order",
        "expert ids and weights of these layers",
    ),
    StreamKind(
        "expert_weights",
        "routed_experts",
        "router",
        "weights as the router computed them, in the order of the ids",
        "expert ids and weights of these layers",
    ),
)
"""In the order of their numbers on a device."""

NUMBERS: Final = {kind.name: number for number, kind in enumerate(STREAMS)}
"""Number of each stream in the tables of a device."""

SOURCES: Final = {kind.name: kind.source for kind in STREAMS if kind.source}
"""The tensor of each stream; of those that are left out it is decided for each model, see `engine.model.install`."""

LAYERED_FIELDS: Final = tuple(dict.fromkeys(kind.field for kind in STREAMS if kind.per_layer))
"""Fields of a `Spec` that choose layers."""

SINGLE_FIELDS: Final = tuple(dict.fromkeys(kind.field for kind in STREAMS if not kind.per_layer))
"""Fields of a `Spec` that are true or false."""

ABOUT: Final = {kind.field: kind.about for kind in STREAMS}
"""Each field in a few words."""

SINGLE_STREAMS: Final = tuple(kind.name for kind in STREAMS if not kind.per_layer)
"""Streams that exist once per model."""

BLOCK_STREAMS: Final = tuple(kind.name for kind in STREAMS if kind.part == "block")
"""Streams of the blocks of a layer: what they add to the residual stream. A layer may have one of them alone."""

ROUTER_STREAMS: Final = tuple(kind.name for kind in STREAMS if kind.part == "router")
"""Streams of a router: what it chooses by, and what it chose."""

IN_FP8: Final = {"hidden_states": ("hidden_states_fp8", "hidden_states_scale")}
"""Streams that results have in place of another where a `Spec` says dtype="fp8": elements and scales."""


def streams_of(field: str) -> tuple[str, ...]:
    """Return the streams that a field of a `Spec` stands for."""
    return tuple(kind.name for kind in STREAMS if kind.field == field)


def field_of(stream: str) -> str:
    """Return the field of a `Spec` that asks for a stream, also in another form."""
    stream = next((whole for whole, parts in IN_FP8.items() if stream in parts), stream)
    return STREAMS[NUMBERS[stream]].field


def not_of_samples(samples: object, name: str) -> AttributeError:
    """Return what to raise for an attribute that several samples together lack."""
    kind = type(samples).__name__
    streams = (name,) if name in NUMBERS else streams_of(name)
    if not streams:
        return AttributeError(f"{kind!r} object has no attribute {name!r}")
    last = "[layer]" if STREAMS[NUMBERS[streams[0]]].per_layer else ""
    layer = "layer" if last else "0" if streams[0] == "embeddings" else "-1"
    one = " and ".join(f".{stream}{last}" for stream in streams)
    return AttributeError(
        f"{name} are of samples: read {one} of each (`for sample in ...`, or [0]), "
        f'or .rows("{streams[0]}", {layer}) of all together.'
    )

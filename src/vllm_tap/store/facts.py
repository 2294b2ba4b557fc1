"""Facts of a dataset that hold for all of its rows: streams, model, conventions, routing. In every process."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any, Final

import msgspec

from vllm_tap.errors import DatasetDamagedError, DatasetError
from vllm_tap.frame.routing import Routing
from vllm_tap.spec import Spec
from vllm_tap.store.dtypes import dtype_of

FORMAT: Final = "vllm-tap dataset 1"
"""Names the arrangement of folders, files and fields; rises when it changes."""

MAX_WIDTH: Final = 2**24 - 1
MAX_LAYERS: Final = 1 << 20


class StreamFacts(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One stream: its element type, elements of a row, layers (ascending) and where its rows come from."""

    name: str
    dtype: str
    width: int
    layers: tuple[int, ...]
    convention: str

    @property
    def row_bytes(self) -> int:
        """Bytes of a row of one layer."""
        return self.width * dtype_of(self.dtype).itemsize


class Facts(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Facts that every part of a dataset has in common.

    Attributes:
        format: `FORMAT`.
        spec: What was asked for, as `Spec.to_json` writes it.
        streams: Streams in the order of the capture.
        num_layers: Decoder layers of the model.
        has_final_norm: Whether the model has a norm behind its last layer.
        routing: {layer: how its router chooses experts}.
        model: What is known of the model: `name`, `revision`, `dtype`, `config_sha256`, `tokenizer_sha256`.
        sampling: How tokens were chosen, as text; empty if it is not known.
        versions: {package: version} of the writer; parts of other versions go together.
    """

    format: str
    spec: str
    streams: tuple[StreamFacts, ...]
    num_layers: int
    has_final_norm: bool
    routing: dict[int, Routing]
    model: dict[str, str]
    sampling: str
    versions: dict[str, str]

    @property
    def conventions(self) -> dict[str, str]:
        """{stream: where its rows come from}."""
        return {stream.name: stream.convention for stream in self.streams}

    @property
    def layers(self) -> dict[str, list[int]]:
        """{stream: layers, ascending}."""
        return {stream.name: list(stream.layers) for stream in self.streams}

    def stream(self, name: str) -> StreamFacts:
        """Return the facts of a stream that is there."""
        return next(stream for stream in self.streams if stream.name == name)


def facts_of(source: Any, model: Mapping[str, str], sampling: str, versions: Mapping[str, str]) -> Facts:
    """Return the facts of a capture.

    Args:
        source: A `RowSource`.
        model: What is known of the model.
        sampling: How tokens were chosen.
        versions: Versions of the packages that write.
    """
    return Facts(
        format=FORMAT,
        spec=source.spec.to_json(),
        streams=tuple(_stream(source, name, layers) for name, layers in source.layers.items() if layers),
        num_layers=source.num_layers,
        has_final_norm=source.has_final_norm,
        routing=dict(source.routing),
        model=dict(model),
        sampling=sampling,
        versions=dict(versions),
    )


def _stream(source: Any, name: str, layers: list[int]) -> StreamFacts:
    empty = source.rows(name, layers[0], 0, 0)
    return StreamFacts(
        name=name,
        dtype=str(empty.dtype).removeprefix("torch."),
        width=int(empty.shape[1]),
        layers=tuple(layers),
        convention=source.conventions.get(name, ""),
    )


def encode(facts: Facts) -> bytes:
    """Return the file of facts: JSON, the same bytes for the same facts.

    Raises:
        DatasetError: They would not come back as they are, such as a router's bias that is infinite.
    """
    data = msgspec.json.format(msgspec.json.encode(facts), indent=1)
    told = "JSON does not hold the facts of this capture, as where a router's bias is not finite"
    try:
        is_same = decode(data, "facts") == facts
    except DatasetDamagedError as error:
        raise DatasetError(f"{told}: {error}") from error
    if not is_same:
        raise DatasetError(f"{told}.")
    return data


def digest(data: bytes) -> str:
    """Return the digest by which a manifest names its facts."""
    return hashlib.sha256(data).hexdigest()


def decode(data: bytes, path: str) -> Facts:
    """Read and check a file of facts.

    Raises:
        DatasetDamagedError: It is no such file, or says what cannot be.
    """
    try:
        facts = msgspec.json.decode(data, type=Facts)
        _check(facts)
        Spec.from_json(facts.spec)
    except (msgspec.MsgspecError, ValueError, TypeError, RecursionError) as error:
        raise DatasetDamagedError(f"{path} is not valid: {error}", path=path) from error
    return facts


def _check(facts: Facts) -> None:
    if facts.format != FORMAT:
        raise ValueError(f"format {facts.format!r}, this version reads {FORMAT!r}")
    if not 0 <= facts.num_layers <= MAX_LAYERS:
        raise ValueError(f"num_layers is {facts.num_layers}")
    names = [stream.name for stream in facts.streams]
    if len(set(names)) != len(names) or not names:
        raise ValueError(f"streams are {names}")
    for stream in facts.streams:
        check_stream(stream, facts.num_layers)


def check_stream(stream: StreamFacts, num_layers: int) -> None:
    """Refuse a stream that cannot be: its name, dtype, width, or layers.

    Raises:
        ValueError: Which.
    """
    dtype_of(stream.dtype)
    if not (stream.name.isascii() and stream.name.isidentifier()):
        raise ValueError(f"stream {stream.name!r} is not a name")
    if not 1 <= stream.width <= MAX_WIDTH:
        raise ValueError(f"{stream.name} has width {stream.width}")
    ascending = all(a < b for a, b in zip(stream.layers, stream.layers[1:], strict=False))
    if not stream.layers or not ascending or stream.layers[0] < 0 or stream.layers[-1] >= num_layers:
        raise ValueError(f"{stream.name} has layers {list(stream.layers)} of {num_layers}")


def require_same(mine: Facts, theirs: Facts, path: str) -> None:
    """Refuse rows that do not belong into one dataset.

    Raises:
        DatasetError: They differ in anything but versions; the message names the first difference.
    """
    for name in ("model", "spec", "sampling", "num_layers", "has_final_norm", "streams", "routing"):
        here, there = getattr(_comparable(mine), name), getattr(_comparable(theirs), name)
        if here == there:
            continue
        if isinstance(here, dict):
            key = next(k for k in [*here, *there] if here.get(k) != there.get(k))
            name, here, there = f"{name}[{key!r}]", here.get(key), there.get(key)
        raise DatasetError(
            f"{path} holds rows of another run: {name} is {_short(there)} there and {_short(here)} here. "
            "Use the same model and arguments, or another folder.",
            path=path,
        )


def _comparable(facts: Facts) -> Facts:
    """Leave out what later rows of the same engine may find out: that a router does as it is said to do."""
    streams = [
        msgspec.structs.replace(stream, convention=stream.convention.partition("; routing: ")[0])
        for stream in facts.streams
    ]
    routing = {layer: msgspec.structs.replace(one, checked=True) for layer, one in facts.routing.items()}
    return msgspec.structs.replace(facts, streams=tuple(streams), routing=routing)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 200 else text[:200] + "..."

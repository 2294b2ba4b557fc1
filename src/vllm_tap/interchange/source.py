"""A `Capture` or a `Dataset`, as far as exporters read it: sequences, and rows over all of them. In any process."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from vllm_tap.errors import LayerError, PositionError, SpecError
from vllm_tap.streams import SINGLE_STREAMS, field_of

if TYPE_CHECKING:
    import torch


def sequences(source: Any) -> Iterator[Any]:
    """Return all completions of all samples, in order."""
    if callable(source.sequences):
        yield from source.sequences()
        return
    slots = source.sequences.slots
    for sample, completion in sorted(slots, key=lambda key: slots[key]):
        yield source.sample(sample, completion)


def source_of(sample: Any) -> Any:
    """Return the capture or the dataset that a sample is of.

    Raises:
        SpecError: It is no sample.
    """
    if not (hasattr(sample, "_capture") or hasattr(sample, "_source")):
        raise SpecError(f"this takes one sample, such as result[0], got a {type(sample).__name__}.")
    return sample._capture if hasattr(sample, "_capture") else sample._source


def name_of(sample: Any) -> str:
    """Return the name of a sequence: its sample, and its completion behind the first. Names sort as sequences do."""
    return f"{sample.index:08d}" + (f"_{sample.completion}" if sample.completion else "")


def model_of(source: Any) -> dict[str, str]:
    """Return what is known of the model."""
    facts = getattr(source, "facts", None)
    return dict(source.model if facts is None else facts.model)


def width_of(source: Any, stream: str, layer: int) -> int:
    """Return the number of elements of a row."""
    return int(source.rows(stream, layer)[0:0].shape[1])


def numpy_rows(source: Any, stream: str, layer: int, start: int, stop: int) -> npt.NDArray[Any]:
    """Return rows `start` to `stop` over all sequences as an array [n, D]; bfloat16 comes as float32, without loss."""
    view = source.rows(stream, layer)
    return to_numpy(view[start:stop])


def to_numpy(rows: torch.Tensor) -> npt.NDArray[Any]:
    """Return a tensor as an array; bfloat16 and e4m3 come as float32, without loss."""
    import torch

    widened = torch.bfloat16, torch.float8_e4m3fn
    array: npt.NDArray[Any] = (rows.float() if rows.dtype in widened else rows).numpy()
    return array


def label(source: Any, name: str, start: int = 0, stop: int | None = None) -> npt.NDArray[Any]:
    """Return labels of rows `start` to `stop` over all sequences, by the names of `Dataset.label`: an array [n]."""
    found: npt.NDArray[Any]
    if hasattr(source, "label"):
        found = source.label(name, start, stop)
    else:
        found = getattr(source.row_labels(start, stop), name).numpy()
    return found


def require(source: Any, stream: str, layers: Sequence[int], reader: str) -> None:
    """Refuse a source that lacks a layer which a reader needs.

    Raises:
        LayerError: The layer, or its stream, is not there; the message names the `Spec` that has it.
    """
    for layer in layers:
        if not 0 <= layer < source.num_layers:
            raise LayerError(
                f"layer {layer} cannot be: this model has layers 0 to {source.num_layers - 1}.", layer=layer
            )
    there = source.layers.get(stream, [])
    missing = sorted({*layers} - {*there})
    if not missing:
        return
    if stream in SINGLE_STREAMS:
        what, ask = stream, f"{stream}=True"
    else:
        what, ask = f"{stream} of layers {missing}", f"{field_of(stream)}={sorted({*there, *layers})}"
    raise LayerError(
        f"{reader} needs {what}, which was not captured: {stream} has layers {there}. Capture with Spec({ask}).",
        layer=missing[0],
    )


def require_whole(sample: Any, reader: str, start: int = 0) -> int:
    """Return the number of positions of a sequence, whose rows must be all from `start` on.

    Raises:
        PositionError: A position has no row.
    """
    positions = sample.positions.numpy()
    if not len(positions) or not np.array_equal(positions, np.arange(start, start + len(positions))):
        shown = f"rows at {positions[:4].tolist()}..." if len(positions) else "no rows"
        raise PositionError(
            f"{reader} needs each position from {start} on, sample {sample.index} has {shown}. "
            'Capture with Spec(positions="all").',
            sample=sample.index,
            completion=sample.completion,
        )
    return len(positions)


def absolute(source: Any, layers: Iterable[int]) -> list[int]:
    """Return numbers of layers from the first on; negative ones count from the end."""
    return [layer + source.num_layers if layer < 0 else layer for layer in layers]


def choice(name: str, value: Any, choices: Sequence[Any]) -> None:
    """Refuse an option's value that is not one of some."""
    if value not in choices:
        listed = ", ".join(map(repr, choices))
        raise SpecError(f"{name} is one of {listed}; got {value!r}.")

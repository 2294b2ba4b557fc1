"""Plain forms: `datasets` on disk with a row for each sequence, and an `.npz` for each sequence. In any process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from vllm_tap.interchange import arrow
from vllm_tap.interchange import source as rows_of
from vllm_tap.streams import SINGLE_STREAMS

TEXTS = ("prompt", "text", "finish_reason")


def write_hf(source: Any, folder: Path, *, dtype: str = "float32") -> dict[str, Any]:
    """Write a folder that `datasets.load_from_disk` reads, with a column [R, D] for each stream and layer.

    Columns are `hidden_states.12`; streams that a model has once go by their name alone. Floating-point rows are
    written as `dtype`, "float32" (which holds bfloat16 without loss) or "float16"; ids of experts as they are.
    """
    rows_of.choice("dtype", dtype, arrow.FLOATS)
    places = _places(source)
    features = {"sample": arrow.value("int64"), "completion": arrow.value("int64"), "prompt_len": arrow.value("int64")}
    features |= {name: arrow.value("string") for name in TEXTS}
    features |= {name: arrow.numbers("int32") for name in ("positions", "token_ids")}
    for name, place in places.items():
        features[name] = arrow.matrix(_dtype(source, place, dtype), None, rows_of.width_of(source, *place))
    number = 0
    with arrow.ArrowFolder(folder, features) as table:
        for sample in rows_of.sequences(source):
            columns = {name: [found] for name, found in _labels(sample).items()}
            for name, place in places.items():
                rows = _rows(sample, *place).astype(features[name].description["dtype"], copy=False)
                columns[name] = arrow.matrices(rows, [len(rows)])
            table.write(columns)
            number += 1
    return {"columns": list(places), "dtype": dtype, "samples": number}


def write_npz(source: Any, folder: Path) -> dict[str, Any]:
    """Write a file for each sequence: `positions`, `token_ids`, `prompt_len`, and each stream [L, R, D].

    `hidden_states_layers` says which layers these are. bfloat16 comes as float32, without loss.
    """
    number = 0
    for sample in rows_of.sequences(source):
        labels = _labels(sample)
        arrays: dict[str, Any] = {name: np.asarray(labels[name]) for name in ("positions", "token_ids", "prompt_len")}
        for stream, layers in source.layers.items():
            if layers:
                arrays[stream] = np.stack([_rows(sample, stream, layer) for layer in layers])
                arrays[f"{stream}_layers"] = np.asarray(layers)
        with (folder / f"{rows_of.name_of(sample)}.npz").open("wb") as file:
            np.savez(file, **arrays)
        number += 1
    return {"streams": list(source.layers), "samples": number}


def _places(source: Any) -> dict[str, tuple[str, int]]:
    """Return {column: (stream, layer)}."""
    found = {}
    for stream, layers in source.layers.items():
        for layer in layers:
            found[stream if stream in SINGLE_STREAMS else f"{stream}.{layer}"] = (stream, layer)
    return found


def _dtype(source: Any, place: tuple[str, int], dtype: str) -> str:
    rows = source.rows(*place)[0:0]
    return dtype if rows.dtype.is_floating_point else str(rows.dtype).removeprefix("torch.")


def _rows(sample: Any, stream: str, layer: int) -> Any:
    found = getattr(sample, stream)
    return rows_of.to_numpy(found if stream in SINGLE_STREAMS else found[layer])


def _labels(sample: Any) -> dict[str, Any]:
    output = sample.output
    completions = getattr(output, "outputs", None)
    done = next((one for one in completions if one.index == sample.completion), None) if completions else None
    return {
        "sample": sample.index,
        "completion": sample.completion,
        "prompt_len": len(output.prompt_token_ids or ()),
        "prompt": getattr(output, "prompt", None),
        "text": getattr(done, "text", None),
        "finish_reason": getattr(done, "finish_reason", None),
        "positions": sample.positions.numpy(),
        "token_ids": sample.token_ids.numpy(),
    }

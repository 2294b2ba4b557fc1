"""SAELens: cached activations of fixed context length, as `ActivationsStore` reads them. In any process."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
import numpy.typing as npt

from vllm_tap.errors import RowsMissingError, SpecError
from vllm_tap.interchange import arrow
from vllm_tap.interchange import source as rows_of

Packing = Literal["within", "across"]
PACKINGS: Final = ("within", "across")
BATCH_ELEMENTS: Final = 1 << 22


def write(
    source: Any,
    folder: Path,
    *,
    context_size: int,
    packing: Packing,
    layers: Sequence[int] | str | None = None,
    dtype: str = "float32",
    seed: int = 0,
) -> dict[str, Any]:
    """Write contexts of rows, shuffled, with a column `blocks.{k}.hook_resid_post` for each layer k.

    Args:
        source: A `Capture` or a `Dataset`.
        folder: Where to.
        context_size: Rows of a context, the trainer's `context_size`.
        packing: "within" cuts each sequence into contexts and leaves out what is left at its end; "across" runs on
            from one sequence into the next, and leaves out the end of the last one alone.
        layers: Layers; all that were captured unless some are named.
        dtype: "float32", which holds bfloat16 without loss, or "float16".
        seed: Seed of the order of contexts.

    Raises:
        RowsMissingError: Not one context is full.
    """
    rows_of.choice("packing", packing, PACKINGS)
    rows_of.choice("dtype", dtype, arrow.FLOATS)
    if context_size < 1:
        raise SpecError(f"context_size is a whole number from 1 on, got {context_size}.")
    chosen = _layers(source, layers)
    starts = _starts(source, context_size, packing)
    if not len(starts):
        raise RowsMissingError(f'no sequence has {context_size} rows: lower context_size, or pass packing="across".')
    starts = starts[np.random.default_rng(seed).permutation(len(starts))]
    _write(source, folder, chosen, starts, context_size, dtype)
    return {
        "layers": chosen,
        "hooks": [_hook(layer) for layer in chosen],
        "context_size": context_size,
        "packing": packing,
        "dtype": dtype,
        "seed": seed,
        "contexts": len(starts),
        "rows_left_out": source.num_rows - len(starts) * context_size,
    }


def _hook(layer: int) -> str:
    return f"blocks.{layer}.hook_resid_post"


def _layers(source: Any, given: Sequence[int] | str | None) -> list[int]:
    if given is None:
        given = source.layers.get("hidden_states", [])
    if given == "all" or not given:
        given = range(source.num_layers)
    chosen = rows_of.absolute(source, map(int, given))
    rows_of.require(source, "hidden_states", chosen, "saelens")
    return sorted(set(chosen))


def _starts(source: Any, size: int, packing: Packing) -> npt.NDArray[np.int64]:
    """Return where each context begins."""
    if packing == "across":
        return np.arange(source.num_rows // size) * size
    starts: list[int] = []
    first = 0
    for sample in rows_of.sequences(source):
        starts += range(first, first + len(sample) - size + 1, size)
        first += len(sample)
    return np.array(starts, np.int64)


def _write(source: Any, folder: Path, layers: list[int], starts: npt.NDArray[np.int64], size: int, dtype: str) -> None:
    width = rows_of.width_of(source, "hidden_states", layers[0])
    features = {_hook(layer): arrow.matrix(dtype, size, width) for layer in layers}
    features["token_ids"] = arrow.numbers("int32", size)
    step = max(1, BATCH_ELEMENTS // (size * width))
    with arrow.ArrowFolder(folder, features) as table:
        for first in range(0, len(starts), step):
            spans = [(int(start), int(start) + size) for start in starts[first : first + step]]
            columns: dict[str, Any] = {}
            for layer in layers:
                rows = [rows_of.numpy_rows(source, "hidden_states", layer, *span) for span in spans]
                columns[_hook(layer)] = arrow.matrices(
                    np.concatenate(rows).astype(dtype, copy=False), [size] * len(spans)
                )
            columns["token_ids"] = [rows_of.label(source, "token_ids", *span) for span in spans]
            table.write(columns)

"""Numbers behind the pictures: reductions of a dataset's rows, layer by layer. In the user's process."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from vllm_tap.errors import SpecError
from vllm_tap.store.accumulators import Covariance

Floats = npt.NDArray[np.float64]

MOST_ROWS = 50_000
"""Rows of a dataset that a picture is made of: its first ones."""


def _blocks(dataset: Any, stream: str, layer: int) -> Iterator[Floats]:
    rows, stop = dataset.rows(stream, layer), min(dataset.num_rows, MOST_ROWS)
    for start in range(0, stop, 4096):
        yield rows.numpy(start, min(start + 4096, stop)).astype(np.float64)


def norms(dataset: Any, most_positions: int = 64) -> tuple[list[int], Floats]:
    """Return the layers, and the mean norm of hidden states by layer and position: float64 [L, P], NaN without rows."""
    dataset.require("hidden_states")
    positions = dataset.label("positions", 0, MOST_ROWS)
    chosen = positions < most_positions
    counts = np.bincount(positions[chosen], minlength=1)
    layers = dataset.layers["hidden_states"]
    sums = np.zeros((len(layers), len(counts)))
    for at, layer in enumerate(layers):
        lengths = np.concatenate([np.linalg.norm(block, axis=1) for block in _blocks(dataset, "hidden_states", layer)])
        sums[at] = np.bincount(positions[chosen], lengths[chosen], minlength=len(counts))
    with np.errstate(invalid="ignore"):
        return layers, sums / counts


def cosines(dataset: Any) -> tuple[list[int], Floats]:
    """Return the layers, and the mean cosine between hidden states of each two: float64 [L, L]."""
    dataset.require("hidden_states")
    layers = dataset.layers["hidden_states"]
    total, count = np.zeros((len(layers), len(layers))), 0
    for blocks in zip(*(_blocks(dataset, "hidden_states", layer) for layer in layers), strict=True):
        unit = np.stack([block / np.maximum(np.linalg.norm(block, axis=1, keepdims=True), 1e-30) for block in blocks])
        total += np.einsum("ard,brd->ab", unit, unit, optimize=True)
        count += unit.shape[1]
    return layers, total / max(count, 1)


def expert_use(dataset: Any) -> tuple[list[int], Floats]:
    """Return the layers, and the share of rows in which each expert was chosen: float64 [L, E].

    Of `expert_ids`; without them, the `num_chosen` largest router logits, where the routing is that simple.
    """
    if "expert_ids" in dataset.layers:
        layers = dataset.layers["expert_ids"]
        chosen = {layer: _blocks(dataset, "expert_ids", layer) for layer in layers}
        largest = max(int(block.max(initial=0)) for layer in layers for block in _blocks(dataset, "expert_ids", layer))
        num_experts = max([largest + 1, *(one.width for one in dataset.facts.streams if one.name == "router_logits")])
    else:
        dataset.require("router_logits")
        layers = dataset.layers["router_logits"]
        num_experts = dataset.facts.stream("router_logits").width
        chosen = {layer: _largest(dataset, layer) for layer in layers}
    shares = np.zeros((len(layers), num_experts))
    for at, layer in enumerate(layers):
        count = 0
        for block in chosen[layer]:
            shares[at] += np.bincount(block.astype(np.int64).ravel(), minlength=num_experts)
            count += len(block)
        shares[at] /= max(count, 1)
    return layers, shares


def _largest(dataset: Any, layer: int) -> Iterator[Floats]:
    routing = dataset.routing.get(layer)
    if routing is None or not routing.num_chosen or routing.bias or routing.num_groups > 1:
        raise SpecError(
            f"experts of layer {layer} do not follow from its logits alone: record them, Spec(routed_experts='all')."
        )
    for block in _blocks(dataset, "router_logits", layer):
        yield np.argsort(-block, axis=1, kind="stable")[:, : routing.num_chosen].astype(np.float64)


class Entropy(NamedTuple):
    """Entropy of a router over rows, in bits: median and the middle half."""

    low: float
    median: float
    high: float


def entropies(dataset: Any) -> tuple[dict[int, Entropy], float]:
    """Return the entropy of the softmax of router logits by layer, and the largest that can be, in bits."""
    dataset.require("router_logits")
    found = {}
    for layer in dataset.layers["router_logits"]:
        values = []
        for block in _blocks(dataset, "router_logits", layer):
            shifted = np.exp(block - block.max(1, keepdims=True))
            share = shifted / shifted.sum(1, keepdims=True)
            values.append(-(share * np.log2(np.maximum(share, 1e-300))).sum(1))
        found[layer] = Entropy(*np.percentile(np.concatenate(values), [25, 50, 75]).tolist())
    return found, float(np.log2(dataset.facts.stream("router_logits").width))


def projections(dataset: Any, layer: int) -> tuple[Floats, Floats]:
    """Return the rows of a layer along its two principal components, float64 [R, 2], and these ones' share of variance.

    Raises:
        LayerError: The layer was not recorded.
    """
    covariance = Covariance()
    for block in _blocks(dataset, "hidden_states", layer):
        covariance.update(block)
    components, variances = covariance.pca(2)
    whole = float(np.trace(covariance.covariance))
    points = [(block - covariance.mean) @ components.T for block in _blocks(dataset, "hidden_states", layer)]
    return np.concatenate(points), variances / max(whole, 1e-300)


def row_labels(dataset: Any, key: str | None) -> tuple[str, list[str]]:
    """Return what rows are coloured by, and the label of each: metadata by a key, else the position."""
    if key is None:
        return "position", [str(position) for position in dataset.label("positions", 0, MOST_ROWS)]
    labels: list[str] = []
    for sample in dataset.sequences():
        labels += [str(sample.metadata.get(key, "none"))] * len(sample)
        if len(labels) >= MOST_ROWS:
            break
    return key, labels[:MOST_ROWS]

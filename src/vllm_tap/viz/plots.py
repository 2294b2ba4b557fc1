"""Pictures of a dataset, each a figure of matplotlib in one look. In the user's process."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import numpy as np

from vllm_tap.errors import SpecError
from vllm_tap.viz import data

SIZE: Final = (7.0, 4.2)
SEQUENTIAL: Final = "viridis"
LINE: Final = "#2a6f97"
GRID: Final = {"color": "#dddddd", "linewidth": 0.6}
MOST_LABELS: Final = 10
"""Labels that have a colour of their own."""


def _figure(title: str) -> tuple[Any, Any]:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise SpecError("pictures need matplotlib: pip install 'vllm-tap[viz]'.") from error
    figure = Figure(figsize=SIZE, dpi=150, layout="constrained")
    axes = figure.add_subplot()
    axes.set_title(title, loc="left", fontsize=11)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    return figure, axes


def _layer_ticks(axis: Any, layers: list[int]) -> None:
    """Name rows of a picture by their layers, as many as can be read."""
    step = -(-len(layers) // 16)
    axis.set_ticks(range(0, len(layers), step), [str(layer) for layer in layers[::step]])


def norms(dataset: Any, **_: Any) -> Any:
    """Draw the mean norm of hidden states by layer and position; the scale is logarithmic."""
    layers, values = data.norms(dataset)
    figure, axes = _figure("Mean norm of hidden states")
    shown = axes.imshow(values, aspect="auto", origin="lower", cmap=SEQUENTIAL, norm="log", interpolation="nearest")
    _layer_ticks(axes.yaxis, layers)
    axes.set(xlabel="position", ylabel="layer")
    from matplotlib.ticker import LogLocator

    bar = figure.colorbar(shown, ax=axes, label="norm", format="{x:g}", ticks=LogLocator(subs=(1, 2, 5)))
    bar.minorticks_off()  # their numbers would lie upon one another
    return figure


def cosine(dataset: Any, **_: Any) -> Any:
    """Draw the mean cosine between the hidden states of each two layers."""
    layers, values = data.cosines(dataset)
    figure, axes = _figure("Mean cosine between layers")
    low = min(0.0, float(values.min()))
    shown = axes.imshow(values, origin="lower", cmap=SEQUENTIAL, vmin=low, vmax=1, interpolation="nearest")
    _layer_ticks(axes.yaxis, layers)
    _layer_ticks(axes.xaxis, layers)
    axes.set(xlabel="layer", ylabel="layer")
    figure.colorbar(shown, ax=axes, label="cosine")
    return figure


def experts(dataset: Any, **_: Any) -> Any:
    """Draw how often each expert was chosen, by layer, against an even share."""
    layers, shares = data.expert_use(dataset)
    even = shares.sum(1, keepdims=True) / shares.shape[1]
    ratio = shares / np.maximum(even, 1e-12)
    figure, axes = _figure("Use of experts, 1 = even share")
    most = max(2.0, float(ratio.max()))
    shown = axes.imshow(
        ratio, aspect="auto", origin="lower", cmap=SEQUENTIAL, vmin=0, vmax=most, interpolation="nearest"
    )
    _layer_ticks(axes.yaxis, layers)
    axes.set(xlabel="expert", ylabel="layer")
    axes.xaxis.get_major_locator().set_params(integer=True)
    figure.colorbar(shown, ax=axes, label="times the even share")
    return figure


def entropy(dataset: Any, **_: Any) -> Any:
    """Draw the entropy of router logits' softmax by layer: median and middle half."""
    found, most = data.entropies(dataset)
    layers = list(found)
    figure, axes = _figure("Entropy of the router")
    axes.fill_between(
        layers, [one.low for one in found.values()], [one.high for one in found.values()], color=LINE, alpha=0.25, lw=0,
        label="middle half of the rows",
    )  # fmt: skip
    axes.plot(layers, [one.median for one in found.values()], color=LINE, marker="o", markersize=3, label="median")
    axes.axhline(most, color="#888888", linestyle="--", linewidth=1, label="even over all experts")
    axes.set(xlabel="layer", ylabel="bits", ylim=(0, most * 1.1))
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(axis="y", **GRID)
    axes.legend(frameon=False, loc="lower right", fontsize=9)
    return figure


def pca(dataset: Any, layer: int = -1, label: str | None = None, **_: Any) -> Any:
    """Draw the rows of a layer along its two principal components, coloured by metadata or by position."""
    points, shares = data.projections(dataset, layer)
    name, labels = data.row_labels(dataset, label)
    number = layer + dataset.num_layers if layer < 0 else layer
    figure, axes = _figure(f"Principal components of layer {number}")
    if label is None:
        colours = np.array(labels, np.int64)
        shown = axes.scatter(*points.T, c=colours, s=8, cmap=SEQUENTIAL, alpha=0.8, linewidths=0)
        figure.colorbar(shown, ax=axes, label=name)
    else:
        _by_label(axes, points, name, np.array(labels))
    axes.set(xlabel=f"component 1, {shares[0]:.0%} of variance", ylabel=f"component 2, {shares[1]:.0%} of variance")
    axes.grid(**GRID)
    axes.set_axisbelow(True)
    return figure


def _by_label(axes: Any, points: Any, name: str, labels: Any) -> None:
    known, counts = np.unique(labels, return_counts=True)
    named = known[np.argsort(-counts, kind="stable")][:MOST_LABELS]
    rest = ~np.isin(labels, named)
    if rest.any():
        axes.scatter(*points[rest].T, s=8, color="#bbbbbb", linewidths=0, label="others")
    for label in sorted(named):
        axes.scatter(*points[labels == label].T, s=8, alpha=0.8, linewidths=0, label=label)
    axes.legend(title=name, frameon=False, fontsize=9, markerscale=2, loc="upper left", bbox_to_anchor=(1, 1))


PLOTS: Final[dict[str, Callable[..., Any]]] = {
    "norms": norms,
    "cosine": cosine,
    "experts": experts,
    "entropy": entropy,
    "pca": pca,
}
NEEDS: Final = {
    "norms": ("hidden_states",),
    "cosine": ("hidden_states",),
    "experts": ("expert_ids", "router_logits"),
    "entropy": ("router_logits",),
    "pca": ("hidden_states",),
}
"""Streams of which one is needed."""


def available(dataset: Any) -> list[str]:
    """Return the pictures that can be made of a dataset."""
    return [name for name, streams in NEEDS.items() if any(dataset.layers.get(stream) for stream in streams)]


def save(figure: Any, path: str | Path) -> None:
    """Write a figure as the kind of file that its name ends with: .png or .svg."""
    if Path(path).suffix not in (".png", ".svg"):
        raise SpecError(f"{path}: pictures are written as .png or .svg.")
    try:
        figure.savefig(path)
    except OSError as error:
        raise SpecError(f"{path} cannot be written: {error.strerror}.", path=str(path)) from error

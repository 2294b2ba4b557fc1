"""Pictures of a dataset: the numbers behind them against numpy over all rows, and files that can be opened."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from vllm_tap.cli import main
from vllm_tap.client.sequences import Sequences
from vllm_tap.errors import SpecError
from vllm_tap.frame.routing import Routing
from vllm_tap.spec import Spec
from vllm_tap.store.dataset import Dataset, open_dataset
from vllm_tap.store.save import save
from vllm_tap.viz import data, plots

NUM_LAYERS, WIDTH, NUM_EXPERTS, CHOSEN = 6, 32, 8, 2
LENGTHS = (5, 9, 14, 3, 12, 12)


class Model:
    """Rows that grow with the layer, of two kinds of samples that lie apart, and a router that likes one expert."""

    shard_writer = None

    def __init__(self) -> None:
        self.spec = Spec(hidden_states="all", router_logits="all")
        every = list(range(NUM_LAYERS))
        self.layers, self.num_layers, self.has_final_norm = {"hidden_states": every, "router_logits": every}, 6, True
        self.conventions: dict[str, str] = {}
        self.routing = {layer: Routing(scoring="softmax", num_chosen=CHOSEN) for layer in every}
        self.outputs = [
            SimpleNamespace(request_id=str(n), prompt=None, prompt_token_ids=[1] * length, outputs=None)
            for n, length in enumerate(LENGTHS)
        ]
        self.sequences = Sequences(self.outputs, "all")
        rng = np.random.default_rng(0)
        kinds = np.repeat(np.arange(len(LENGTHS)) % 2, LENGTHS)
        base = rng.normal(size=(sum(LENGTHS), WIDTH)) + 3 * kinds[:, None] * rng.normal(size=WIDTH)
        steps = rng.normal(size=(NUM_LAYERS, sum(LENGTHS), WIDTH))
        self.hidden = [base * 1.3**layer + steps[: layer + 1].sum(0) for layer in every]
        self.router = [rng.normal(size=(sum(LENGTHS), NUM_EXPERTS)) for _ in every]
        for logits in self.router:
            logits[:, 2] += 1

    def rows(self, stream: str, layer: int, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """Return rows."""
        held = self.hidden if stream == "hidden_states" else self.router
        return torch.from_numpy(held[layer][start:stop]).float()


@pytest.fixture(scope="module")
def model() -> Model:
    """The rows as they were made."""
    return Model()


@pytest.fixture(scope="module")
def dataset(model: Model, tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """The rows as a dataset."""
    folder = tmp_path_factory.mktemp("plots") / "run"
    labels = [{"kind": "odd" if n % 2 else "even"} for n in range(len(LENGTHS))]
    save(model, folder, model={"name": "m"}, versions={}, metadata=labels)
    return open_dataset(folder)


def stacked(rows: Any) -> np.ndarray:
    """Return rows of all layers [L, R, D] as they were kept, in float32."""
    return np.stack([layer.astype(np.float32).astype(np.float64) for layer in rows])


def test_norms(model: Model, dataset: Dataset) -> None:
    """Mean norm of each layer and position."""
    layers, found = data.norms(dataset)
    lengths = np.linalg.norm(stacked(model.hidden), axis=2)
    positions = dataset.label("positions")
    assert layers == list(range(NUM_LAYERS))
    for position in range(max(LENGTHS)):
        np.testing.assert_allclose(found[:, position], lengths[:, positions == position].mean(1))


def test_cosines(model: Model, dataset: Dataset) -> None:
    """Mean cosine of the same row in two layers."""
    rows = stacked(model.hidden)
    unit = rows / np.linalg.norm(rows, axis=2, keepdims=True)
    np.testing.assert_allclose(data.cosines(dataset)[1], np.einsum("ard,brd->ab", unit, unit) / rows.shape[1])


def test_expert_use_and_entropy(model: Model, dataset: Dataset) -> None:
    """Experts of the largest logits, and entropies as scipy's definition has them."""
    logits = stacked(model.router)
    chosen = np.argsort(-logits, axis=2)[:, :, :CHOSEN]
    _, shares = data.expert_use(dataset)
    for layer in range(NUM_LAYERS):
        np.testing.assert_allclose(shares[layer], [(chosen[layer] == e).any(1).mean() for e in range(NUM_EXPERTS)])
    found, most = data.entropies(dataset)
    probabilities = torch.from_numpy(logits).softmax(2)
    expected = torch.distributions.Categorical(probabilities).entropy().numpy() / np.log(2)
    np.testing.assert_allclose([one.median for one in found.values()], np.median(expected, 1), rtol=1e-6)
    assert most == 3


def test_projections(model: Model, dataset: Dataset) -> None:
    """The same points as those of a singular value decomposition, up to a sign."""
    points, shares = data.projections(dataset, -1)
    rows = stacked(model.hidden)[-1]
    left, values, _ = np.linalg.svd(rows - rows.mean(0), full_matrices=False)
    np.testing.assert_allclose(np.abs(points), np.abs(left[:, :2] * values[:2]), rtol=1e-6)
    np.testing.assert_allclose(shares, values[:2] ** 2 / (values**2).sum())
    assert data.row_labels(dataset, "kind")[1] == list(np.repeat(["even", "odd"] * 3, LENGTHS))


@pytest.mark.parametrize("svg", [False, True])
def test_all_pictures_are_drawn(dataset: Dataset, tmp_path: Path, capsys: Any, svg: bool) -> None:
    """As files of their kind, by the command."""
    argv = ["plot", dataset.path, "--to", str(tmp_path), "--label", "kind", "--json"]
    assert main([*argv, "--svg"] if svg else argv) == 0
    files = json.loads(capsys.readouterr().out)["files"]
    assert list(files) == list(plots.PLOTS)
    for path in files.values():
        head = Path(path).read_bytes()[:300]
        assert b"<svg" in head or b"DOCTYPE svg" in head if svg else head.startswith(b"\x89PNG")


def test_what_cannot_be_drawn_is_refused(dataset: Dataset, tmp_path: Path, capsys: Any) -> None:
    """A picture that there is not, a folder that there is not, and another kind of file."""
    assert main(["plot", dataset.path, "normss"]) == 1
    assert "Did you mean 'norms'" in capsys.readouterr().err
    assert main(["plot", dataset.path, "--to", str(tmp_path / "no")]) == 1
    assert "is not a folder" in capsys.readouterr().err
    with pytest.raises(SpecError, match=r"\.png or \.svg"):
        plots.save(None, tmp_path / "a.pdf")

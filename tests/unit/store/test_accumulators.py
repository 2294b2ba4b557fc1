"""Accumulators against numpy over all rows at once, whole and as a merge of two halves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
import torch

from vllm_tap.errors import DatasetDamagedError, SpecError
from vllm_tap.store.accumulators import Accumulator, Covariance, ExpertCounts, LabelMeans, Moments

NUM_ROWS, WIDTH, BLOCK = 10_000, 48, 333

# Both sides add up 10,000 numbers in float64, in another order: 1e-12 of their scale was the most seen.
CLOSE = {"rtol": 1e-9, "atol": 1e-9}


@pytest.fixture(scope="module")
def rows() -> np.ndarray:
    """Rows far from zero in some directions, as hidden states are."""
    rng = np.random.default_rng(0)
    scales = np.geomspace(1, 1e-2, WIDTH)
    return (rng.normal(size=(NUM_ROWS, WIDTH)) * scales) @ rng.normal(size=(WIDTH, WIDTH)) + 50


def fed(make: Any, *arrays: Any) -> Any:
    """Return an accumulator that took all blocks, and one that is a merge of two, saved and loaded on the way."""
    whole, halves = make(), [make(), make()]
    for start in range(0, len(arrays[0]), BLOCK):
        block = [array[start : start + BLOCK] for array in arrays]
        whole.update(*block)
        halves[start // BLOCK % 2].update(*block)
    halves[0].merge(halves[1])
    empty = make()
    empty.merge(halves[0])
    return whole, empty


def reloaded(one: Accumulator, path: Path) -> Any:
    """Return an accumulator that was saved and loaded."""
    one.save(path / "state.safetensors")
    return type(one).load(path / "state.safetensors")


def test_moments(rows: np.ndarray, tmp_path: Path) -> None:
    """Count, mean, variance, largest magnitude and mean norm."""
    for one in fed(Moments, rows):
        for state in (one, reloaded(one, tmp_path)):
            assert state.count == NUM_ROWS
            np.testing.assert_allclose(state.mean, rows.mean(0), **CLOSE)
            np.testing.assert_allclose(state.variance, rows.var(0), **CLOSE)
            np.testing.assert_allclose(state.mean_norm, np.linalg.norm(rows, axis=1).mean(), **CLOSE)
            assert np.array_equal(state.max_abs, np.abs(rows).max(0))


def test_covariance_and_principal_components(rows: np.ndarray, tmp_path: Path) -> None:
    """The same covariance as numpy's, and the same subspace as that of a singular value decomposition."""
    _, values, vectors = np.linalg.svd(rows - rows.mean(0), full_matrices=False)
    for one in fed(Covariance, rows):
        state = reloaded(one, tmp_path)
        np.testing.assert_allclose(state.covariance, np.cov(rows.T, bias=True), **CLOSE)
        components, variances = state.pca(5)
        np.testing.assert_allclose(np.abs(components @ vectors[:5].T), np.eye(5), atol=1e-6)
        np.testing.assert_allclose(variances, values[:5] ** 2 / NUM_ROWS, rtol=1e-6)


def test_differences_of_labels(rows: np.ndarray, tmp_path: Path) -> None:
    """The mean of one label's rows minus that of another's."""
    labels = np.random.default_rng(1).integers(0, 3, NUM_ROWS)
    for one in fed(LabelMeans, rows, labels):
        found = reloaded(one, tmp_path).difference("2", minus="0")
        np.testing.assert_allclose(found, rows[labels == 2].mean(0) - rows[labels == 0].mean(0), **CLOSE)
        with pytest.raises(SpecError, match="no row has the label '7'"):
            one.difference("7", minus="0")


def test_expert_counts(tmp_path: Path) -> None:
    """How often each expert was chosen, and with which."""
    rng = np.random.default_rng(2)
    ids = np.stack([rng.permutation(16)[:4] for _ in range(NUM_ROWS)]).astype(np.uint8)
    together = np.zeros((16, 16))
    for chosen in ids:
        together[np.ix_(chosen, chosen)] += 1
    for one in fed(lambda: ExpertCounts(16), ids):
        state = reloaded(one, tmp_path)
        assert np.array_equal(state.together, together)
        assert np.array_equal(state.counts, np.bincount(ids.ravel(), minlength=16))
        assert state.num_rows == NUM_ROWS
    with pytest.raises(SpecError, match="16 experts"):
        one.update([[16]])


def test_tensors_are_blocks_too(rows: np.ndarray) -> None:
    """Of bfloat16, taken as they are: in float64."""
    tensor = torch.from_numpy(rows).to(torch.bfloat16)
    moments = Moments()
    moments.update(tensor)
    np.testing.assert_allclose(moments.mean, tensor.double().mean(0).numpy(), **CLOSE)
    with pytest.raises(SpecError, match=r"\[R, D\]"):
        moments.update(tensor[0])


def test_saved_files_are_safetensors(rows: np.ndarray, tmp_path: Path) -> None:
    """The library reads them; a file of another kind is refused."""
    moments = Moments()
    moments.update(rows)
    moments.save(tmp_path / "a")
    assert np.array_equal(safetensors.numpy.load_file(tmp_path / "a")["mean"], moments.mean)
    with pytest.raises(DatasetDamagedError, match="holds 'moments', not 'covariance'"):
        Covariance.load(tmp_path / "a")
    (tmp_path / "b").write_bytes(b"nonsense")
    with pytest.raises(DatasetDamagedError, match="no saved accumulator"):
        Moments.load(tmp_path / "b")

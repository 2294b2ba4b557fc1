"""Loaders of SpecForge, Model-Optimizer, datasets and pandas over our rows. Skips where they are not installed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from made_rows import NUM_LAYERS, made
from readers import reader
from vllm_tap.interchange import export
from vllm_tap.interchange.arrays import frame

LAYERS = [1, NUM_LAYERS // 2 - 1, NUM_LAYERS - 4]


@pytest.mark.parametrize("algorithm", ["eagle3", "dflash", "dspark"])
def test_specforge_reads_every_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, algorithm: str) -> None:
    """Its manifest reader validates each file; its normaliser returns our states."""
    reader("specforge")
    from specforge.algorithms.common import dflash_family_data
    from specforge.algorithms.eagle3 import data as eagle3
    from specforge.runtime.data_plane.offline_reader import OfflineManifestReader, list_feature_files

    capture = made()
    # The DFlash family refuses a sample without two neighbouring tokens that count.
    export(capture, "specforge", tmp_path / "out", algorithm=algorithm, loss="all")
    paths = list_feature_files(str(tmp_path / "out"))
    assert len(paths) == len(capture)
    normalize = {
        "eagle3": eagle3.normalize_offline_sample,
        "dflash": dflash_family_data.normalize_offline_sample,
        "dspark": dflash_family_data.normalize_dspark_offline_sample,
    }[algorithm]
    for path, sample in zip(paths, capture, strict=True):
        raw = torch.load(path, weights_only=True)
        read = normalize(raw, 2048)
        aux = torch.cat([sample.hidden_states[layer] for layer in LAYERS], 1)
        assert torch.equal(read["hidden_state" if algorithm == "eagle3" else "hidden_states"], aux[None])
        last = {"eagle3": "target", "dspark": "target_last_hidden_states"}.get(algorithm)
        assert last is None or torch.equal(read[last], sample.final_hidden_states[None])
        assert read["input_ids"][0].tolist() == sample.token_ids.tolist()
    keys = tuple(raw)
    manifest = OfflineManifestReader(str(tmp_path / "out"), feature_keys=keys, strategy=algorithm, validate_files=True)
    refs = [manifest._ref_for(number, path) for number, path in enumerate(paths)]
    assert [ref.num_tokens for ref in refs] == [len(sample) for sample in capture]


@pytest.mark.parametrize("last", ["pre-norm", "post-norm"])
def test_modelopt_reads_every_file(tmp_path: Path, last: str) -> None:
    """`OfflineSupervisedDataset` with our loss mask, its collator behind it; it knows on which side of the norm."""
    reader("modelopt")
    from modelopt.torch.speculative.eagle.utils import EagleOfflineDataCollator, OfflineSupervisedDataset

    capture = made()
    export(capture, "modelopt", tmp_path / "out", last=last)
    paths = sorted(map(str, (tmp_path / "out").glob("*.pt")))
    dataset = OfflineSupervisedDataset(paths, answer_only_loss=True)
    assert len(dataset) == len(capture)
    for item, sample in zip((dataset[number] for number in range(len(dataset))), capture, strict=True):
        final = sample.hidden_states[-1] if last == "pre-norm" else sample.final_hidden_states
        assert torch.equal(item["base_model_hidden_states"], final)
        assert torch.equal(item["aux_hidden_states"], torch.cat([sample.hidden_states[at] for at in LAYERS], 1))
        assert item["base_hidden_prenorm"] is (last == "pre-norm")
        generated = sample.positions >= len(sample.output.prompt_token_ids)
        assert torch.equal(item["loss_mask"].bool(), generated)
    batch = EagleOfflineDataCollator(32)([dataset[0], dataset[1]])
    assert batch["input_ids"].shape == (2, 32)


def test_datasets_reads_the_folder(tmp_path: Path) -> None:
    """`load_from_disk` of the plain form: ragged columns, in numpy's types."""
    datasets = reader("datasets")
    capture = made(experts=True)
    export(capture, "hf", tmp_path / "out")
    read = datasets.load_from_disk(str(tmp_path / "out"))
    assert len(read) == len(capture)
    assert read.features["hidden_states.3"].dtype == "float32"
    for row, sample in zip(read.with_format("numpy"), capture, strict=True):
        assert np.array_equal(row["hidden_states.3"], sample.hidden_states[3].float().numpy())
        assert np.array_equal(row["expert_ids.1"], sample.expert_ids[1].numpy())
        assert row["token_ids"].tolist() == sample.token_ids.tolist()
    assert read[0]["text"] == "text 0"


def test_pandas_finds_rows_by_their_labels() -> None:
    """A row of a frame is found by sample, completion and position."""
    reader("pandas")
    capture = made(num_completions=2)
    found = frame(capture, "hidden_states", 3)
    assert found.index.names == ["sample", "completion", "position", "token_id"]
    sample = capture.sample(4, 1)
    assert np.array_equal(found.loc[(4, 1)].to_numpy(), sample.hidden_states[3].float().numpy())
    assert found.loc[(4, 1)].index.get_level_values("token_id").tolist() == sample.token_ids.tolist()

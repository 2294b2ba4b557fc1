"""Datasets of synthetic captures: what is read back is what was written, row for row. Without an engine."""

from __future__ import annotations

import pickle
import resource
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch

from made_rows import EXPERT_LAYERS, made
from synthetic_rows import LAYERS, MODEL, SyntheticCapture, bits, check_dataset, prompts_of
from vllm_tap.errors import DatasetError, LayerError, RowsMissingError, SpecError
from vllm_tap.store.dataset import Dataset, open_dataset
from vllm_tap.store.recording import Run, record_with
from vllm_tap.store.save import save

VERSIONS = {"vllm_tap": "0"}


def saved(path: Any, prompts: list[str], **options: Any) -> Dataset:
    """Save a synthetic capture and open it."""
    metadata = [{"label": number % 3, "text": "ä"} for number in range(len(prompts))]
    save(SyntheticCapture(prompts, **options), path, model=MODEL, versions=VERSIONS, metadata=metadata)
    return open_dataset(path)


def recorded(path: Any, prompts: list[str], batch: int, **options: Any) -> Dataset:
    """Record synthetic captures of `batch` prompts each."""
    run = Run(SyntheticCapture([]).spec, MODEL, "max_tokens=4", VERSIONS)
    return record_with(SyntheticCapture, prompts, path, run, batch=batch, **options)


@pytest.mark.parametrize("num_completions", [1, 3])
def test_a_saved_capture_is_read_back(tmp_path: Path, num_completions: int) -> None:
    """Every row, label and text, and the user's metadata."""
    prompts = prompts_of(17)
    dataset = saved(tmp_path / "run", prompts, num_completions=num_completions)
    check_dataset(dataset, prompts, num_completions)
    assert dataset[4].metadata == {"label": 1, "text": "ä"}
    output = SyntheticCapture(prompts, num_completions).outputs[4]
    kept = dataset.sample(4, num_completions - 1).output
    assert (kept.request_id, kept.prompt_token_ids) == (output.request_id, output.prompt_token_ids)
    assert [one.token_ids for one in kept.outputs] == [one.token_ids for one in output.outputs]
    assert dataset.facts.model == MODEL


def test_a_dataset_may_have_more_files_than_a_process(tmp_path: Path) -> None:
    """All of them may be read at a time, in a process of few descriptors."""
    prompts = prompts_of(99)
    recorded(tmp_path, prompts, 1)
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    in_use = [int(fd.name) for fd in Path("/proc/self/fd").iterdir()]
    most = max(in_use) + 16
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, before[1]))
    try:
        dataset = open_dataset(tmp_path)
        check_dataset(dataset, prompts)
        rows = [dataset.rows("hidden_states", layer)[:] for layer in (0, 3)]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    assert len(dataset.parts) * (len(rows) + 2) > most - len(in_use)
    assert rows[0].shape == rows[1].shape


def test_streams_have_second_names(tmp_path: Path) -> None:
    """`routed_experts` has ids and weights by layer, `last_hidden_state` is the final one, also in datasets."""
    capture = made(experts=True)
    capture.save(tmp_path / "run")
    for one in (capture[1], open_dataset(tmp_path / "run")[1]):
        both = one.routed_experts
        assert list(both) == list(one.expert_ids)
        assert (0 in both, -1 in both, len(both)) == (False, True, len(EXPERT_LAYERS))
        for layer, (ids, weights) in both.items():
            assert ids.equal(one.expert_ids[layer])
            assert weights.equal(one.expert_weights[layer])
        assert both[-1].weights.equal(one.expert_weights[7])
        assert one.last_hidden_state.equal(one.final_hidden_states)
        with pytest.raises(LayerError):
            both[0]


@pytest.mark.parametrize("url", ["memory://{name}/run", "file://{path}/run"])
def test_urls_hold_datasets(tmp_path: Path, url: str) -> None:
    """A file system of fsspec holds the same dataset."""
    prompts = prompts_of(9)
    check_dataset(recorded(url.format(name=tmp_path.name, path=tmp_path), prompts, 4), prompts)


@pytest.mark.parametrize("batch", [1, 4, 5, 100])
def test_recorded_pieces_are_one_dataset(tmp_path: Path, batch: int) -> None:
    """Whatever the size of the pieces; nothing but sealed parts and the lock is left in the folder."""
    prompts = prompts_of(13)
    check_dataset(recorded(tmp_path, iter(prompts), batch), prompts)
    assert len(list(tmp_path.glob("part-*"))) == -(-13 // batch)
    assert {path.name for path in tmp_path.iterdir() if not path.name.startswith("part-")} == {".lock"}


def test_shards_are_safetensors_files(tmp_path: Path) -> None:
    """The library reads them: one tensor [N, D] of the stream's dtype; labels too."""
    dataset = saved(tmp_path, prompts_of(5))
    part = tmp_path / "part-000000000000"
    for stream, layers in LAYERS.items():
        for layer in layers:
            (tensor,) = safetensors.torch.load_file(part / f"{stream}.{layer:04d}.safetensors").values()
            assert bits(tensor) == bits(dataset.rows(stream, layer)[:])
            assert tensor.dtype == dataset.rows(stream, layer)[0].dtype
    labels = safetensors.torch.load_file(part / "labels.safetensors")
    assert labels["positions"].equal(torch.cat([sample.positions for sample in dataset]))


def test_rows_of_all_parts_are_one_view(tmp_path: Path) -> None:
    """Rows by number, slice, list and mask, also over the borders of parts, and as numpy."""
    prompts = prompts_of(20)
    one, many = saved(tmp_path / "one", prompts), recorded(tmp_path / "many", prompts, 3)
    expected, rows = one.rows("hidden_states", 3)[:], many.rows("hidden_states", -1)
    assert rows.shape == tuple(expected.shape)
    size = len(rows)
    rng = np.random.default_rng(0)
    for _ in range(50):
        start, stop = sorted(rng.integers(-size, size, 2).tolist())
        assert bits(rows[start:stop]) == bits(expected[start:stop])
        assert rows[start].view(torch.int16).equal(expected[start].view(torch.int16))
        numbers = rng.integers(-size, size, 7)
        assert bits(rows[numbers]) == bits(expected[numbers])
        assert bits(rows[numbers.tolist()]) == bits(expected[numbers])
    assert bits(rows[::3]) == bits(expected[::3])
    mask = rng.random(size) < 0.3
    assert bits(rows[mask]) == bits(expected[torch.from_numpy(mask)])
    assert np.array_equal(rows.numpy(), expected.float().numpy(), equal_nan=True)
    assert np.array_equal(np.concatenate(list(rows.blocks(7))), expected.float().numpy(), equal_nan=True)
    assert np.array_equal(many.label("samples"), one.label("samples"))
    assert np.array_equal(many.label("positions", 3, 50), one.label("positions", 3, 50))
    for wrong in (size, -size - 1, [0, size], np.zeros(3, bool), [0.5]):
        with pytest.raises(IndexError):
            rows[wrong]
    assert rows[[]].shape == (0, 24)
    assert rows[5:5].shape == (0, 24)


def test_writing_into_rows_harms_nobody(tmp_path: Path) -> None:
    """Rows are copy-on-write: the file stays what it is."""
    dataset = saved(tmp_path, prompts_of(3))
    before = bits(dataset[0].router_logits[1])
    dataset[0].router_logits[1].zero_()
    assert bits(open_dataset(tmp_path)[0].router_logits[1]) == before


def test_the_index_answers_queries(tmp_path: Path) -> None:
    """As a table whose row ranges fit the dataset's rows, and sequence by sequence."""
    prompts = prompts_of(12)
    dataset = recorded(tmp_path, prompts, 5, metadata=[{"label": n % 2} for n in range(12)])
    table = dataset.table().to_pydict()
    assert table["prompt"] == prompts
    assert list(zip(table["row_start"], table["row_stop"], strict=True)) == [(s.start, s.stop) for s in dataset]
    assert table["token_ids"] == [sample.token_ids.tolist() for sample in dataset]
    assert dataset[3].weight_versions == [("step 0", 0, len(dataset[3].generated_token_ids))]
    odd = dataset.where(lambda row: row.metadata["label"] == 1)
    assert odd == [dataset[n] for n in range(1, 12, 2)]


def test_what_is_not_there_is_refused(tmp_path: Path) -> None:
    """Samples, completions, layers and streams, each with what there is instead."""
    dataset = saved(tmp_path, prompts_of(3))
    assert dataset[-1] == dataset[2]
    with pytest.raises(IndexError, match="sample 3 of a dataset of 3"):
        dataset[3]
    with pytest.raises(RowsMissingError, match="completion 1"):
        dataset.sample(0, 1)
    with pytest.raises(LayerError, match=r"layer 2 was not recorded.*\[0, 3\]"):
        dataset[0].hidden_states[2]
    with pytest.raises(SpecError, match="embeddings was not recorded"):
        dataset[0].embeddings  # noqa: B018
    with pytest.raises(SpecError, match="expert_ids was not recorded"):
        dataset[0].routed_experts  # noqa: B018
    with pytest.raises(AttributeError, match="hidden_states are of samples"):
        dataset.hidden_states  # type: ignore[attr-defined]  # noqa: B018
    assert 2 not in dataset[0].hidden_states
    assert -1 in dataset[0].hidden_states
    with pytest.raises(DatasetError, match="no sealed part"):
        open_dataset(tmp_path / "nowhere")
    with pytest.raises(DatasetError, match="holds a dataset already"):
        saved(tmp_path, prompts_of(3))


def test_positions_that_were_chosen(tmp_path: Path) -> None:
    """A sequence may have one row, or none."""
    prompts = prompts_of(6)
    dataset = saved(tmp_path, prompts, positions="generated")
    capture = SyntheticCapture(prompts, positions="generated")
    assert dataset.num_rows == len(capture.sequences.wanted)
    assert {len(sample) for sample in dataset} >= {0, 1}
    assert bits(dataset.rows("router_logits", 1)[:]) == bits(capture.rows("router_logits", 1))
    assert (
        np.concatenate([sample.positions.numpy() for sample in dataset]).tolist() == dataset.label("positions").tolist()
    )


def test_a_dataset_can_be_pickled(tmp_path: Path) -> None:
    """For data loaders that start processes: the copy opens the folder again."""
    prompts = prompts_of(4)
    check_dataset(pickle.loads(pickle.dumps(saved(tmp_path, prompts))), prompts)

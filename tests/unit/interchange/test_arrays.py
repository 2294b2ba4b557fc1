"""Rows as arrays, frames and batches. Without an engine."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from made_rows import made
from vllm_tap import open_dataset
from vllm_tap.errors import LayerError, RowsMissingError
from vllm_tap.interchange import activations
from vllm_tap.interchange.arrays import array, labels
from vllm_tap.interchange.proofs import toploc_activations


@pytest.fixture(params=["capture", "dataset"])
def source(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    """The same rows in the process's memory and on the disk."""
    capture = made(12, num_completions=2)
    if request.param == "capture":
        return capture
    capture.save(tmp_path / "run")
    return open_dataset(tmp_path / "run")


def test_arrays_and_their_labels(source: Any) -> None:
    """Row r of the array is what label r says."""
    rows, names = array(source, "hidden_states", 3), labels(source)
    assert rows.shape == (source.num_rows, 16)
    for number in (0, 17, source.num_rows - 1):
        sample = source.sample(int(names["samples"][number]), int(names["completions"][number]))
        at = sample.positions.tolist().index(int(names["positions"][number]))
        assert np.array_equal(rows[number], sample.hidden_states[3][at].float().numpy())
        assert sample.token_ids[at] == names["token_ids"][number]


def test_batches_pass_over_all_rows(source: Any) -> None:
    """Each row once in an epoch but for what fills no batch; another order in the next; the same from the same seed."""
    count = source.num_rows // 16
    batches = list(itertools.islice(activations(source, 3, batch_size=16), 2 * count))
    assert all(batch.shape == (16, 16) and batch.dtype == torch.bfloat16 for batch in batches)
    known = {tuple(row.tolist()) for row in source.rows("hidden_states", 3)[:]}
    for epoch in (batches[:count], batches[count:]):
        rows = [tuple(row.tolist()) for batch in epoch for row in batch]
        assert len(set(rows)) == len(rows)
        assert set(rows) <= known
    assert not torch.equal(batches[0], batches[count])
    again = next(activations(source, 3, batch_size=16))
    assert torch.equal(again, batches[0])


def test_batches_of_several_layers(source: Any) -> None:
    """Mappings by hook, the same rows in each; negative layers count from the end."""
    both = list(activations(source, [3, -1], batch_size=16, epochs=1, dtype=torch.float32))
    alone = list(activations(source, 7, batch_size=16, epochs=1))
    assert [list(batch) for batch in both] == [["blocks.3.hook_resid_post", "blocks.7.hook_resid_post"]] * len(alone)
    for batch, one in zip(both, alone, strict=True):
        assert torch.equal(batch["blocks.7.hook_resid_post"], one.float())


def test_batches_that_cannot_be(source: Any) -> None:
    """Refused before the first one is asked for."""
    with pytest.raises(RowsMissingError, match="lower batch_size"):
        activations(source, 3, batch_size=10**6)
    with pytest.raises(LayerError, match="layers 0 to 7"):
        activations(source, 8, batch_size=16)


def test_what_toploc_takes(source: Any) -> None:
    """The prompt's states together, then one for each later token."""
    sample = source[0]
    found = toploc_activations(sample)
    num_prompt = len(sample.output.prompt_token_ids)
    assert [tuple(one.shape) for one in found] == [(num_prompt, 16)] + [(16,)] * (len(sample) - num_prompt)
    assert torch.equal(torch.cat([found[0], torch.stack(found[1:])]), sample.final_hidden_states)

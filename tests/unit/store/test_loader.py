"""Shuffled batches: every row once, the same whatever loads them, gone on with exactly, and well mixed."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from synthetic_rows import MODEL, SyntheticCapture, bits, prompts_of
from vllm_tap.errors import SpecError
from vllm_tap.store.dataset import Dataset
from vllm_tap.store.loader import Batches, Order
from vllm_tap.store.recording import Run, record_with

sizes = st.integers(1, 40)


@given(num_rows=st.integers(0, 500), batch=sizes, block=sizes, mixed=st.integers(1, 8), epoch=st.integers(0, 3))
def test_every_row_comes_once(num_rows: int, batch: int, block: int, mixed: int, epoch: int) -> None:
    """In full batches but for the last one, in any epoch."""
    order = Order(num_rows, batch, block, mixed, seed=epoch)
    batches = [order.batch(epoch, number) for number in range(order.num_batches)]
    assert all(len(one) == batch for one in batches[:-1])
    assert sorted(np.concatenate([*batches, []])) == list(range(num_rows))


def test_rows_are_mixed() -> None:
    """Of a batch's rows, hardly two were neighbours; epochs and seeds differ."""
    order = Order(1 << 18, 1024, 64, 256, seed=0)
    neighbours = [np.count_nonzero(np.abs(np.diff(np.sort(order.batch(0, number)))) == 1) for number in range(64)]
    # Drawn from a pool of 256 blocks of 64 rows, a row's neighbour is in its batch of 1024 in 1 of 16 cases; 64 were
    # neighbours on average. All would be without a shuffle.
    assert np.mean(neighbours) < 80
    assert not np.array_equal(order.batch(0, 0), order.batch(1, 0))
    assert not np.array_equal(order.batch(0, 0), Order(1 << 18, 1024, 64, 256, seed=1).batch(0, 0))


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    """Rows in several parts."""
    run = Run(SyntheticCapture([]).spec, MODEL, "", {})
    return record_with(SyntheticCapture, prompts_of(40), tmp_path, run, batch=7)


def taken(batches: Any) -> list[tuple[bytes, list[int]]]:
    """Return what came."""
    return [(bits(batch.rows), batch.numbers.tolist()) for batch in batches]


def make(dataset: Dataset, layers: Any = (0, 3)) -> Batches:
    """Return batches of rows."""
    return dataset.batches("hidden_states", layers, batch_size=13, seed=5, block_rows=8, mixed_blocks=4)


def test_batches_are_rows_of_the_dataset(dataset: Dataset) -> None:
    """[B, L, D] of several layers, [B, D] of one, and their numbers; without a seed in their own order."""
    for batch in make(dataset):
        for at, layer in enumerate((0, 3)):
            assert bits(batch.rows[:, at]) == bits(dataset.rows("hidden_states", layer)[batch.numbers])
    plain = dataset.batches("router_logits", 1, batch_size=13)
    assert torch.cat([batch.numbers for batch in plain]).tolist() == list(range(dataset.num_rows))
    assert bits(torch.cat([batch.rows for batch in plain])) == bits(dataset.rows("router_logits", 1)[:])


def test_any_number_of_workers_loads_the_same(dataset: Dataset) -> None:
    """In processes that open the dataset for themselves, and epoch after epoch."""
    expected = make(dataset)
    epochs = [taken(expected), taken(expected)]
    assert epochs[0] != epochs[1]
    workers = make(dataset)
    assert [taken(workers.loader(2, multiprocessing_context="spawn")), taken(workers.loader())] == epochs


def test_a_state_goes_on_exactly(dataset: Dataset) -> None:
    """From any batch on, into the next epoch, and through a pickle."""
    expected = make(dataset)
    all_of_it = taken(expected) + taken(expected)
    for number in (0, 1, 9, len(expected) + 2):
        first = make(dataset)
        source = (batch for _ in range(2) for batch in first)
        for _ in range(number):
            next(source)
        state = pickle.loads(pickle.dumps(first.state_dict()))
        second = make(dataset)
        second.load_state_dict(state)
        rest = taken(second) + (taken(second) if second.epoch == 1 else [])
        assert rest == all_of_it[number:]
    with pytest.raises(SpecError, match="batch_size=13"):
        dataset.batches("hidden_states", 0, batch_size=4).load_state_dict(state)

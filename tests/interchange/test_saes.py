"""SAELens and dictionary_learning, unmodified, over our exports and iterators. Skips where they are not installed.

Without an engine: `made_rows` has states near a plane, so an autoencoder gets better fast.
"""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
import torch

from made_rows import made
from readers import reader
from vllm_tap import open_dataset
from vllm_tap.interchange import activations, export
from vllm_tap.interchange.source import sequences

CONTEXT, WIDTH, LAYER = 4, 16, 3
HOOK = f"blocks.{LAYER}.hook_resid_post"


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A dataset of some hundreds of rows."""
    reader("datasets")  # both packages need it
    folder = tmp_path_factory.mktemp("run") / "run"
    made(40).save(folder)
    return open_dataset(folder)


def store_of(path: Path, batch_size: int) -> Any:
    """Return SAELens' store over an export, without a model."""
    from sae_lens import ActivationsStore

    return ActivationsStore(
        model=None,
        dataset=None,
        streaming=False,
        hook_name=HOOK,
        hook_head_index=None,
        context_size=CONTEXT,
        d_in=WIDTH,
        n_batches_in_buffer=16,
        total_training_tokens=10**6,
        store_batch_size_prompts=8,
        train_batch_size_tokens=batch_size,
        prepend_bos=False,
        normalize_activations="none",
        device=torch.device("cpu"),
        dtype="float32",
        cached_activations_path=str(path),
    )


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_saelens_store_yields_our_rows(dataset: Any, tmp_path: Path, dtype: str) -> None:
    """Each row of the store is one of the dataset with its token, and none comes twice in a pass."""
    reader("sae_lens")
    facts = export(dataset, "saelens", tmp_path / "out", context_size=CONTEXT, packing="within", dtype=dtype)
    rows = {}
    for sample in sequences(dataset):
        for row, token in zip(sample.hidden_states[LAYER], sample.token_ids.tolist(), strict=True):
            rows[tuple(row.to(getattr(torch, dtype)).tolist())] = token
    store = store_of(tmp_path / "out", 32)
    seen = []
    for _ in range(facts["contexts"] // 8):
        states, tokens = store.get_raw_llm_batch()
        assert [rows[tuple(row.tolist())] for row in states] == tokens.tolist()
        seen += [tuple(row.tolist()) for row in states]
    assert len(set(seen)) == len(seen) == facts["contexts"] // 8 * 8 * CONTEXT


def train(provider: Any) -> list[float]:
    """Return the reconstruction error of each of 100 steps of SAELens' trainer."""
    from sae_lens import StandardTrainingSAE, StandardTrainingSAEConfig
    from sae_lens.config import SAETrainerConfig
    from sae_lens.training.sae_trainer import SAETrainer

    torch.manual_seed(0)
    sae = StandardTrainingSAE(StandardTrainingSAEConfig(d_in=WIDTH, d_sae=64, l1_coefficient=0.01))
    errors: list[float] = []

    def counted() -> Any:
        for batch in provider:
            with torch.no_grad():
                errors.append(float((sae(batch.float()) - batch.float()).square().mean()))
            yield batch.float()

    config = SAETrainerConfig(total_training_samples=3200, train_batch_size_samples=32, lr=3e-3, lr_end=3e-3)
    SAETrainer(cfg=config, sae=sae, data_provider=counted()).fit()
    return errors


@pytest.mark.parametrize("way", ["store", "iterator"])
def test_saelens_trainer_learns(dataset: Any, tmp_path: Path, way: str) -> None:
    """100 steps over the store and over our iterator; the error falls by more than half."""
    reader("sae_lens")
    if way == "store":
        export(dataset, "saelens", tmp_path / "out", context_size=CONTEXT, packing="across")
        errors = train(store_of(tmp_path / "out", 32).get_data_loader())
    else:
        errors = train(activations(dataset, LAYER, batch_size=32))
    assert len(errors) >= 100
    assert errors[-1] < 0.5 * errors[0]


def test_dictionary_learning_trains(dataset: Any, tmp_path: Path) -> None:
    """`trainSAE` over our iterator; the autoencoder that it saves rebuilds rows better than a new one."""
    reader("dictionary_learning")
    from dictionary_learning import AutoEncoder
    from dictionary_learning.trainers.standard import StandardTrainer
    from dictionary_learning.training import trainSAE

    config = {
        "trainer": StandardTrainer,
        "dict_class": AutoEncoder,
        "activation_dim": WIDTH,
        "dict_size": 64,
        "lr": 3e-3,
        "l1_penalty": 0.01,
        "steps": 100,
        "layer": LAYER,
        "lm_name": "made/up",
        "device": "cpu",
        "warmup_steps": 10,
        "sparsity_warmup_steps": None,
        "resample_steps": None,
        "decay_start": None,
        "seed": 0,
    }
    known = inspect.signature(StandardTrainer).parameters
    config = {name: value for name, value in config.items() if name in known or name == "trainer"}
    trainSAE(activations(dataset, LAYER, batch_size=32), [config], steps=100, device="cpu", save_dir=str(tmp_path))
    trained = AutoEncoder(WIDTH, 64)
    rows = next(activations(dataset, LAYER, batch_size=256, seed=1)).float()
    before = float((trained(rows) - rows).square().mean())
    trained.load_state_dict(torch.load(tmp_path / "trainer_0" / "ae.pt", weights_only=True))
    assert float((trained(rows) - rows).square().mean()) < 0.5 * before

"""speculators, unmodified, over our export: its dataset, its collate, its EAGLE-3 model; layers against Hugging Face.

Skips where it is not installed: `make test-interchange`. Without an engine: states come from Hugging Face's model.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from readers import reader
from vllm_tap import Spec
from vllm_tap.client.owned import OwnedRows
from vllm_tap.client.result import Capture
from vllm_tap.client.sequences import Sequences
from vllm_tap.interchange import export

NUM_LAYERS, WIDTH, VOCABULARY = 8, 64, 128
THEIR_IDS = [2, NUM_LAYERS // 2, NUM_LAYERS - 3, NUM_LAYERS]
"""What speculators asks of vLLM: the input of these layers, and the last output."""

MAX_LEN = 256


@pytest.fixture(scope="module")
def data() -> Any:
    """Its module of datasets."""
    return reader("speculators.train.data")


@pytest.fixture(scope="module")
def verifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of eight layers on the disk."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=128,
        num_hidden_layers=NUM_LAYERS,
        num_attention_heads=4,
        num_key_value_heads=4,
        tie_word_embeddings=False,
    )
    folder = tmp_path_factory.mktemp("verifier")
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(4) if weight.ndim > 1 else weight.add_(torch.rand_like(weight) - 0.5)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def inputs(verifier: Path) -> list[tuple[list[int], dict[int, torch.Tensor]]]:
    """Token ids of sequences, and what goes into each layer in Hugging Face's model; under L, the last output."""
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(verifier)
    generator = torch.Generator().manual_seed(1)
    drawn = [torch.randint(0, VOCABULARY, (1, length), generator=generator) for length in (12, 20, 33, 9)]
    return [(ids[0].tolist(), layer_inputs(model, ids)) for ids in drawn]


def layer_inputs(model: Any, ids: torch.Tensor) -> dict[int, torch.Tensor]:
    """Return what goes into each layer and, under L, into the final norm."""
    seen: dict[int, torch.Tensor] = {}
    hooks = [
        module.register_forward_pre_hook(lambda _, args, at=at: seen.__setitem__(at, args[0][0].detach().clone()))
        for at, module in enumerate([*model.model.layers, model.model.norm])
    ]
    with torch.inference_mode():
        model(ids)
    for hook in hooks:
        hook.remove()
    return seen


@pytest.fixture(scope="module")
def exported(inputs: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The export of a capture of those sequences, each of a prompt of four tokens."""
    outputs = [
        SimpleNamespace(
            request_id=str(number),
            prompt=None,
            prompt_token_ids=ids[:4],
            outputs=[SimpleNamespace(index=0, token_ids=[*ids[4:], 0], text="", finish_reason="length")],
        )
        for number, (ids, _) in enumerate(inputs)
    ]
    states = {
        ("hidden_states", layer): torch.cat([seen[layer + 1] for _, seen in inputs]) for layer in range(NUM_LAYERS)
    }
    capture = Capture(
        Spec(hidden_states="all"),
        outputs,
        Sequences(outputs, "all"),
        [OwnedRows(states)],
        {"hidden_states": "after the layer"},
        {},
        ["hidden_states"],
        NUM_LAYERS,
        True,
    )
    folder = tmp_path_factory.mktemp("exports") / "out"
    assert export(capture, "speculators", folder)["target_layer_ids"] == THEIR_IDS[:-1]
    return folder


@pytest.fixture(scope="module")
def dataset(data: Any, exported: Path) -> Any:
    """Its dataset, which raises where a file is missing."""
    return data.ArrowDataset(MAX_LEN, exported, on_missing="raise", hidden_states_dtype=torch.float32)


def test_its_dataset_reads_every_sample(dataset: Any, inputs: Any, exported: Path) -> None:
    """States of its layer ids by vLLM's definition, bit for bit; the last one before the norm."""
    from speculators.data_generation.offline import check_hidden_states, find_corrupt_hidden_state_indices

    assert len(dataset) == len(inputs)
    assert find_corrupt_hidden_state_indices(exported / "hidden_states", list(range(len(inputs)))) == {}
    for number, (ids, seen) in enumerate(inputs):
        item = dataset[number]
        assert item["input_ids"].tolist() == ids
        assert torch.equal(item["hidden_states"], torch.cat([seen[at] for at in THEIR_IDS[:-1]], 1))
        assert torch.equal(item["verifier_last_hidden_states"], seen[NUM_LAYERS])
        assert item["loss_mask"].tolist() == [0] * 4 + [1] * (len(ids) - 4)
        assert dataset.approx_lengths[number] == len(ids)
        check_hidden_states(dataset.transfer.get_cached(number), ids)


def test_its_collate_packs_them(data: Any, dataset: Any) -> None:
    """All samples stand behind one another, none is dropped."""
    collate = data.CollateFn(MAX_LEN, WIDTH, dtype=torch.float32)
    batch = collate([dataset[number] for number in range(len(dataset))])
    assert batch["hidden_states"].shape == (1, MAX_LEN, 3 * WIDTH)
    assert batch["error_records"] == 0
    assert (batch["document_ids"] >= 0).sum() == sum(dataset.approx_lengths)


def test_its_draft_learns(data: Any, dataset: Any, verifier: Path) -> None:
    """Twenty steps of AdamW on its EAGLE-3 model: the loss stays finite and falls.

    Its `Trainer` puts models on an accelerator, so the loop is here; the model, its weights from the verifier, and the
    loss are its own.
    """
    from speculators.models.eagle3 import Eagle3DraftModel
    from transformers import LlamaConfig

    torch.manual_seed(0)
    config = LlamaConfig.from_pretrained(verifier)
    config.num_hidden_layers = 1
    kwargs = {
        "verifier_name_or_path": str(verifier),
        "draft_vocab_size": VOCABULARY,
        "norm_before_residual": True,
        "draft_attn_impl": "eager",
        "ttt_steps": 2,
        "ttt_step_loss_decay": 1.0,
        "loss_fn": "kl_div",
        "loss_implementation": "eager",
        "target_layer_ids": THEIR_IDS[:-1],
    }
    model = Eagle3DraftModel.from_training_args(config, **kwargs)
    call, _ = Eagle3DraftModel.get_trainer_kwargs(**kwargs)
    model.float().train()
    optimizer = torch.optim.AdamW([weight for weight in model.parameters() if weight.requires_grad], lr=1e-2)
    collate = data.CollateFn(MAX_LEN, WIDTH, dtype=torch.float32)
    batch = collate([dataset[number] for number in range(len(dataset))])
    batch.pop("error_records")
    losses = []
    for _ in range(20):
        _, loss, _ = model(**batch, **call)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert all(torch.isfinite(torch.tensor(losses)))
    assert losses[-1] < 0.8 * losses[0]

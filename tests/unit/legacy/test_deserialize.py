"""The functions of `vllm.hidden_states`: payloads, printed summaries, and how a mixture of experts is found."""

from __future__ import annotations

import pytest
import torch
from transformers import MixtralConfig, Qwen3MoeConfig
from transformers.models.mixtral.modeling_mixtral import MixtralForCausalLM
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeForCausalLM

from vllm_tap.errors import CaptureError, SpecError
from vllm_tap.legacy.deserialize import (
    deserialize_hidden_states,
    deserialize_moe_router_logits,
    extract_moe_layer_id_from_name,
    is_moe_layer,
    print_hidden_states_summary,
    print_moe_router_logits_summary,
)

TINY = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}


@pytest.mark.parametrize("read", [deserialize_hidden_states, deserialize_moe_router_logits])
def test_both_readers_take_the_old_bytes(read: object) -> None:
    """Each of the two functions turns float32 bytes into tensors by layer, in the dtype that was stored."""
    assert callable(read)
    want = torch.arange(6.0).reshape(2, 3)
    tensors = read({4: {"data": want.numpy().tobytes(), "shape": [2, 3], "dtype": "torch.bfloat16"}})
    assert list(tensors) == [4]
    assert tensors[4].dtype == torch.bfloat16
    assert tensors[4].tolist() == want.tolist()


def test_hidden_states_summary_prints_a_line_per_layer(capsys: pytest.CaptureFixture[str]) -> None:
    """The summary counts the layers, then names shape, dtype and device of each, in ascending order."""
    print_hidden_states_summary({11: torch.ones(3, 8), 2: torch.ones(3, 8, dtype=torch.bfloat16)})
    assert capsys.readouterr().out == (
        "Captured 2 layers:\n"
        "  Layer  2: shape (3, 8), dtype torch.bfloat16, device cpu\n"
        "  Layer 11: shape (3, 8), dtype torch.float32, device cpu\n"
    )


def test_router_logits_summary_prints_tokens_and_experts(capsys: pytest.CaptureFixture[str]) -> None:
    """The summary counts the layers, then names tokens, experts, dtype and device of each."""
    print_moe_router_logits_summary({1: torch.ones(5, 64, dtype=torch.bfloat16)})
    assert capsys.readouterr().out == (
        "Captured 1 MoE layers:\n  Layer  1: 5 tokens x 64 experts, dtype torch.bfloat16, device cpu\n"
    )


def test_router_logits_summary_refuses_other_shapes_before_it_prints(capsys: pytest.CaptureFixture[str]) -> None:
    """Hidden states of a batch are no router logits: the layer is named, and half a summary is not printed."""
    with pytest.raises(SpecError, match=r"layer 9: .* \(1, 2, 3\)"):
        print_moe_router_logits_summary({1: torch.ones(5, 64), 9: torch.ones(1, 2, 3)})
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("model", "config"),
    [
        (MixtralForCausalLM, MixtralConfig(**TINY, num_local_experts=4)),
        (Qwen3MoeForCausalLM, Qwen3MoeConfig(**TINY, num_experts=4, moe_intermediate_size=8, mlp_only_layers=[1])),
    ],
    ids=["mixtral", "qwen3-moe"],
)
def test_mixtures_of_experts_are_found_in_real_models(model: type, config: object) -> None:
    """In models of another library exactly one module per sparse layer is found, and its name tells the layer."""
    with torch.device("meta"):
        modules = dict(model(config).named_modules())
    found = [extract_moe_layer_id_from_name(name) for name, module in modules.items() if is_moe_layer(module, name)]
    assert found == ([0, 2] if isinstance(config, Qwen3MoeConfig) else [0, 1, 2])


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("model.layers.10.block_sparse_moe", 10),
        ("language_model.model.layers.3.mlp.experts.7", 3),
        ("transformer.h.12.mlp", 12),
        ("transformer.blocks.0.ffn", 0),
        ("encoder.layer.5.moe", 5),
        ("layers.2", 2),
        ("model.moe_layer", None),
        ("model.experts.3.gate", None),
        ("model.layers.x.mlp", None),
        ("model.layers", None),
        ("layers.²", None),
        ("", None),
    ],
)
def test_names_tell_the_decoder_layer(name: str, layer: int | None) -> None:
    """The number after a list of layers is the layer; the number of an expert is not; no number is None."""
    assert extract_moe_layer_id_from_name(name) == layer


def test_a_reply_that_says_what_failed_is_raised() -> None:
    """Worker calls cannot raise: their error comes as a payload, and is an exception here."""
    with pytest.raises(CaptureError, match="the worker could not: BudgetError: the rows do not fit"):
        deserialize_hidden_states({"error": "BudgetError: the rows do not fit"})

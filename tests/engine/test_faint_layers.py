"""A model whose layers add next to nothing to the stream: what they return is told all the same.

Runs in the test process, beside one eager engine.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers

from engine.engines import Engine, References, compare, prompts
from models import byte_tokenizer
from vllm_tap import Spec

pytestmark = pytest.mark.engine


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_hybrid_of_default_weights(tmp_path: Path, dtype: str):
    """Granite's hybrid as transformers draws it: what its layers return beside the stream is a hundredth of that.

    In bfloat16 rows are not compared: Hugging Face rounds elsewhere.
    """
    config = transformers.GraniteMoeHybridConfig(
        vocab_size=512, hidden_size=128, intermediate_size=256, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, layer_types=["mamba", "attention"] * 2, shared_intermediate_size=128, mamba_n_heads=8,
        mamba_d_head=32, mamba_n_groups=1, mamba_d_state=16, mamba_chunk_size=32, num_local_experts=8,
        num_experts_per_tok=2, max_position_embeddings=512, bos_token_id=256, eos_token_id=257, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    engine = Engine(tmp_path, enforce_eager=True, dtype=dtype)
    result = engine.capture(prompts(), Spec(hidden_states="all", final_hidden_states=True))
    assert result.conventions["hidden_states"] == "hidden"
    if dtype == "float32":
        compare(result, References(tmp_path))
    engine.close()

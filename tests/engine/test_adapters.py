"""Captures of requests with a LoRA adapter and without, against Hugging Face with merged weights.

Runs in the test process, beside one eager engine.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from engine.engines import Engine, References, compare, prompts
from models import NUM_LAYERS
from vllm_tap import Spec

pytestmark = pytest.mark.engine

RANK, ALPHA = 4, 8
TARGETS = ("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj")
SPEC = Spec(hidden_states="all", embeddings=True, final_hidden_states=True)


def make_adapter(model: Path, adapter: Path, merged: Path) -> None:
    """Write a random adapter, and a copy of the model that has it merged into its weights."""
    generator = torch.Generator().manual_seed(0)
    weights, low = load_file(model / "model.safetensors"), {}
    for layer in range(NUM_LAYERS):
        for target in TARGETS:
            name = f"model.layers.{layer}.{target}"
            num_out, num_in = weights[f"{name}.weight"].shape
            down = torch.randn(RANK, num_in, generator=generator) * num_in**-0.5
            up = torch.randn(num_out, RANK, generator=generator) * RANK**-0.5 / 4
            low[f"base_model.model.{name}.lora_A.weight"] = down
            low[f"base_model.model.{name}.lora_B.weight"] = up
            weights[f"{name}.weight"] += ALPHA / RANK * up @ down
    adapter.mkdir()
    save_file(low, adapter / "adapter_model.safetensors")
    settings = {
        "peft_type": "LORA",
        "r": RANK,
        "lora_alpha": ALPHA,
        "target_modules": [target.split(".")[1] for target in TARGETS],
        "bias": "none",
    }
    (adapter / "adapter_config.json").write_text(json.dumps(settings))
    shutil.copytree(model, merged)
    save_file(weights, merged / "model.safetensors", metadata={"format": "pt"})


def test_rows_are_those_of_the_requests_adapter(tiny_model: Callable[..., Path], tmp_path: Path):
    """Rows are those of the model that the adapter makes; without it, and after it, those of the plain one.

    One batch never holds both: on a CPU vLLM 0.32, also without the plugin, runs all of it with the adapter.
    """
    from vllm.lora.request import LoRARequest

    model, adapter, merged = tiny_model("llama"), tmp_path / "adapter", tmp_path / "merged"
    make_adapter(model, adapter, merged)
    engine = Engine(model, enforce_eager=True, enable_lora=True, max_lora_rank=8)
    request = LoRARequest("adapter", 1, str(adapter))
    plain, adapted = References(model), References(merged)
    turns = ((None, plain), (request, adapted), ([request] * len(prompts()), adapted), (None, plain))
    for lora_request, known in turns:
        compare(engine.capture(prompts(), SPEC, lora_request=lora_request), known)
    conventions = engine.capture(prompts(), SPEC).conventions
    for _ in range(2):  # it goes, and is there again when it is asked for
        assert engine.llm.llm_engine.remove_lora(1)
        compare(plainly := engine.capture(prompts(), SPEC), plain)
        assert plainly.conventions == conventions
        compare(engine.capture(prompts(), SPEC, lora_request=request), adapted)
    engine.close()

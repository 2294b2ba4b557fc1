"""Makes tiny random models, one folder each, that both Hugging Face and vLLM load.

Runs in the test process, or by hand: `python tests/support/models.py FOLDER [FAMILY ...]`. Families are in FAMILIES.

The weights are drawn so that wrong conventions show: the residual stream has a scale near one and every layer adds to
it, norm weights lie between 0.5 and 1.5 in effect, and no two layers are alike.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import sys
import tempfile
import zlib
from pathlib import Path
from typing import Any

NUM_LAYERS = 4
VOCAB_SIZE = 512
BOS, EOS = "<s>", "</s>"

_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": NUM_LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
    "bos_token_id": 256,
    "eos_token_id": 257,
    "pad_token_id": None,
}

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama"},
    "qwen3": {"model_type": "qwen3", "hidden_size": 256, "head_dim": 64},
    # The window is short, so that a prompt of a few dozen tokens passes it; the last layer attends to everything.
    "gemma3": {
        "model_type": "gemma3_text",
        "head_dim": 64,
        "query_pre_attn_scalar": 64,
        "sliding_window": 16,
        "layer_types": ["sliding_attention"] * (NUM_LAYERS - 1) + ["full_attention"],
    },
    "qwen3_moe": {
        "model_type": "qwen3_moe",
        "moe_intermediate_size": 64,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "norm_topk_prob": True,
    },
    "mixtral": {
        "model_type": "mixtral",
        "hidden_size": 256,
        "intermediate_size": 128,
        "head_dim": 64,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
    },
    # Half of the groups are in reach of a token, and its bias steers the choice; the first layer has no experts.
    "glm4_moe": {
        "model_type": "glm4_moe",
        "moe_intermediate_size": 64,
        "n_routed_experts": 16,
        "num_experts_per_tok": 4,
        "n_group": 4,
        "topk_group": 2,
        "norm_topk_prob": True,
        "routed_scaling_factor": 2.5,
        "n_shared_experts": 1,
        "first_k_dense_replace": 1,
    },
    "olmoe": {"model_type": "olmoe", "num_experts": 8, "num_experts_per_tok": 2, "norm_topk_prob": False},
}
"""Settings of each family, over the common ones, as its configuration class takes them."""

MOE_FAMILIES = tuple(name for name, settings in FAMILIES.items() if "num_experts_per_tok" in settings)


def fingerprint() -> str:
    """Return a short key that changes with this file and with the libraries that write the models."""
    import torch
    import transformers

    versions = f"{torch.__version__} {transformers.__version__}".encode()
    return hashlib.sha256(Path(__file__).read_bytes() + versions).hexdigest()[:12]


def ensure_model(root: Path, family: str, dtype: str = "float32") -> Path:
    """Make a family's model under `root` unless it is there; safe when several processes ask at once.

    Returns:
        The model's folder, `root/FAMILY-DTYPE`, which no one writes to any more.

    Raises:
        KeyError: no such family.
    """
    folder = root / f"{family}-{dtype}"
    if folder.is_dir():
        return folder
    root.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=root))
    try:
        make_model(draft, family, dtype)
        draft.chmod(0o755)
        _rename_unless_there(draft, folder)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return folder


def make_model(folder: Path, family: str, dtype: str = "float32") -> None:
    """Write a family's configuration, weights and tokenizer into `folder`; the same call gives the same bytes."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(**{**_COMMON, **FAMILIES[family]})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    _draw_weights(model, torch.Generator().manual_seed(zlib.crc32(family.encode())))
    model.to(getattr(torch, dtype)).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)


def byte_tokenizer() -> Any:
    """Return a tokenizer with one token a byte; ids above them decode to a readable name, so any output has a text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    names = [*sorted(pre_tokenizers.ByteLevel.alphabet()), BOS, EOS]
    names += [f"<{index}>" for index in range(len(names), VOCAB_SIZE)]
    tokenizer = Tokenizer(models.BPE(vocab={name: index for index, name in enumerate(names)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS)


def _draw_weights(model: Any, generator: Any) -> None:
    import torch

    embeddings = model.get_input_embeddings()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight is embeddings.weight:
                # Gemma multiplies what it looks up; the product is to have scale one.
                weight.normal_(0.0, 1.0 / getattr(embeddings, "scalar_embed_scale", 1.0), generator=generator)
            elif weight.ndim > 1:
                weight.normal_(0.0, weight.shape[-1] ** -0.5, generator=generator)
            elif name.endswith("bias"):
                weight.normal_(0.0, 0.2, generator=generator)
            else:
                # Norms start at one, or at zero where the module adds the one itself.
                weight.add_(torch.empty_like(weight).uniform_(-0.5, 0.5, generator=generator))
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.normal_(0.0, 0.2, generator=generator)


def _rename_unless_there(draft: Path, folder: Path) -> None:
    try:
        os.rename(draft, folder)
    except OSError:
        if not folder.is_dir():
            raise


if __name__ == "__main__":
    for chosen in sys.argv[2:] or FAMILIES:
        print(ensure_model(Path(sys.argv[1]), chosen))

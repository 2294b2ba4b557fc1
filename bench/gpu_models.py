#!/usr/bin/env python3
"""Write configs of models of real size, for engines with dummy weights: python bench/gpu_models.py OUT_DIR."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

COMMON: dict[str, Any] = {
    "dtype": "bfloat16",
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "num_attention_heads": 32,
}

MODELS: dict[str, dict[str, Any]] = {
    "llama-8b": {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
    },
    "qwen3-30b-a3b": {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "moe_intermediate_size": 768,
        "num_hidden_layers": 48,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "vocab_size": 151936,
        "max_position_embeddings": 40960,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
    },
}

VISION_START, VISION_END, IMAGE, VIDEO = 151652, 151653, 151655, 151656
MARKS = {VISION_START: "<|vision_start|>", VISION_END: "<|vision_end|>", IMAGE: "<|image_pad|>", VIDEO: "<|video_pad|>"}
END_OF_TEXT = 151645

QWEN3_VL_TEXT = {
    key: value
    for key, value in (COMMON | MODELS["qwen3-30b-a3b"]).items()
    if key not in ("architectures", "model_type", "rope_theta", "bos_token_id", "eos_token_id")
} | {
    "model_type": "qwen3_vl_moe_text",
    "max_position_embeddings": 262144,
    "rope_theta": 5000000.0,
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 5000000.0,
        "mrope_section": [24, 20, 20],
        "mrope_interleaved": True,
    },
}
QWEN3_VL_VISION = {
    "model_type": "qwen3_vl_moe",
    "depth": 27,
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_heads": 16,
    "hidden_act": "gelu_pytorch_tanh",
    "in_channels": 3,
    "patch_size": 16,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "out_hidden_size": 2048,
    "num_position_embeddings": 2304,
    "deepstack_visual_indexes": [8, 16, 24],
}
MODELS["qwen3-vl-30b-a3b"] = {
    "architectures": ["Qwen3VLMoeForConditionalGeneration"],
    "model_type": "qwen3_vl_moe",
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
    "vision_start_token_id": VISION_START,
    "vision_end_token_id": VISION_END,
    "text_config": QWEN3_VL_TEXT,
    "vision_config": QWEN3_VL_VISION,
}
"""That of the old interface's example; its processor is made where it runs, by `write_processor`."""


def write_config(folder: Path, name: str) -> None:
    """Write one model's config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    common = {} if "text_config" in MODELS[name] else COMMON
    more = {} if common else {"dtype": "bfloat16", "tie_word_embeddings": False}
    (folder / "config.json").write_text(json.dumps(common | more | MODELS[name], indent=1))


def write_tokenizer(folder: Path, name: str) -> None:
    """Write a tokenizer of words, `w0 w1 ...`: any ids are a text that has the same ids."""
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = [f"w{index}" for index in range(MODELS[name]["vocab_size"])]
    tokens = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token=words[0]))
    tokens.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokens, unk_token=words[0], eos_token=words[COMMON["eos_token_id"]]
    ).save_pretrained(folder)


def write_processor(folder: Path) -> None:
    """Write a tokenizer with one token a byte and all ids of Qwen3-VL, and the processor of its images."""
    import transformers
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    names = sorted(pre_tokenizers.ByteLevel.alphabet())
    names += [MARKS.get(index, f"<{index}>") for index in range(len(names), QWEN3_VL_TEXT["vocab_size"])]
    tokens = Tokenizer(models.BPE(vocab={name: index for index, name in enumerate(names)}, merges=[]))
    tokens.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokens.decoder = decoders.ByteLevel()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=tokens, eos_token=names[END_OF_TEXT])
    tokenizer.add_special_tokens({"additional_special_tokens": list(MARKS.values())})
    sizes = {"patch_size": 16, "merge_size": 2, "temporal_patch_size": 2}
    limits = {"shortest_edge": 256 * 256, "longest_edge": 4096 * 4096}
    transformers.Qwen3VLProcessor(
        image_processor=transformers.Qwen2VLImageProcessor(**sizes, size=limits),
        tokenizer=tokenizer,
        video_processor=transformers.Qwen3VLVideoProcessor(**sizes),
    ).save_pretrained(folder)


def main() -> None:
    for name in MODELS:
        write_config(Path(sys.argv[1]) / name, name)


if __name__ == "__main__":
    main()

"""Write model configs of real size for engines started with dummy weights: python3 models.py OUT_DIR."""

import json, os, sys

OUT = sys.argv[1]


def w(d, cfg):
    os.makedirs(d, exist_ok=True)
    json.dump(cfg, open(d + "/config.json", "w"))


w(
    OUT + "/llama-8b",
    dict(
        architectures=["LlamaForCausalLM"],
        model_type="llama",
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=128256,
        max_position_embeddings=131072,
        rms_norm_eps=1e-5,
        rope_theta=500000.0,
        torch_dtype="bfloat16",
        dtype="bfloat16",
        hidden_act="silu",
        tie_word_embeddings=False,
        bos_token_id=1,
        eos_token_id=2,
    ),
)
w(
    OUT + "/qwen3-30b-a3b",
    dict(
        architectures=["Qwen3MoeForCausalLM"],
        model_type="qwen3_moe",
        hidden_size=2048,
        intermediate_size=6144,
        moe_intermediate_size=768,
        num_hidden_layers=48,
        num_attention_heads=32,
        num_key_value_heads=4,
        head_dim=128,
        num_experts=128,
        num_experts_per_tok=8,
        norm_topk_prob=True,
        vocab_size=151936,
        max_position_embeddings=40960,
        rms_norm_eps=1e-6,
        rope_theta=1000000.0,
        dtype="bfloat16",
        torch_dtype="bfloat16",
        hidden_act="silu",
        tie_word_embeddings=False,
        decoder_sparse_step=1,
        mlp_only_layers=[],
        bos_token_id=1,
        eos_token_id=2,
    ),
)

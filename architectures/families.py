"""The families that are tried: for each, a tiny configuration that Hugging Face and vLLM both read.

Runs in the process that checks a family. Weights are drawn as in `tests/support/models.py`: the stream has a scale
near one, every layer adds to it, no norm weight is one.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Final

NUM_LAYERS: Final = 4
VOCAB_SIZE: Final = 512
MAX_POSITIONS: Final = 512

_SPECIAL: Final[dict[str, Any]] = {
    "vocab_size": VOCAB_SIZE,
    "bos_token_id": 256,
    "eos_token_id": 257,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}

_COMMON: Final[dict[str, Any]] = {
    **_SPECIAL,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": NUM_LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": MAX_POSITIONS,
}

_SLIDING: Final = ["sliding_attention"] * (NUM_LAYERS - 1) + ["full_attention"]
_WINDOW: Final = {"sliding_window": 16, "layer_types": _SLIDING}
_MOE: Final = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
_LOCAL: Final = {"num_local_experts": 8, "num_experts_per_tok": 2}
_ROUTED: Final = {
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
}
# The attention kernels of vLLM know these sizes of compressed keys only.
_MLA: Final = {
    "num_key_value_heads": 4,
    "head_dim": 64,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
}
_MLA_ON_CPU: Final = (
    "vLLM's MLA attention on the processor is at fault: a prompt alone gives other rows than in a batch, also without "
    "taps."
)
_NOT_REPEATING: Final = (
    "vLLM on the processor does not repeat itself: a prompt alone gives other rows than in a batch, also without taps."
)
_BIAS_ON_CPU: Final = (
    "The router that vLLM has for the processor leaves out the bias that only chooses experts, unless they are grouped."
)
_BFLOAT16: Final[dict[str, Any]] = {
    "engine": {"dtype": "bfloat16"},
    "differs": "vLLM has the kernel in bfloat16 only; transformers computes in float32.",
}
_LINEAR: Final = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 32,
    "linear_conv_kernel_dim": 4,
    "layer_types": ["linear_attention"] * (NUM_LAYERS - 1) + ["full_attention"],
}


@dataclass(frozen=True)
class Family:
    """One row of the table.

    Attributes:
        settings: Fields of the configuration class, over the common ones; a value of None takes a common one away.
        common: Whether the common settings apply; if not, `settings` names everything but vocabulary and special ids.
        engine: Further arguments of `vllm.LLM`.
        note: What a reader of the table must know.
        differs: Why vLLM computes something else than transformers, where it does: then the engine's own modules
            decide, which must confirm every layer.
    """

    settings: dict[str, Any]
    common: bool = True
    engine: dict[str, Any] = field(default_factory=dict)
    note: str = ""
    differs: str = ""

    def configuration(self) -> dict[str, Any]:
        """Return the fields of the configuration, with its `model_type`."""
        merged = {**(_COMMON if self.common else _SPECIAL), **self.settings}
        return {name: value for name, value in merged.items() if value is not None}


def _like_llama(model_type: str, **settings: Any) -> Family:
    return Family({"model_type": model_type, **settings})


def _own(model_type: str, **settings: Any) -> Family:
    return Family({"model_type": model_type, **settings}, common=False)


FAMILIES: Final[dict[str, Family]] = {
    # ------------------------------------------------------------------------------------------------------- dense
    "llama": _like_llama("llama"),
    "mistral": _like_llama("mistral", sliding_window=16),
    "ministral3": _like_llama("ministral3"),
    "qwen2": _like_llama("qwen2", head_dim=None),
    "qwen3": _like_llama("qwen3"),
    "gemma": _like_llama("gemma", tie_word_embeddings=True),
    "gemma2": _like_llama("gemma2", query_pre_attn_scalar=32, tie_word_embeddings=True, **_WINDOW),
    "gemma3": _like_llama("gemma3_text", query_pre_attn_scalar=32, **_WINDOW),
    "gemma3n": _like_llama(
        "gemma3n_text",
        tie_word_embeddings=True,
        vocab_size_per_layer_input=VOCAB_SIZE,
        hidden_size_per_layer_input=32,
        num_kv_shared_layers=0,
        laurel_rank=16,
        activation_sparsity_pattern=[0.0] * NUM_LAYERS,
        **_WINDOW,
    ),
    "gemma4": _like_llama(
        "gemma4_text",
        global_head_dim=32,
        tie_word_embeddings=True,
        vocab_size_per_layer_input=VOCAB_SIZE,
        hidden_size_per_layer_input=32,
        num_kv_shared_layers=0,
        **_WINDOW,
    ),
    "vaultgemma": _like_llama("vaultgemma", query_pre_attn_scalar=32, **_WINDOW),
    "olmo": _like_llama("olmo", head_dim=None),
    "olmo2": _like_llama("olmo2", head_dim=None),
    "olmo3": _like_llama("olmo3", head_dim=None, **_WINDOW),
    "olmo_hybrid": _like_llama("olmo_hybrid", **_LINEAR),
    "cohere": _like_llama("cohere", head_dim=None, logit_scale=1.0, tie_word_embeddings=True),
    "cohere2": Family(
        {
            "model_type": "cohere2",
            "logit_scale": 1.0,
            "tie_word_embeddings": True,
            "sliding_window": MAX_POSITIONS,
            "layer_types": _SLIDING,
        },
        note="The window is wider than the prompts: vLLM's is one token wider than that of transformers.",
    ),
    "stablelm": _like_llama("stablelm", head_dim=None),
    "stablelm_parallel": _like_llama("stablelm", head_dim=None, use_parallel_residual=True),
    "exaone4": _like_llama("exaone4", head_dim=None, **_WINDOW),
    "glm": _like_llama("glm"),
    "glm4": _like_llama("glm4"),
    "granite": _like_llama("granite", head_dim=None, residual_multiplier=0.5, embedding_multiplier=2.0),
    "granite_swa": _like_llama("granite_swa", head_dim=None, residual_multiplier=0.5, **_WINDOW),
    "falcon": _own(
        "falcon", hidden_size=128, num_hidden_layers=4, num_attention_heads=4, parallel_attn=True, bias=False
    ),
    "falcon_sequential": _own(
        "falcon", hidden_size=128, num_hidden_layers=4, num_attention_heads=4, parallel_attn=False, bias=True
    ),
    "falcon_new": _own(
        "falcon",
        hidden_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_kv_heads=2,
        new_decoder_architecture=True,
        bias=False,
    ),
    "opt": _own(
        "opt",
        hidden_size=128,
        ffn_dim=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=MAX_POSITIONS,
        word_embed_proj_dim=128,
        tie_word_embeddings=True,
    ),
    "opt_post_norm": _own(
        "opt",
        hidden_size=128,
        ffn_dim=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=MAX_POSITIONS,
        word_embed_proj_dim=128,
        do_layer_norm_before=False,
        tie_word_embeddings=True,
    ),
    "gpt2": _own("gpt2", n_embd=128, n_layer=4, n_head=4, n_positions=MAX_POSITIONS, tie_word_embeddings=True),
    "gpt_neo": _own(
        "gpt_neo",
        hidden_size=128,
        num_layers=4,
        num_heads=4,
        attention_types=[[["global", "local"], 2]],
        max_position_embeddings=MAX_POSITIONS,
        tie_word_embeddings=True,
    ),
    "gpt_neox": _own(
        "gpt_neox",
        hidden_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=256,
        max_position_embeddings=MAX_POSITIONS,
    ),
    "gpt_neox_sequential": _own(
        "gpt_neox",
        hidden_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=256,
        max_position_embeddings=MAX_POSITIONS,
        use_parallel_residual=False,
    ),
    "gptj": _own("gptj", n_embd=128, n_layer=4, n_head=4, n_positions=MAX_POSITIONS, rotary_dim=16),
    "codegen": _own("codegen", n_embd=128, n_layer=4, n_head=4, n_positions=MAX_POSITIONS, rotary_dim=16),
    "gpt_bigcode": _own(
        "gpt_bigcode", n_embd=128, n_layer=4, n_head=4, n_positions=MAX_POSITIONS, tie_word_embeddings=True
    ),
    "phi": _like_llama("phi", num_key_value_heads=4, head_dim=None),
    "phi3": _like_llama("phi3", head_dim=None, original_max_position_embeddings=MAX_POSITIONS),
    "starcoder2": _like_llama("starcoder2", head_dim=None),
    "hunyuan": _like_llama("hunyuan_v1_dense"),
    "hyperclovax": _like_llama("hyperclovax"),
    "smollm3": _like_llama("smollm3", head_dim=None),
    "nemotron": _like_llama("nemotron"),
    "ernie4_5": _like_llama("ernie4_5"),
    "bloom": Family(
        {"model_type": "bloom", "hidden_size": 128, "n_layer": 4, "n_head": 4, "tie_word_embeddings": True},
        common=False,
        differs="vLLM computes GELU exactly, transformers by its approximation with tanh.",
    ),
    "mpt": _own(
        "mpt",
        d_model=128,
        n_layers=4,
        n_heads=4,
        expansion_ratio=2,
        max_seq_len=MAX_POSITIONS,
        tie_word_embeddings=True,
    ),
    "persimmon": _like_llama("persimmon", num_key_value_heads=None, head_dim=None),
    "arcee": _like_llama("arcee"),
    "apertus": Family(
        {"model_type": "apertus", "head_dim": None},
        differs="vLLM computes the two scalars of the activation in bfloat16.",
    ),
    "seed_oss": _like_llama("seed_oss"),
    "helium": _like_llama("helium"),
    "doge": Family(
        {"model_type": "doge", "head_dim": None},
        differs="A guess: the Transformers backend of vLLM leaves out the model's dynamic mask of attention.",
    ),
    "biogpt": _own(
        "biogpt",
        hidden_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=256,
        max_position_embeddings=MAX_POSITIONS,
    ),
    "bitnet": _like_llama("bitnet", head_dim=None),
    "cwm": _like_llama("cwm", **_WINDOW),
    "jais2": _like_llama("jais2"),
    "mellum": _like_llama("mellum", **_MOE),
    "hrm_text": _like_llama("hrm_text"),
    "nanochat": _like_llama("nanochat", head_dim=None),
    "diffllama": _like_llama("diffllama"),
    "xglm": _own(
        "xglm", d_model=128, ffn_dim=256, num_layers=4, attention_heads=4, max_position_embeddings=MAX_POSITIONS
    ),
    "minicpm3": Family(
        {
            "model_type": "minicpm3",
            "num_key_value_heads": 4,
            "head_dim": None,
            "q_lora_rank": 64,
            "kv_lora_rank": 64,
            "qk_nope_head_dim": 64,
            "qk_rope_head_dim": 32,
            "v_head_dim": 64,
        },
        differs="The model scales its final hidden states before the head, where the reference takes them; the layers "
        "agree with transformers.",
    ),
    "youtu": _like_llama("youtu", q_lora_rank=64, **_MLA),
    # --------------------------------------------------------------------------------------------- mixture of experts
    "mixtral": _like_llama("mixtral", **_LOCAL),
    "qwen2_moe": _like_llama("qwen2_moe", head_dim=None, shared_expert_intermediate_size=128, **_MOE),
    "qwen3_moe": _like_llama("qwen3_moe", **_MOE),
    "olmoe": _like_llama("olmoe", head_dim=None, **_MOE),
    "flex_olmo": _like_llama("flex_olmo", head_dim=None, num_experts=8, num_experts_per_tok=2),
    "gpt_oss": _like_llama(
        "gpt_oss", sliding_window=16, layer_types=["sliding_attention", "full_attention"] * 2, **_LOCAL
    ),
    "deepseek_v2": Family(
        {"model_type": "deepseek_v2", "q_lora_rank": 64, "topk_method": "greedy", **_ROUTED, **_MLA},
        differs=_MLA_ON_CPU,
    ),
    "deepseek_v3": Family(
        {
            "model_type": "deepseek_v3",
            "q_lora_rank": 64,
            "topk_method": "noaux_tc",
            "scoring_func": "sigmoid",
            **_ROUTED,
            **_MLA,
        },
        differs=_MLA_ON_CPU,
    ),
    "deepseek_v32": _like_llama(
        "deepseek_v32", q_lora_rank=64, index_topk=64, index_head_dim=64, index_n_heads=4, **_ROUTED, **_MLA
    ),
    "deepseek_v4": _like_llama("deepseek_v4", **_ROUTED),
    "glm4_moe": _like_llama("glm4_moe", **_ROUTED),
    "glm4_moe_lite": Family({"model_type": "glm4_moe_lite", "q_lora_rank": 64, **_ROUTED, **_MLA}, differs=_MLA_ON_CPU),
    "glm_moe_dsa": _like_llama(
        "glm_moe_dsa", q_lora_rank=64, index_topk=64, index_head_dim=64, index_n_heads=4, **_ROUTED, **_MLA
    ),
    "granitemoe": _like_llama("granitemoe", head_dim=None, residual_multiplier=0.5, **_LOCAL),
    "granitemoe_swa": _like_llama("granitemoe_swa", head_dim=None, **_LOCAL, **_WINDOW),
    "granitemoeshared": _like_llama("granitemoeshared", head_dim=None, shared_intermediate_size=128, **_LOCAL),
    "hunyuan_moe": Family(
        {"model_type": "hunyuan_v1_moe", "num_experts": 8, "moe_topk": 2},
        note="A block of experts that vLLM's Transformers backend cannot fuse: it hands the chosen weights to the "
        "experts, not the logits.",
    ),
    "hy_v3": _like_llama("hy_v3", first_k_dense_replace=1, expert_hidden_dim=64, route_norm=True, **_MOE),
    "hy_v4": _like_llama("hy_v4", **_MOE),
    "ernie4_5_moe": Family(
        {
            "model_type": "ernie4_5_moe",
            "moe_num_experts": 8,
            "moe_k": 2,
            "moe_intermediate_size": 64,
            "moe_num_shared_experts": 1,
        },
        differs=_BIAS_ON_CPU,
    ),
    "phimoe": _like_llama("phimoe", head_dim=None, **_LOCAL),
    "dots1": _like_llama("dots1", **_ROUTED),
    "minimax": _like_llama("minimax", layer_types=["full_attention"] * NUM_LAYERS, **_LOCAL),
    "minimax_linear": _like_llama(
        "minimax", layer_types=["linear_attention", "full_attention"] * 2, block_size=32, **_LOCAL
    ),
    "minimax_m2": _like_llama("minimax_m2", rotary_dim=16, scoring_func="sigmoid", **_LOCAL),
    "afmoe": _like_llama(
        "afmoe", num_dense_layers=1, score_func="sigmoid", route_norm=True, n_group=1, topk_group=1, **_MOE, **_WINDOW
    ),
    "axk1": _like_llama("axk1", q_lora_rank=64, **_ROUTED, **_MLA),
    "cohere2_moe": _like_llama(
        "cohere2_moe", logit_scale=1.0, sliding_window=MAX_POSITIONS, layer_types=_SLIDING, **_MOE
    ),
    "dbrx": _own(
        "dbrx",
        d_model=128,
        n_layers=4,
        n_heads=4,
        max_seq_len=MAX_POSITIONS,
        attn_config={"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 1e4},
        ffn_config={"ffn_hidden_size": 64, "moe_num_experts": 8, "moe_top_k": 2, "hidden_size": 128},
    ),
    "exaone_moe": _like_llama(
        "exaone_moe", num_shared_experts=1, first_k_dense_replace=1, n_group=1, topk_group=1, **_MOE, **_WINDOW
    ),
    "laguna": _like_llama("laguna", **_MOE, **_WINDOW),
    "llama4": _like_llama(
        "llama4_text",
        intermediate_size_mlp=256,
        interleave_moe_layer_step=2,
        num_local_experts=8,
        num_experts_per_tok=1,
    ),
    "longcat_flash": _like_llama(
        "longcat_flash",
        num_layers=2,
        num_hidden_layers=None,
        ffn_hidden_size=256,
        expert_ffn_hidden_size=64,
        q_lora_rank=64,
        moe_topk=2,
        n_routed_experts=8,
        zero_expert_num=4,
        **_MLA,
    ),
    "mimo_v2_flash": _like_llama("mimo_v2_flash", **_ROUTED, **_WINDOW),
    "solar_open": _like_llama("solar_open", **_ROUTED),
    # ----------------------------------------------------------------------------------- state space models and hybrids
    "mamba": _own("mamba", hidden_size=128, num_hidden_layers=4, state_size=16, time_step_rank=8),
    "falcon_mamba": _own("falcon_mamba", hidden_size=128, num_hidden_layers=4, state_size=16, time_step_rank=8),
    "mamba2": _own(
        "mamba2",
        hidden_size=128,
        num_hidden_layers=4,
        state_size=16,
        num_heads=8,
        head_dim=32,
        n_groups=1,
        chunk_size=32,
    ),
    "jamba": _like_llama(
        "jamba",
        attn_layer_period=2,
        attn_layer_offset=1,
        expert_layer_period=2,
        expert_layer_offset=1,
        num_experts=8,
        num_experts_per_tok=2,
        mamba_d_state=16,
        mamba_dt_rank=8,
        use_mamba_kernels=False,
    ),
    "bamba": _like_llama(
        "bamba",
        attn_layer_indices=[1, 3],
        mamba_n_heads=8,
        mamba_d_head=32,
        mamba_n_groups=1,
        mamba_d_state=16,
        mamba_chunk_size=32,
    ),
    "falcon_h1": _like_llama(
        "falcon_h1",
        mamba_d_ssm=256,
        mamba_n_heads=8,
        mamba_d_head=32,
        mamba_n_groups=1,
        mamba_d_state=16,
        mamba_chunk_size=32,
    ),
    "zamba2": _own(
        "zamba2",
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        attention_head_dim=64,
        n_mamba_heads=8,
        mamba_headdim=32,
        mamba_d_state=16,
        mamba_ngroups=1,
        chunk_size=32,
        num_mem_blocks=1,
        max_position_embeddings=MAX_POSITIONS,
        layers_block_type=["mamba", "hybrid", "mamba", "hybrid"],
        tie_word_embeddings=True,
    ),
    "lfm2": Family(
        {
            "model_type": "lfm2",
            "head_dim": None,
            "conv_dim": 128,
            "block_dim": 128,
            "layer_types": ["conv", "full_attention"] * 2,
            "tie_word_embeddings": True,
        },
        differs=_NOT_REPEATING,
    ),
    "lfm2_moe": Family(
        {
            "model_type": "lfm2_moe",
            "head_dim": None,
            "layer_types": ["conv", "full_attention"] * 2,
            "num_dense_layers": 1,
            **_MOE,
        },
        differs=_NOT_REPEATING,
    ),
    "nemotron_h": _like_llama(
        "nemotron_h",
        hybrid_override_pattern="M*-M",
        mamba_num_heads=8,
        mamba_head_dim=32,
        n_groups=1,
        ssm_state_size=16,
        chunk_size=32,
    ),
    "granitemoehybrid": _like_llama(
        "granitemoehybrid",
        head_dim=None,
        layer_types=["mamba", "attention"] * 2,
        shared_intermediate_size=128,
        mamba_n_heads=8,
        mamba_d_head=32,
        mamba_n_groups=1,
        mamba_d_state=16,
        mamba_chunk_size=32,
        residual_multiplier=0.5,
        **_LOCAL,
    ),
    "qwen3_next": Family(
        {
            "model_type": "qwen3_next",
            "shared_expert_intermediate_size": 128,
            **_MOE,
            "num_experts": 16,
            **_LINEAR,
            "linear_key_head_dim": 128,
            "linear_value_head_dim": 128,
        },
        **_BFLOAT16,
    ),
    "qwen3_5": _like_llama("qwen3_5_text", **_LINEAR),
    "qwen3_5_moe": _like_llama(
        "qwen3_5_moe_text", shared_expert_intermediate_size=128, **{**_MOE, "num_experts": 16}, **_LINEAR
    ),
    "kimi_linear": Family({"model_type": "kimi_linear", **_MOE}, engine={"enable_prefix_caching": True}),
    "recurrent_gemma": _like_llama("recurrent_gemma", lru_width=128, attention_window_size=64),
    # ------------------------------------------------------------------------------------------------------ embedding
    "qwen3_embedding": Family({"model_type": "qwen3"}, engine={"runner": "pooling", "convert": "embed"}),
    "llama_embedding": Family({"model_type": "llama"}, engine={"runner": "pooling", "convert": "embed"}),
}
"""Families by the name they have in the table."""

"""Fields of tiny models as transformers spells them, one a family, option."""

import functools

from topd_jax.models.io.families import FAMILIES
from topd_jax.models.io.hub_config import decoder_config

VOCAB = 301
# Tokens of a row at the most.
ROWS = 73

SHAPE = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "rms_norm_eps": 1e-4,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}


def rope(kind, theta=500.0, **rest):
    return {"rope_type": kind, "rope_theta": theta, **rest}


BIASES = {"attention_bias": True}
GEMMA = {
    "query_pre_attn_scalar": 20,
    "sliding_window": 5,
    "tie_word_embeddings": True,
}
OLMO3 = {
    "sliding_window": 5,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
}
LONGROPE = {
    "partial_rotary_factor": 0.5,
    "rope_parameters": rope(
        "longrope", short_factor=[1.1, 1.5], long_factor=[1.4, 9.0]
    ),
}
EXPERTS = {
    "num_experts": 5,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
}

SHARED = {"shared_expert_intermediate_size": 20}
DELTA = {
    "num_hidden_layers": 4,
    "head_dim": 16,
    "rope_parameters": rope("default", partial_rotary_factor=0.5),
    "layer_types": ["linear_attention", "full_attention"] * 2,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 6,
    "linear_value_head_dim": 10,
    "linear_conv_kernel_dim": 3,
}

# name -> (class of transformers, fields)
MODELS = {
    "llama3": (
        "Llama",
        BIASES
        | {
            "mlp_bias": True,
            "rope_parameters": rope(
                "llama3", factor=8.0, low_freq_factor=1.0,
                high_freq_factor=4.0, original_max_position_embeddings=64,
            ),
        },
    ),
    "llama-linear": ("Llama", {"rope_parameters": rope("linear", factor=3.0)}),
    "llama-yarn": (
        "Llama",
        {
            "rope_parameters": rope(
                "yarn", factor=4.0, original_max_position_embeddings=64,
                beta_fast=8.0, beta_slow=2.0,
            )
        },
    ),
    "mistral": ("Mistral", {"sliding_window": 7}),
    "mistral-null": ("Mistral", {"sliding_window": None}),
    "qwen2": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen2-window": (
        "Qwen2",
        {
            "use_sliding_window": True,
            "sliding_window": 6,
            "max_window_layers": 1,
        },
    ),
    "qwen3-window": (
        "Qwen3",
        BIASES
        | {
            "use_sliding_window": True,
            "sliding_window": 6,
            "max_window_layers": 2,
        },
    ),
    "smollm3": ("SmolLM3", BIASES | {"no_rope_layer_interval": 2}),
    "smollm3-window": (
        "SmolLM3",
        {
            "mlp_bias": True,
            "no_rope_layers": [1, 0, 0],
            "use_sliding_window": True,
            "sliding_window": 6,
        },
    ),
    "olmo2": ("Olmo2", BIASES),
    "olmo3": (
        "Olmo3",
        BIASES | OLMO3 | {
            "rope_parameters": {
                "full_attention": rope(
                    "yarn", factor=4.0, original_max_position_embeddings=64,
                ),
                "sliding_attention": rope("default"),
            }
        },
    ),
    "olmoe": (
        "Olmoe",
        BIASES | {
            "num_experts": 5, "num_experts_per_tok": 2,
            "intermediate_size": 24, "norm_topk_prob": True,
        },
    ),
    "ministral": ("Ministral", OLMO3),
    "ministral3": (
        "Ministral3",
        {
            "rope_parameters": rope(
                "yarn", factor=4.0, original_max_position_embeddings=8,
                llama_4_scaling_beta=0.3, mscale=1.2, mscale_all_dim=0.7,
                max_position_embeddings=32,
            )
        },
    ),
    "seed-oss": (
        "SeedOss",
        BIASES | {"attention_out_bias": True, "mlp_bias": True},
    ),
    "phi3": (
        "Phi3",
        {"sliding_window": 7, "partial_rotary_factor": 0.5,
         "original_max_position_embeddings": 4095},
    ),
    "phi3-longrope": (
        "Phi3",
        LONGROPE | {"original_max_position_embeddings": 8,
                    "max_position_embeddings": 128},
    ),
    "phi3-longrope-short": (
        "Phi3",
        LONGROPE | {"original_max_position_embeddings": ROWS,
                    "max_position_embeddings": 128},
    ),
    "mixtral": (
        "Mixtral",
        {"num_local_experts": 5, "intermediate_size": 24, "sliding_window": 9},
    ),
    "qwen2-moe": (
        "Qwen2Moe", EXPERTS | {"shared_expert_intermediate_size": 40}
    ),
    "qwen2-moe-window": (
        "Qwen2Moe",
        EXPERTS
        | {
            "norm_topk_prob": True,
            "qkv_bias": False,
            "use_sliding_window": True,
            "sliding_window": 6,
        },
    ),
    "exaone4": ("Exaone4", OLMO3),
    "exaone4-full": ("Exaone4", {
        "sliding_window": None, "layer_types": ["full_attention"] * 3,
    }),
    "granite": (
        "Granite",
        BIASES | {
            "mlp_bias": True, "attention_multiplier": 0.2, "logits_scaling": 3,
            "embedding_multiplier": 5.0, "residual_multiplier": 0.6,
        },
    ),
    "glm4": ("Glm4", BIASES | {"partial_rotary_factor": 0.75}),
    "glm4-half": ("Glm4", {"attention_bias": False}),
    "gpt-oss": (
        "GptOss",
        {
            "num_local_experts": 5, "num_experts_per_tok": 2,
            "intermediate_size": 32, "hidden_size": 32, "sliding_window": 5,
            "swiglu_limit": 1.5, "swiglu_alpha": 1.3,
            "rope_parameters": rope(
                "yarn", factor=4.0, original_max_position_embeddings=64,
                truncate=False,
            ),
        },
    ),
    "gemma": ("Gemma", BIASES | {"tie_word_embeddings": True}),
    "gemma2": (
        "Gemma2",
        GEMMA
        | {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0},
    ),
    "gemma3": (
        "Gemma3",
        GEMMA
        | {
            "sliding_window_pattern": 3,
            "rope_parameters": {
                "full_attention": rope("linear", 1e5, factor=8.0),
                "sliding_attention": rope("default", 300.0),
            },
        },
    ),
    "gemma3-yarn": (
        "Gemma3",
        GEMMA
        | {
            "sliding_window_pattern": 2,
            "rope_parameters": {
                "full_attention": rope(
                    "yarn", 1e5, factor=4.0, truncate=True,
                    original_max_position_embeddings=64,
                ),
                "sliding_attention": rope("default", 300.0),
            },
        },
    ),
    "gemma3-capped": ("Gemma3", GEMMA | BIASES | {
        "final_logit_softcapping": 3.0,
        "layer_types": ["full_attention", *["sliding_attention"] * 2],
    }),
    "qwen3-next": ("Qwen3Next", EXPERTS | BIASES | DELTA | SHARED),
    "qwen3.5": ("Qwen3_5", DELTA | {"tie_word_embeddings": True}),
    "qwen3.5-moe": ("Qwen3_5Moe", EXPERTS | DELTA | SHARED),
    "moe": ("Qwen3Moe", EXPERTS | BIASES | {"norm_topk_prob": True}),
    "moe-window": (
        "Qwen3Moe",
        EXPERTS | {"use_sliding_window": True, "sliding_window": 6},
    ),
}  # fmt: skip


@functools.cache
def config_of(family):
    """The first one's config, so that no other family could hold it."""
    kind = FAMILIES[family].architecture.removesuffix("ForCausalLM")
    fields = next(more for name, more in MODELS.values() if name == kind)
    fields = SHAPE | fields | {"model_type": family}
    if family == "seed_oss":  # with all biases it would be Llama
        fields["attention_out_bias"] = False
    return decoder_config(fields, where=family)

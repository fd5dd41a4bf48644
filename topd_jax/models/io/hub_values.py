"""What the values of a ``config.json`` may be: one table of kinds and bounds.

The config classes of ``transformers`` check types, some bounds and no sense;
here each value is refused by name, with its bound, before they read it.
"""

from collections.abc import Callable, Mapping

import numpy as np

# Of sizes, which are int32, and of numbers, which are float32.
_LARGEST = np.iinfo(np.int32).max
_LARGEST_NUMBER = float(np.finfo(np.float32).max)

# How an error names the kind, and its test.
_Kind = tuple[str, Callable[[object], bool]]


def is_number(value: object) -> bool:
    """Tell whether a value is an int or float that float32 holds, no bool."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    return abs(value) <= _LARGEST_NUMBER


def _integer(least: int, most: int = _LARGEST) -> _Kind:
    text = f"an integer from {least} to {most}"
    return text, lambda v: type(v) is int and least <= v <= most


def _list_of(what: str, fits: Callable[[object], bool]) -> _Kind:
    return (
        f"a list of {what}, one a layer, or null",
        lambda v: v is None or (isinstance(v, list) and all(map(fits, v))),
    )


def _or_null(kind: _Kind) -> _Kind:
    text, fits = kind
    return f"{text}, or null", lambda v: v is None or fits(v)


_COUNT = _integer(1)
# Of what a decoder names each tensor of.
_FEW = _integer(1, 1000)
_FLAG = "true or false", lambda v: isinstance(v, bool)
_NAME = "a name", lambda v: isinstance(v, str)
_ROPE = _or_null(
    (
        "an object, of objects where it names kinds of layers",
        lambda v: (
            isinstance(v, Mapping)
            and all(
                isinstance(v[kind], Mapping | None)
                for kind in v
                if kind.endswith("_attention")
            )
        ),
    )
)
_SHARE = "a number above 0, at most 1", lambda v: is_number(v) and 0 < v <= 1
_POSITIVE = "a positive number", lambda v: is_number(v) and v > 0
_POSITIVES = (
    "a list of positive numbers",
    lambda v: isinstance(v, list) and all(map(_POSITIVE[1], v)),
)

VALUES: dict[str, _Kind] = {
    "vocab_size": _COUNT,
    "num_hidden_layers": _FEW,
    "hidden_size": _COUNT,
    "intermediate_size": _COUNT,
    "num_attention_heads": _COUNT,
    "num_key_value_heads": _or_null(_COUNT),
    "head_dim": _or_null(_COUNT),
    "rms_norm_eps": _POSITIVE,
    "tie_word_embeddings": _FLAG,
    "attention_bias": _FLAG,
    "attention_out_bias": _FLAG,
    "qkv_bias": _FLAG,
    "mlp_bias": _FLAG,
    "hidden_act": _NAME,
    "hidden_activation": _NAME,
    "query_pre_attn_scalar": _POSITIVE,
    "attention_multiplier": _POSITIVE,
    "embedding_multiplier": _POSITIVE,
    "residual_multiplier": _POSITIVE,
    "logits_scaling": _POSITIVE,
    "attn_logit_softcapping": _or_null(_POSITIVE),
    "final_logit_softcapping": _or_null(_POSITIVE),
    "num_experts": _FEW,
    "num_local_experts": _FEW,
    "num_experts_per_tok": _FEW,
    "moe_intermediate_size": _COUNT,
    "shared_expert_intermediate_size": _COUNT,
    "norm_topk_prob": _FLAG,
    "swiglu_limit": _POSITIVE,
    "swiglu_alpha": _POSITIVE,
    "linear_num_key_heads": _COUNT,
    "linear_num_value_heads": _COUNT,
    "linear_key_head_dim": _COUNT,
    "linear_value_head_dim": _COUNT,
    "linear_conv_kernel_dim": _FEW,
    "full_attention_interval": _COUNT,
    "partial_rotary_factor": _SHARE,
    "rope_parameters": _ROPE,
    "rope_scaling": _ROPE,
    **dict.fromkeys(
        ("factor", "low_freq_factor", "high_freq_factor", "beta_fast",
         "beta_slow", "attention_factor", "llama_4_scaling_beta"),
        _POSITIVE,
    ),
    "original_max_position_embeddings": (
        "a number above 1", lambda v: is_number(v) and v > 1
    ),
    "truncate": _FLAG,
    "short_factor": _POSITIVES,
    "long_factor": _POSITIVES,
    # Qwen2-MoE's files say 0 for none.
    "sliding_window": _or_null(_integer(0)),
    "use_sliding_window": _FLAG,
    "sliding_window_pattern": _COUNT,
    "max_window_layers": _integer(0),
    "layer_types": _list_of("names", _NAME[1]),
    "no_rope_layers": _list_of("0 or 1", lambda v: v in (0, 1)),
    "no_rope_layer_interval": _COUNT,
}  # fmt: skip

# Fields of no family here, which some files spell out; only these values are
# implemented.
FIXED: dict[str, tuple[object, ...]] = {
    "attention_bias": (False, None),
    "attention_dropout": (0,),
    "residual_dropout": (0,),
    "hidden_activation": (None, "gelu_pytorch_tanh"),
    "mlp_bias": (False, None),
    "use_sliding_window": (False, None),
    "partial_rotary_factor": (1, None),
    "rope_interleaved": (False, None),
    "qkv_bias": (False,),
    "use_qk_norm": (True,),
    "reorder_qk_norm": (True,),
    "shared_expert_intermediate_size": (0,),
    "attn_output_gate": (True,),
    "use_mrope": (False,),
    "full_attn_mod": (1,),
    "interpolate_factor": (1,),
    "lm_head_bias": (False,),
    "mamba_ssm_dtype": ("float32",),
    "mlp_only_layers": ([],),
    "is_llama_config": (True, None),
    "add_cross_attention": (False, None),
    "attn_logit_softcapping": (None,),
    "final_logit_softcapping": (None,),
    "per_layer_config": (None, {}),
    "pruned_heads": (None, {}),
    "quantization_config": (None,),
}

# Fields that do not change the logits; those about windows where the family
# has none.
HARMLESS = {
    "architectures", "torch_dtype", "dtype", "transformers_version",
    "_name_or_path", "bos_token_id", "eos_token_id", "pad_token_id",
    "unk_token_id", "sep_token_id", "use_cache", "pretraining_tp",
    "max_position_embeddings", "initializer_range", "sliding_window",
    "max_window_layers", "output_hidden_states", "output_attentions",
    "return_dict", "chunk_size_feed_forward", "id2label", "label2id",
    "problem_type", "is_decoder", "tie_encoder_decoder", "torchscript",
    "use_bfloat16", "tie_last_hidden_states", "cross_attention_hidden_size",
    "_attn_implementation", "attn_implementation",
    "_attn_implementation_autoset", "transformers.js_config",
    "task_specific_params", "finetuning_task", "tokenizer_class",
    "max_length", "min_length", "do_sample", "temperature", "top_k", "top_p",
    "typical_p", "repetition_penalty", "num_beams", "unsloth_version",
    "unsloth_fixed", "cache_implementation", "output_router_logits",
    "router_aux_loss_coef", "_sliding_window_pattern", "auto_map",
    "experts_per_token", "initial_context_length", "mtp_num_hidden_layers",
    "mtp_use_dedicated_embeddings", "sliding_window_size",
}  # fmt: skip


def wrong_value(name: str, value: object) -> list[str]:
    """Return why a field cannot have a value: one line, or none.

    Args:
      name: of the field; any value fits one that the table does not know.
      value: as JSON gives it.
    """
    text, fits = VALUES.get(name, ("", lambda v: True))
    if not fits(value):
        return [f"{name}={value!r:.60} must be {text}"]
    inner = value if isinstance(value, Mapping) else {}
    return [
        f"{name}.{problem}"
        for part in ("short_factor", "long_factor")
        if part in inner
        for problem in wrong_value(part, inner[part])
    ]

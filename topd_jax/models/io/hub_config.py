"""The ``config.json`` of a model directory, read strictly and written.

A field that the reference implementation reads and this decoder does not is
refused with its value, and so is a field nobody has heard of, because a field
silently ignored (Tunix's ``rope_theta``) is a different model. Ours.
"""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

from topd_jax.models.config import DecoderConfig
from topd_jax.models.io.families import FAMILIES, Family, Get, family_of
from topd_jax.models.io.hub_layers import (
    read_dense,
    read_no_rope,
    read_windows,
    write_layers,
)
from topd_jax.models.io.hub_rope import read_rope, write_rope

_REQUIRED = {
    "vocab_size": "vocab_size",
    "num_hidden_layers": "layers",
    "hidden_size": "width",
    "num_attention_heads": "heads",
    "intermediate_size": "mlp_width",
}

_OPTIONAL = {
    "model_type", "num_key_value_heads", "head_dim", "rms_norm_eps",
    "tie_word_embeddings", "rope_theta", "rope_scaling", "rope_parameters",
}  # fmt: skip

_ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
}

# What every family takes where neither the file nor its own row says more.
_DEFAULTS = {
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
    "rope_theta": 10_000.0,
    "max_position_embeddings": 32_768,
    "attention_bias": False,
    "mlp_bias": False,
    "norm_topk_prob": False,
}

# Fields that change the network: where the family does not read them, only
# these values are implemented.
_FIXED: dict[str, tuple[object, ...]] = {
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "attention_dropout": (0, None),
    "use_sliding_window": (False, None),
    "partial_rotary_factor": (1, None),
    "rope_interleaved": (False, None),
    "is_llama_config": (True, None),
    "is_encoder_decoder": (False, None),
    "add_cross_attention": (False, None),
    "use_bidirectional_attention": (False, None),
    "attn_logit_softcapping": (None,),
    "final_logit_softcapping": (None,),
    "per_layer_config": (None, {}),
    "pruned_heads": (None, {}),
    "quantization_config": (None,),
}

# Fields that do not change the logits; those about windows where the family
# has none.
_HARMLESS = {
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
    "router_aux_loss_coef", "_sliding_window_pattern",
}  # fmt: skip


# What the values of ``Family.reads`` must be.
_SWITCHES = {"attention_bias", "mlp_bias", "norm_topk_prob"}
_COUNTS = {"num_experts", "num_experts_per_tok", "moe_intermediate_size"}
_CAPS = {"attn_logit_softcapping", "final_logit_softcapping"}


def decoder_config(
    fields: Mapping[str, object],
    *,
    where: str,
    ignore: Iterable[str] = (),
    dtype: str = "float32",
    param_dtype: str = "float32",
    remat: str = "none",
    unroll: int = 1,
) -> DecoderConfig:
    """Reads the fields of a ``config.json``.

    Args:
      fields: the parsed file; RoPE spelt ``rope_theta`` / ``rope_scaling`` or
        ``rope_parameters`` (transformers 5).
      where: the file, for errors.
      ignore: fields of no consequence that this reader does not know.
      dtype: compute dtype.
      param_dtype: dtype in which parameters are kept.
      remat: see :class:`DecoderConfig`.
      unroll: see :class:`DecoderConfig`.

    Returns:
      The decoder's shape.

    Raises:
      ValueError: listing every missing, unsupported and unknown field.
    """
    family = family_of(fields.get("model_type"), where)
    fields = dict(fields)
    if "num_local_experts" in fields and "num_experts" in family.reads:
        fields.setdefault("num_experts", fields.pop("num_local_experts"))
    defaults = _DEFAULTS | family.defaults

    def get(name: str) -> Any:
        return fields.get(name, defaults.get(name))

    problems = _problems(fields, family, get, frozenset(ignore))
    rope = read_rope(fields, family, get, problems)
    if problems:
        raise ValueError(f"{where} cannot be read:\n  " + "\n  ".join(problems))
    options = rope | _layers(get, family, problems) | _options(get, family)
    if problems:
        raise ValueError(f"{where} cannot be read:\n  " + "\n  ".join(problems))
    return DecoderConfig(
        **options,
        dtype=dtype,
        param_dtype=param_dtype,
        remat=remat,
        unroll=unroll,
    )


def config_json(
    config: DecoderConfig,
    model_type: str | None = None,
    extra: Mapping[str, object] | None = None,
    like: str | None = None,
) -> dict[str, object]:
    """The ``config.json`` that transformers reads; inverse of the above.

    Args:
      config: the decoder's shape.
      model_type: a family; None takes the first that can hold the decoder.
      extra: fields that do not change the logits (special ids, lengths).
      like: the family to take before others where ``model_type`` is None.

    Returns:
      The fields. RoPE is spelt in both ways, for transformers 4 and 5.

    Raises:
      ValueError: where the family cannot hold this decoder, or ``extra``
        would change the network.
    """
    harmful = sorted(set(extra or ()) - _HARMLESS)
    if harmful:
        raise ValueError(
            f"extra={harmful} would change, or is not known to leave alone, "
            "what the decoder computes; only fields such as bos_token_id or "
            "max_position_embeddings may be given"
        )
    if model_type is None:
        names = sorted(FAMILIES, key=lambda name: name != like)
        fitting = [n for n in names if not _lost(config, FAMILIES[n])]
        if not fitting:
            raise ValueError(
                f"no family holds this decoder: {config}; the nearest, "
                f"model_type='llama', loses {_lost(config, FAMILIES['llama'])}"
            )
        model_type = fitting[0]
    family = family_of(model_type, "model_type")
    if lost := _lost(config, family):
        raise ValueError(
            f"a decoder with {lost} cannot be written as "
            f"model_type={model_type!r}; leave model_type out"
        )
    if family.heads_divide_width and config.width % config.heads:
        raise ValueError(
            f"width={config.width} must be divisible by heads={config.heads}: "
            f"transformers refuses other {family.architecture} configs"
        )
    return _fields(config, family) | dict(extra or {})


def _fields(config: DecoderConfig, family: Family) -> dict[str, object]:
    activations = {ours: theirs for theirs, ours in _ACTIVATIONS.items()}
    activations |= {"silu": "silu", "gelu_tanh": "gelu_pytorch_tanh"}
    fields: dict[str, object] = {
        "architectures": [family.architecture],
        "model_type": family.model_type,
        **{theirs: getattr(config, ours) for theirs, ours in _REQUIRED.items()},
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_dim,
        family.activation: activations[config.activation],
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tied,
    }
    for theirs, ours in family.reads.items():
        fields[theirs] = getattr(config, ours[0])
    if "query_pre_attn_scalar" in fields and config.query_scalar is None:
        fields["query_pre_attn_scalar"] = config.head_dim
    return fields | write_layers(config, family) | write_rope(config, family)


def _lost(config: DecoderConfig, family: Family) -> str:
    """The fields that would come back otherwise, as "name=value, …"."""
    try:
        back = decoder_config(_fields(config, family), where="")
    except ValueError as error:
        return str(error)
    want, got = _effective(config), _effective(back)
    return ", ".join(
        f"{name}={value!r}"
        for name, value in dataclasses.asdict(want).items()
        if dataclasses.asdict(got)[name] != value
    )


def _effective(config: DecoderConfig) -> DecoderConfig:
    """The same arithmetic, spelt in one way."""
    none = {} if any(config.sliding) else {"window": None}
    if not any(config.sliding) or config.local_rope_theta == config.rope_theta:
        none["local_rope_theta"] = None
    if not config.experts:
        none |= {"experts_per_token": 0, "expert_width": 0}
        none |= {"renormalise": False, "dense": ()}
    return dataclasses.replace(
        config,
        **none,
        query_scalar=config.query_scalar or config.head_dim,
        dtype="float32",
        param_dtype="float32",
        remat="none",
        unroll=1,
    )


def _layers(get: Get, family: Family, problems: list[str]) -> dict[str, object]:
    no_rope = read_no_rope(get, family, problems)
    return (
        no_rope
        | read_windows(get, family, no_rope.get("no_rope", ()), problems)
        | read_dense(get, family, problems)
    )


def _options(get: Get, family: Family) -> dict[str, object]:
    options: dict[str, object] = {
        ours: get(theirs) for theirs, ours in _REQUIRED.items()
    }
    heads, width = options["heads"], options["width"]
    options |= {
        "kv_heads": get("num_key_value_heads") or heads,
        "head_dim": get("head_dim") or width // heads,
        "norm_eps": float(get("rms_norm_eps")),
        "tied": bool(get("tie_word_embeddings")),
        "activation": _ACTIVATIONS[get(family.activation)],
    }
    for theirs, ours in family.reads.items():
        value = get(theirs)
        options |= dict.fromkeys(
            ours, bool(value) if theirs in _SWITCHES else value
        )
    return options | dict(family.options)


def _problems(
    fields: Mapping[str, object], family: Family, get: Get, ignore: frozenset
) -> list[str]:
    problems = []
    for name in (*_REQUIRED, "num_key_value_heads", "head_dim"):
        value = fields.get(name)
        optional = name not in _REQUIRED and value is None
        if not optional and not (_integer(value) and value > 0):
            problems.append(f"{name}={value!r} must be a positive integer")
    if get(family.activation) not in _ACTIVATIONS:
        problems.append(
            f"{family.activation}={get(family.activation)!r} is not "
            f"supported, only {', '.join(_ACTIVATIONS)}"
        )
    problems += [
        f"{name}={get(name)!r} {fault}"
        for name in family.reads
        if (fault := _fault(name, get(name)))
    ]
    read = _read_by(family)
    known = _OPTIONAL | _HARMLESS | ignore | set(_REQUIRED) | read
    for name, value in fields.items():
        if name in _FIXED and name not in ignore | read:
            if value not in _FIXED[name]:
                problems.append(
                    f"{name}={value!r} is not supported, only "
                    f"{_FIXED[name][0]!r}"
                )
        elif name == "hidden_act" and value == fields.get(family.activation):
            continue  # Gemma's files spell it twice
        elif name not in known:
            problems.append(
                f"{name}={value!r} is not known; if the model's reference "
                "does not read it, delete it from the file or pass "
                f"ignore=({name!r},)"
            )
    return problems


def _read_by(family: Family) -> set[str]:
    """The fields that this family reads, beside those that all do."""
    read = {family.activation, "layer_types", *family.reads}
    read |= set(family.defaults)
    if family.switched:
        read.add("use_sliding_window")
    if family.no_rope:
        read.add("no_rope_layers")
    if "num_experts" in family.reads:
        read.add("mlp_only_layers")
    return read


def _fault(name: str, value: object) -> str:
    """What is wrong with a value of ``Family.reads``; "" if nothing is."""
    if name in _SWITCHES:
        good, kind = value is None or isinstance(value, bool), "true or false"
    elif name in _COUNTS:
        good, kind = _integer(value) and value >= 0, "an integer, 0 or more"
    else:
        number = isinstance(value, int | float) and value is not True
        good, kind = number and value > 0, "a positive number"
        if name in _CAPS:
            good, kind = good or value is None, kind + " or null"
    return "" if good else f"must be {kind}"


def _integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)

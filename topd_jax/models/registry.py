"""The model families, as data: how each spells its config and its weights.

A family is one row of :data:`FAMILIES`; a parameter is one row of
:data:`WEIGHTS`. Reading a config is strict (ours): a field that the reference
implementation reads and this decoder does not is refused with its value, and
so is a field nobody has heard of, because a field silently ignored (Tunix's
``rope_theta``) is a different model.
"""

import dataclasses
import math
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from topd_jax.models.config import DecoderConfig


@dataclasses.dataclass(frozen=True)
class Family:
    """One ``model_type``.

    Attributes:
      model_type: as ``config.json`` (and ``general.architecture``) spells it.
      architecture: the class that transformers loads it with.
      qk_norm: queries and keys are normalised a head.
      kv_heads: where the config is silent; None means as many as heads.
      head_dim: where the config is silent; None means width / heads.
      gguf_permuted: llama.cpp reorders the rows of q and k in its files.
    """

    model_type: str
    architecture: str
    qk_norm: bool
    kv_heads: int | None = None
    head_dim: int | None = None
    gguf_permuted: bool = False


FAMILIES: dict[str, Family] = {
    "llama": Family("llama", "LlamaForCausalLM", False, gguf_permuted=True),
    "qwen3": Family("qwen3", "Qwen3ForCausalLM", True, 32, 128),
}


class Weight(NamedTuple):
    """How files spell one parameter.

    Attributes:
      hub: name in safetensors files, ``{}`` for the layer.
      gguf: name in GGUF files.
      inputs: leading dimensions (after the layer's) that a linear map reads;
        files hold it as [out, in]. 0: files hold it as it is.
    """

    hub: str
    gguf: str
    inputs: int


WEIGHTS: dict[str, Weight] = {
    name: Weight(f"{hub}.weight", f"{gguf}.weight", inputs)
    for name, hub, gguf, inputs in (
        ("embedding", "model.embed_tokens", "token_embd", 0),
        (
            "attention_norm",
            "model.layers.{}.input_layernorm",
            "blk.{}.attn_norm",
            0,
        ),
        ("q", "model.layers.{}.self_attn.q_proj", "blk.{}.attn_q", 1),
        ("k", "model.layers.{}.self_attn.k_proj", "blk.{}.attn_k", 1),
        ("v", "model.layers.{}.self_attn.v_proj", "blk.{}.attn_v", 1),
        ("o", "model.layers.{}.self_attn.o_proj", "blk.{}.attn_output", 2),
        ("q_norm", "model.layers.{}.self_attn.q_norm", "blk.{}.attn_q_norm", 0),
        ("k_norm", "model.layers.{}.self_attn.k_norm", "blk.{}.attn_k_norm", 0),
        (
            "mlp_norm",
            "model.layers.{}.post_attention_layernorm",
            "blk.{}.ffn_norm",
            0,
        ),
        ("gate", "model.layers.{}.mlp.gate_proj", "blk.{}.ffn_gate", 1),
        ("up", "model.layers.{}.mlp.up_proj", "blk.{}.ffn_up", 1),
        ("down", "model.layers.{}.mlp.down_proj", "blk.{}.ffn_down", 1),
        ("final_norm", "model.norm", "output_norm", 0),
        ("output", "lm_head", "output", 0),
    )
}

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

# Fields that change the network: only these values are implemented.
_FIXED: dict[str, tuple[object, ...]] = {
    "hidden_act": ("silu",),
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "attention_dropout": (0, None),
    "use_sliding_window": (False, None),
    "partial_rotary_factor": (1, None),
    "rope_interleaved": (False, None),
    "is_llama_config": (True, None),
    "is_encoder_decoder": (False, None),
    "add_cross_attention": (False, None),
    "per_layer_config": (None, {}),
    "pruned_heads": (None, {}),
    "quantization_config": (None,),
}

# Fields that do not change the logits. ``sliding_window`` and
# ``max_window_layers`` are read only where ``use_sliding_window`` is true.
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
    "unsloth_fixed",
}  # fmt: skip


def family_of(model_type: object, where: str) -> Family:
    """The family of a ``model_type``.

    Args:
      model_type: as the file spells it.
      where: the file, for the error.

    Returns:
      The row of :data:`FAMILIES`.

    Raises:
      ValueError: listing the supported families.
    """
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise ValueError(
            f"{where}: model_type={model_type!r} is not supported; supported: "
            f"{', '.join(sorted(FAMILIES))}"
        )
    return FAMILIES[model_type]


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
    problems = _problems(fields, frozenset(ignore))
    theta = _rope_theta(fields, problems)
    if problems:
        raise ValueError(f"{where} cannot be read:\n  " + "\n  ".join(problems))
    shape = {ours: fields[theirs] for theirs, ours in _REQUIRED.items()}
    heads, width = shape["heads"], shape["width"]
    kv_heads = fields.get("num_key_value_heads", family.kv_heads) or heads
    head_dim = fields.get("head_dim", family.head_dim) or width // heads
    return DecoderConfig(
        **shape,
        kv_heads=kv_heads,
        head_dim=head_dim,
        rope_theta=theta,
        norm_eps=float(fields.get("rms_norm_eps", 1e-6)),
        tied=bool(fields.get("tie_word_embeddings", False)),
        qk_norm=family.qk_norm,
        dtype=dtype,
        param_dtype=param_dtype,
        remat=remat,
        unroll=unroll,
    )


def config_json(
    config: DecoderConfig,
    model_type: str | None = None,
    extra: Mapping[str, object] | None = None,
) -> dict[str, object]:
    """The ``config.json`` that transformers reads; inverse of the above.

    Args:
      config: the decoder's shape.
      model_type: a family; None takes the one that ``qk_norm`` implies.
      extra: fields that do not change the logits (special ids, lengths).

    Returns:
      The fields. RoPE is spelt in both ways, for transformers 4 and 5.

    Raises:
      ValueError: where the family cannot hold this decoder, or ``extra``
        would change the network.
    """
    if model_type is None:
        model_type = "qwen3" if config.qk_norm else "llama"
    family = family_of(model_type, "model_type")
    if family.qk_norm != config.qk_norm:
        raise ValueError(
            f"a decoder with qk_norm={config.qk_norm} cannot be written as "
            f"model_type={model_type!r}; leave model_type out"
        )
    if model_type == "llama" and config.width % config.heads:
        raise ValueError(
            f"width={config.width} must be divisible by heads={config.heads}: "
            "transformers refuses other Llama configs"
        )
    harmful = sorted(set(extra or ()) - _HARMLESS)
    if harmful:
        raise ValueError(
            f"extra={harmful} would change, or is not known to leave alone, "
            "what the decoder computes; only fields such as bos_token_id or "
            "max_position_embeddings may be given"
        )
    fields = {
        "architectures": [family.architecture],
        "model_type": model_type,
        **{theirs: getattr(config, ours) for theirs, ours in _REQUIRED.items()},
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tied,
        "attention_bias": False,
        "rope_theta": config.rope_theta,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": config.rope_theta,
        },
    }
    return fields | dict(extra or {})


def file_shape(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape that files give one layer of a parameter.

    Args:
      name: of the parameter.
      shape: of one layer, the stacking dimension left out.

    Returns:
      (out, in) for linear maps, else ``shape``.
    """
    inputs = WEIGHTS[name].inputs
    if not inputs:
        return shape
    return math.prod(shape[inputs:]), math.prod(shape[:inputs])


def _problems(fields: Mapping[str, object], ignore: frozenset) -> list[str]:
    problems = []
    for name in (*_REQUIRED, "num_key_value_heads", "head_dim"):
        value = fields.get(name)
        optional = name not in _REQUIRED and value is None
        good = isinstance(value, int) and not isinstance(value, bool)
        if not optional and not (good and value > 0):
            problems.append(f"{name}={value!r} must be a positive integer")
    known = _OPTIONAL | _HARMLESS | ignore | set(_REQUIRED)
    for name, value in fields.items():
        if name in _FIXED and name not in ignore:
            if value not in _FIXED[name]:
                problems.append(
                    f"{name}={value!r} is not supported, only "
                    f"{_FIXED[name][0]!r}"
                )
        elif name == "layer_types":
            if value is not None and set(value) != {"full_attention"}:
                problems.append(
                    f"layer_types={sorted(set(value))} is not supported, only "
                    "'full_attention' throughout"
                )
        elif name not in known:
            problems.append(
                f"{name}={value!r} is not known; if the model's reference "
                "does not read it, delete it from the file or pass "
                f"ignore=({name!r},)"
            )
    return problems


def _rope_theta(fields: Mapping[str, object], problems: list[str]) -> float:
    """One theta from either spelling; every other RoPE variant refused."""
    found = {}
    if fields.get("rope_theta") is not None:
        found["rope_theta"] = fields["rope_theta"]
    for name in ("rope_scaling", "rope_parameters"):
        rope = fields.get(name)
        if rope is None:
            continue
        if not isinstance(rope, Mapping):
            problems.append(f"{name}={rope!r} must be an object")
            continue
        if "rope_theta" in rope:
            found[f"{name}.rope_theta"] = rope["rope_theta"]
        allowed = {"rope_type": "default", "type": "default"}
        allowed |= {"partial_rotary_factor": 1}
        odd = {k: v for k, v in rope.items() if k != "rope_theta"}
        if any(allowed.get(k) != v for k, v in odd.items()):
            problems.append(
                f"{name}={dict(rope)} is not supported, only "
                "{'rope_type': 'default', 'rope_theta': ...}"
            )
    bad = {k: v for k, v in found.items() if not _positive(v)}
    if bad:
        problems.append(f"{bad} must be a positive number")
    elif len(set(found.values())) > 1:
        problems.append(f"{found} disagree; keep one of them")
    theta = next(iter(found.values()), 10_000.0)
    return float(theta) if _positive(theta) else math.nan


def _positive(value: object) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and value > 0

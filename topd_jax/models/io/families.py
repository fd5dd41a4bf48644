"""The model families, as data: how each spells its config and its weights.

A family is one row of :data:`FAMILIES`; a parameter is one row of
:data:`WEIGHTS`. What each row composes:

=============  ==============================================================
model_type     beside pre-norms, rotary positions, grouped heads, gated SiLU
=============  ==============================================================
llama          Llama 2 and 3.x, SmolLM2: biases; linear, llama3, yarn scaling
mistral        sliding window in every layer, or null
qwen2          Qwen2, Qwen2.5: biases of q, k and v; sliding window
qwen3          norm of each head's q and k; biases; sliding window
qwen3_moe      the same with experts in all layers
smollm3        SmolLM3: layers without rotation; biases; sliding window
olmo2          norms after and not before; norm of q and k over all heads
gemma2         norms before and after, scaling by 1 + w; scaled embedding;
               tanh-GELU; soft-capped scores and logits; every second layer
               slides
gemma3_text    the same without soft-capped scores; norm of q and k; five of
               six layers slide, with a rotary base of their own
=============  ==============================================================

Defaults, and which layers slide, are those of the families' config classes in
``transformers``; see :mod:`topd_jax.models.io.hub_config`.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from topd_jax.models.config import LORA_TARGETS, DecoderConfig
from topd_jax.models.parameters import LORA_A, LORA_B


@dataclasses.dataclass(frozen=True)
class Family:
    """One ``model_type``.

    Attributes:
      model_type: as ``config.json`` (and ``general.architecture``) spells it.
      architecture: the class that transformers loads it with.
      options: fields of :class:`DecoderConfig` that the family fixes.
      reads: fields beside the common ones -> fields of the decoder that they
        set, with the name given.
      activation: the field that names it.
      local_rope: sliding layers have a rotary base of their own.
      gguf: its ``general.architecture`` in GGUF files; "": not read from them.
      gguf_permuted: llama.cpp reorders the rows of q and k in its files.
    """

    model_type: str
    architecture: str
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    reads: Mapping[str, tuple[str, ...]] = dataclasses.field(
        default_factory=dict
    )
    activation: str = "hidden_act"
    local_rope: bool = False
    gguf: str = ""
    gguf_permuted: bool = False


_ALL_BIASES = {"attention_bias": ("attention_bias", "output_bias")}
_MLP_BIAS = {"mlp_bias": ("mlp_bias",)}
_GEMMA = {
    "post_norms": True,
    "centered_norms": True,
    "scaled_embedding": True,
}
_GEMMA_READS = _ALL_BIASES | {
    "query_pre_attn_scalar": ("query_scalar",),
    "final_logit_softcapping": ("final_softcap",),
}
_EXPERTS = {
    "num_experts": ("experts",),
    "num_experts_per_tok": ("experts_per_token",),
    "moe_intermediate_size": ("expert_width",),
    "norm_topk_prob": ("renormalize",),
}

FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (
        Family(
            "llama", "LlamaForCausalLM",
            reads=_ALL_BIASES | _MLP_BIAS,
            gguf="llama", gguf_permuted=True,
        ),
        Family("mistral", "MistralForCausalLM"),
        Family(
            "qwen2", "Qwen2ForCausalLM",
            options={"attention_bias": True}, gguf="qwen2",
        ),
        Family(
            "qwen3", "Qwen3ForCausalLM",
            options={"qk_norm": True}, reads=_ALL_BIASES, gguf="qwen3",
        ),
        Family(
            "qwen3_moe", "Qwen3MoeForCausalLM",
            options={"qk_norm": True},
            reads=_ALL_BIASES | _EXPERTS, gguf="qwen3moe",
        ),
        Family(
            "smollm3", "SmolLM3ForCausalLM", reads=_ALL_BIASES | _MLP_BIAS
        ),
        Family(
            "olmo2", "Olmo2ForCausalLM",
            options={
                "pre_norms": False, "post_norms": True, "wide_qk_norm": True
            },
            reads=_ALL_BIASES,
        ),
        Family(
            "gemma2", "Gemma2ForCausalLM",
            options=_GEMMA, activation="hidden_activation",
            reads=_GEMMA_READS
            | {"attn_logit_softcapping": ("attention_softcap",)},
        ),
        Family(
            "gemma3_text", "Gemma3ForCausalLM",
            options=_GEMMA | {"qk_norm": True}, activation="hidden_activation",
            reads=_GEMMA_READS, local_rope=True,
        ),
    )
}  # fmt: skip


class Weight(NamedTuple):
    """How safetensors files spell one parameter.

    Attributes:
      hub: its name, ``{}`` for the layer, then the expert. GGUF files have
        names of their own, which the ``gguf`` package maps to these.
      inputs: leading dimensions (after the layer's and the expert's) that a
        linear map reads; files hold it as [out, in]. 0: files hold it flat.
      expert: the first dimension after the layer's counts experts.
    """

    hub: str
    inputs: int
    expert: bool = False


_LAYER = "model.layers.{}."

WEIGHTS: dict[str, Weight] = {
    "embedding": Weight("model.embed_tokens.weight", 0),
    "final_norm": Weight("model.norm.weight", 0),
    "output": Weight("lm_head.weight", 0),
} | {
    name: Weight(_LAYER + hub, inputs, ".experts." in hub)
    for name, hub, inputs in (
        ("attention_norm", "input_layernorm.weight", 0),
        ("attention_post_norm", "post_attention_layernorm.weight", 0),
        ("q", "self_attn.q_proj.weight", 1),
        ("k", "self_attn.k_proj.weight", 1),
        ("v", "self_attn.v_proj.weight", 1),
        ("o", "self_attn.o_proj.weight", 2),
        ("q_bias", "self_attn.q_proj.bias", 0),
        ("k_bias", "self_attn.k_proj.bias", 0),
        ("v_bias", "self_attn.v_proj.bias", 0),
        ("o_bias", "self_attn.o_proj.bias", 0),
        ("q_norm", "self_attn.q_norm.weight", 0),
        ("k_norm", "self_attn.k_norm.weight", 0),
        ("mlp_norm", "post_attention_layernorm.weight", 0),
        ("mlp_post_norm", "post_feedforward_layernorm.weight", 0),
        ("gate", "mlp.gate_proj.weight", 1),
        ("up", "mlp.up_proj.weight", 1),
        ("down", "mlp.down_proj.weight", 1),
        ("gate_bias", "mlp.gate_proj.bias", 0),
        ("up_bias", "mlp.up_proj.bias", 0),
        ("down_bias", "mlp.down_proj.bias", 0),
        ("router", "mlp.gate.weight", 1),
        ("expert_gate", "mlp.experts.{}.gate_proj.weight", 1),
        ("expert_up", "mlp.experts.{}.up_proj.weight", 1),
        ("expert_down", "mlp.experts.{}.down_proj.weight", 1),
    )
}

# As PEFT names them: lora_A [r, in] and lora_B [out, r].
ADAPTER_PREFIX = "base_model.model."
for _name in LORA_TARGETS:
    _module = ADAPTER_PREFIX + WEIGHTS[_name].hub.removesuffix("weight")
    _inputs = WEIGHTS[_name].inputs
    WEIGHTS[_name + LORA_A] = Weight(f"{_module}lora_A.weight", _inputs)
    WEIGHTS[_name + LORA_B] = Weight(f"{_module}lora_B.weight", 1)


def hub_name(config: DecoderConfig, name: str) -> str:
    """Return how files of this decoder spell a parameter.

    Args:
      config: the decoder's shape.
      name: of the parameter.

    Returns:
      Its name, as in :class:`Weight`.
    """
    if name == "mlp_norm" and config.post_norms:
        # With norms on both sides the hub calls the feed-forward's first so.
        return _LAYER + "pre_feedforward_layernorm.weight"
    return WEIGHTS[name].hub


def family_of(model_type: object, where: str, *, gguf: bool = False) -> Family:
    """Return the family of a ``model_type``.

    Args:
      model_type: as the file spells it.
      where: the file, for the error.
      gguf: whether the file is a GGUF file.

    Returns:
      The row of :data:`FAMILIES`.

    Raises:
      ValueError: listing the supported families.
    """
    known = {
        row.gguf if gguf else row.model_type: row
        for row in FAMILIES.values()
        if row.gguf or not gguf
    }
    if not isinstance(model_type, str) or model_type not in known:
        raise ValueError(
            f"{where}: model_type={model_type!r} is not supported; supported: "
            f"{', '.join(sorted(known))}"
        )
    return known[model_type]


def file_dims(name: str, ndim: int) -> tuple[tuple[int, ...], ...]:
    """Return which dimensions of a parameter each of its tensor's covers.

    Args:
      name: of the parameter.
      ndim: of one layer, the stacking dimensions left out.

    Returns:
      The outputs, then the inputs of linear maps; all of them, flat, for
      biases and norms over heads; else one each.
    """
    inputs, dims = WEIGHTS[name].inputs, tuple(range(ndim))
    if inputs:
        return dims[inputs:], dims[:inputs]
    if name in ("embedding", "output"):
        return dims[:1], dims[1:]
    return (dims,)


def file_shape(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape that files give one layer (and expert).

    Args:
      name: of the parameter.
      shape: of one layer, the stacking dimensions left out.

    Returns:
      (out, in) for linear maps, flat for biases and norms over heads, else
      ``shape``.
    """
    return tuple(
        math.prod(shape[d] for d in dims)
        for dims in file_dims(name, len(shape))
    )

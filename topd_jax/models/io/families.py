"""The model families, as data: how each spells its config and its tensors.

A family is one row of :data:`FAMILIES`. Defaults, and which layers slide, are
those of the families' config classes in ``transformers``; see
:mod:`topd_jax.models.io.hub_config`. Which models each is, in words, stands in
the README of the models room. What a file of any family names its tensors is
in :mod:`topd_jax.models.io.tensors`.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple


class Fused(NamedTuple):
    """A tensor that holds several parameters of a layer.

    Attributes:
      hub: its name, after the layer's.
      parameters: whose outputs it holds, one after another.
      experts: its first dimension counts experts.
      interleaved: outputs of the parameters take turns instead.
      turned: it is [in, out].
    """

    hub: str
    parameters: tuple[str, ...]
    experts: bool = False
    interleaved: bool = False
    turned: bool = False


@dataclasses.dataclass(frozen=True)
class Family:
    """One ``model_type``.

    Attributes:
      model_type: as ``config.json`` (and ``general.architecture``) spells it.
      architecture: the class that transformers loads it with.
      options: fields of :class:`DecoderConfig` that the family fixes.
      reads: fields beside the common ones -> fields of the decoder that they
        set, with the name given; none where they only change how others are
        read.
      activation: the field that names it.
      local_rope: sliding layers have a rotary base of their own, which older
        files give in this field; "": they have not.
      growing_query: a field of its RoPE scales queries by their position.
      full_unturned: where layers slide, the others have no rotary positions.
      names: parameter -> its tensor, after the layer's name, where others
        name it differently.
      fused: tensors that hold several parameters.
      packed: the ``quant_method`` of files whose weights are expanded; "":
        quantized files are refused.
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
    local_rope: str = ""
    growing_query: bool = False
    full_unturned: bool = False
    names: Mapping[str, str] = dataclasses.field(default_factory=dict)
    fused: tuple[Fused, ...] = ()
    packed: str = ""
    gguf: str = ""
    gguf_permuted: bool = False


_ALL_BIASES = {"attention_bias": ("attention_bias", "output_bias")}
_MLP_BIAS = {"mlp_bias": ("mlp_bias",)}
_NORMS_AFTER = {"pre_norms": False, "post_norms": True}
_GEMMA = {"centered_norms": True, "scaled_embedding": True}
_GEMMA_READS = _ALL_BIASES | {
    "query_pre_attn_scalar": ("query_scalar",),
    "final_logit_softcapping": ("final_softcap",),
}
_ROUTED = {
    "num_experts": ("experts",),
    "num_experts_per_tok": ("experts_per_token",),
    "norm_topk_prob": ("renormalize",),
}
_EXPERTS = _ROUTED | {"moe_intermediate_size": ("expert_width",)}
# The dense width of other families.
_EXPERT_WIDTH = {"intermediate_size": ("expert_width", "mlp_width")}
_PARTIAL = {"partial_rotary_factor": ()}
_GATE_UP = Fused("mlp.gate_up_proj.weight", ("gate", "up"))

_SHARED = {"shared_expert_intermediate_size": ("shared_expert_width",)}
_DELTA = {"qk_norm": True, "centered_norms": True, "attention_gate": True}
_DELTA_READS = (
    _ALL_BIASES
    | _PARTIAL
    | {
        "linear_num_key_heads": ("delta_key_heads",),
        "linear_num_value_heads": ("delta_value_heads",),
        "linear_key_head_dim": ("delta_key_dim",),
        "linear_value_head_dim": ("delta_value_dim",),
        "linear_conv_kernel_dim": ("delta_conv",),
        "full_attention_interval": (),
    }
)

FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (
        Family(
            "llama", "LlamaForCausalLM",
            reads=_ALL_BIASES | _MLP_BIAS,
            gguf="llama", gguf_permuted=True,
        ),
        Family("mistral", "MistralForCausalLM"),
        Family("ministral", "MinistralForCausalLM"),
        Family("ministral3", "Ministral3ForCausalLM", growing_query=True),
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
            "qwen2_moe", "Qwen2MoeForCausalLM",
            reads=_EXPERTS | {
                "qkv_bias": ("attention_bias",),
                "shared_expert_intermediate_size": ("shared_expert_width",),
            },
        ),
        Family(
            "mixtral", "MixtralForCausalLM",
            options={"renormalize": True},
            reads=_EXPERT_WIDTH | {
                "num_local_experts": ("experts",),
                "num_experts_per_tok": ("experts_per_token",),
            },
            names={"router": "block_sparse_moe.gate.weight"} | {
                f"expert_{name}": f"block_sparse_moe.experts.{{}}.{hub}.weight"
                for name, hub in (("gate", "w1"), ("up", "w3"), ("down", "w2"))
            },
        ),
        Family(
            "gpt_oss", "GptOssForCausalLM",
            options={
                "sinks": True, "expert_biases": True, "renormalize": True,
                "swiglu_limit": 7.0,
            },
            reads=_ALL_BIASES | _EXPERT_WIDTH | {
                "num_local_experts": ("experts",),
                "num_experts_per_tok": ("experts_per_token",),
                "swiglu_limit": ("swiglu_limit",),
                "swiglu_alpha": ("swiglu_alpha",),
            },
            names={
                "router": "mlp.router.weight", "router_bias": "mlp.router.bias"
            },
            fused=tuple(
                Fused(
                    f"mlp.experts.{hub}_proj{bias}",
                    tuple(f"expert_{m}{bias}" for m in hub.split("_")),
                    experts=True, interleaved=True, turned=not bias,
                )
                for hub in ("gate_up", "down") for bias in ("", "_bias")
            ),
            packed="mxfp4",
        ),
        Family(
            "smollm3", "SmolLM3ForCausalLM",
            reads=_ALL_BIASES | _MLP_BIAS,
        ),
        Family(
            "seed_oss", "SeedOssForCausalLM",
            reads=_MLP_BIAS | {
                "attention_bias": ("attention_bias",),
                "attention_out_bias": ("output_bias",),
            },
        ),
        Family(
            "phi3", "Phi3ForCausalLM",
            reads=_PARTIAL | {"original_max_position_embeddings": ()},
            fused=(
                Fused("self_attn.qkv_proj.weight", ("q", "k", "v")), _GATE_UP
            ),
        ),
        Family(
            "olmo2", "Olmo2ForCausalLM",
            options=_NORMS_AFTER | {"wide_qk_norm": True},
            reads=_ALL_BIASES,
        ),
        Family(
            "olmo3", "Olmo3ForCausalLM",
            options=_NORMS_AFTER | {"wide_qk_norm": True},
            reads=_ALL_BIASES, local_rope="rope_theta",
        ),
        Family(
            "olmoe", "OlmoeForCausalLM",
            options={"wide_qk_norm": True},
            reads=_ALL_BIASES | _ROUTED | _EXPERT_WIDTH,
        ),
        Family(
            "exaone4", "Exaone4ForCausalLM",
            options=_NORMS_AFTER | {"qk_norm": True},
            reads={"sliding_window_pattern": ()}, full_unturned=True,
        ),
        Family(
            "granite", "GraniteForCausalLM",
            reads=_ALL_BIASES | _MLP_BIAS | {
                name: (name,) for name in (
                    "attention_multiplier", "embedding_multiplier",
                    "residual_multiplier", "logits_scaling",
                )
            },
        ),
        Family(
            "glm4", "Glm4ForCausalLM",
            options={"post_norms": True, "interleaved_rope": True},
            reads=_PARTIAL | {"attention_bias": ("attention_bias",)},
            names={
                "attention_post_norm": "post_self_attn_layernorm.weight",
                "mlp_norm": "post_attention_layernorm.weight",
                "mlp_post_norm": "post_mlp_layernorm.weight",
            },
            fused=(_GATE_UP,),
        ),
        Family(
            "gemma", "GemmaForCausalLM",
            options=_GEMMA, reads=_ALL_BIASES,
        ),
        Family(
            "gemma2", "Gemma2ForCausalLM",
            options=_GEMMA | {"post_norms": True},
            activation="hidden_activation",
            reads=_GEMMA_READS
            | {"attn_logit_softcapping": ("attention_softcap",)},
        ),
        Family(
            "gemma3_text", "Gemma3ForCausalLM",
            options=_GEMMA | {"post_norms": True, "qk_norm": True},
            activation="hidden_activation",
            reads=_GEMMA_READS, local_rope="rope_local_base_freq",
            gguf="gemma3",
        ),
        Family(
            "qwen3_next", "Qwen3NextForCausalLM",
            options=_DELTA | {"delta_grouped": True},
            reads=_DELTA_READS | _EXPERTS | _SHARED,
        ),
        Family(
            "qwen3_5_text", "Qwen3_5ForCausalLM",
            options=_DELTA, reads=_DELTA_READS, gguf="qwen35",
        ),
        Family(
            "qwen3_5_moe_text", "Qwen3_5MoeForCausalLM",
            options=_DELTA | {"renormalize": True},
            reads=_DELTA_READS | _SHARED | {
                "num_experts": ("experts",),
                "num_experts_per_tok": ("experts_per_token",),
                "moe_intermediate_size": ("expert_width", "mlp_width"),
            },
            gguf="qwen35moe",
        ),
    )
}  # fmt: skip


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

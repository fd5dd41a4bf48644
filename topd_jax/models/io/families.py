"""The model families, as data: how each spells its config and its tensors.

A family is one row of :data:`FAMILIES`. Defaults, and which layers slide, are
those of the families' config classes in ``transformers``; see
:mod:`topd_jax.models.io.hub_config`. What a file of any family names its
tensors is in :mod:`topd_jax.models.io.tensors`.
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
      checkpoints: of which models, for people.
      about: what it has beside pre-norms, rotary positions, grouped heads and
        a gated SiLU, for people.
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
    checkpoints: str
    about: str
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
            "llama", "LlamaForCausalLM", "Llama 2 and 3.x, SmolLM2",
            "biases; linear, llama3 and yarn scaling",
            reads=_ALL_BIASES | _MLP_BIAS,
            gguf="llama", gguf_permuted=True,
        ),
        Family(
            "mistral", "MistralForCausalLM", "Mistral, Mistral Small 3",
            "sliding window in every layer, or none",
        ),
        Family(
            "ministral", "MinistralForCausalLM", "Ministral 8B",
            "some layers slide",
        ),
        Family(
            "ministral3", "Ministral3ForCausalLM", "Ministral 3",
            "yarn scaling; queries grow with their position",
            growing_query=True,
        ),
        Family(
            "qwen2", "Qwen2ForCausalLM", "Qwen2, Qwen2.5",
            "biases of q, k and v; sliding window",
            options={"attention_bias": True}, gguf="qwen2",
        ),
        Family(
            "qwen3", "Qwen3ForCausalLM", "Qwen3",
            "norm of each head's q and k; biases; sliding window",
            options={"qk_norm": True}, reads=_ALL_BIASES, gguf="qwen3",
        ),
        Family(
            "qwen3_moe", "Qwen3MoeForCausalLM", "Qwen3 mixtures",
            "the same with experts in all layers",
            options={"qk_norm": True},
            reads=_ALL_BIASES | _EXPERTS, gguf="qwen3moe",
        ),
        Family(
            "qwen2_moe", "Qwen2MoeForCausalLM", "Qwen1.5 and Qwen2 mixtures",
            "biases of q, k and v; experts in all layers, and a gated one for "
            "all tokens",
            reads=_EXPERTS | {
                "qkv_bias": ("attention_bias",),
                "shared_expert_intermediate_size": ("shared_expert_width",),
            },
        ),
        Family(
            "mixtral", "MixtralForCausalLM", "Mixtral",
            "experts in all layers; sliding window",
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
            "gpt_oss", "GptOssForCausalLM", "gpt-oss, its MXFP4 expanded",
            "attention sinks; biases; experts in all layers, biased and "
            "clamped; every second layer slides",
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
            "smollm3", "SmolLM3ForCausalLM", "SmolLM3",
            "layers without rotation; biases; sliding window",
            reads=_ALL_BIASES | _MLP_BIAS,
        ),
        Family(
            "seed_oss", "SeedOssForCausalLM", "Seed-OSS", "biases",
            reads=_MLP_BIAS | {
                "attention_bias": ("attention_bias",),
                "attention_out_bias": ("output_bias",),
            },
        ),
        Family(
            "phi3", "Phi3ForCausalLM", "Phi-3, Phi-4",
            "turns a part of each head; longrope scaling; sliding window; q, k "
            "and v in one tensor",
            reads=_PARTIAL | {"original_max_position_embeddings": ()},
            fused=(
                Fused("self_attn.qkv_proj.weight", ("q", "k", "v")), _GATE_UP
            ),
        ),
        Family(
            "olmo2", "Olmo2ForCausalLM", "OLMo 2",
            "norms after and not before; norm of q and k over all heads",
            options=_NORMS_AFTER | {"wide_qk_norm": True},
            reads=_ALL_BIASES,
        ),
        Family(
            "olmo3", "Olmo3ForCausalLM", "OLMo 3",
            "the same; three of four layers slide, without scaling of RoPE",
            options=_NORMS_AFTER | {"wide_qk_norm": True},
            reads=_ALL_BIASES, local_rope="rope_theta",
        ),
        Family(
            "olmoe", "OlmoeForCausalLM", "OLMoE",
            "norm of q and k over all heads; experts in all layers",
            options={"wide_qk_norm": True},
            reads=_ALL_BIASES | _ROUTED | _EXPERT_WIDTH,
        ),
        Family(
            "exaone4", "Exaone4ForCausalLM", "EXAONE 4.0",
            "norms after and not before; norm of each head's q and k; where "
            "layers slide the others have no rotary positions",
            options=_NORMS_AFTER | {"qk_norm": True},
            reads={"sliding_window_pattern": ()}, full_unturned=True,
        ),
        Family(
            "granite", "GraniteForCausalLM", "Granite 3",
            "multipliers of embeddings, scores, residuals and logits; biases",
            reads=_ALL_BIASES | _MLP_BIAS | {
                name: (name,) for name in (
                    "attention_multiplier", "embedding_multiplier",
                    "residual_multiplier", "logits_scaling",
                )
            },
        ),
        Family(
            "glm4", "Glm4ForCausalLM", "GLM-4-0414",
            "norms before and after; biases of q, k and v; turns neighboring "
            "pairs of half of each head",
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
            "gemma", "GemmaForCausalLM", "Gemma",
            "norms scale by 1 + w; scaled embedding; tanh-GELU",
            options=_GEMMA, reads=_ALL_BIASES,
        ),
        Family(
            "gemma2", "Gemma2ForCausalLM", "Gemma 2",
            "the same; norms before and after; soft-capped scores and logits; "
            "every second layer slides",
            options=_GEMMA | {"post_norms": True},
            activation="hidden_activation",
            reads=_GEMMA_READS
            | {"attn_logit_softcapping": ("attention_softcap",)},
        ),
        Family(
            "gemma3_text", "Gemma3ForCausalLM", "Gemma 3",
            "the same without soft-capped scores; norm of q and k; five of six "
            "layers slide, with a rotary base of their own",
            options=_GEMMA | {"post_norms": True, "qk_norm": True},
            activation="hidden_activation",
            reads=_GEMMA_READS, local_rope="rope_local_base_freq",
            gguf="gemma3",
        ),
        Family(
            "qwen3_next", "Qwen3NextForCausalLM", "Qwen3-Next",
            "gated delta rules in three of four layers; gated attention, "
            "partly turned, with norm of q and k; norms scale by 1 + w; "
            "experts, and a gated one for all tokens",
            options=_DELTA | {"delta_grouped": True},
            reads=_DELTA_READS | _EXPERTS | _SHARED,
        ),
        Family(
            "qwen3_5_text", "Qwen3_5ForCausalLM", "Qwen3.5",
            "the same without experts",
            options=_DELTA, reads=_DELTA_READS, gguf="qwen35",
        ),
        Family(
            "qwen3_5_moe_text", "Qwen3_5MoeForCausalLM", "Qwen3.5 mixtures",
            "the same with experts",
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

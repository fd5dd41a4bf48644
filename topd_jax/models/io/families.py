"""The model families, as data: how each spells its config.

A family is one row of :data:`FAMILIES`; how files name its tensors is in
:mod:`topd_jax.models.io.tensors`. What each row composes:

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
from collections.abc import Mapping
from typing import Any


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

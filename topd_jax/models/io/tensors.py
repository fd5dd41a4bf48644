"""How files name each parameter's tensors, and which shape they give them.

A parameter is one row of :data:`WEIGHTS`.
"""

import math
from collections.abc import Mapping
from typing import NamedTuple

from topd_jax.models.config import DELTA_TARGETS, LORA_TARGETS, DecoderConfig
from topd_jax.models.parameters import LORA_A, LORA_B


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


LAYER = "model.layers.{}."

WEIGHTS: dict[str, Weight] = {
    "embedding": Weight("model.embed_tokens.weight", 0),
    "final_norm": Weight("model.norm.weight", 0),
    "output": Weight("lm_head.weight", 0),
} | {
    name: Weight(LAYER + hub, inputs, ".experts." in hub)
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
        ("router_bias", "mlp.gate.bias", 0),
        ("sinks", "self_attn.sinks", 0),
        ("shared_router", "mlp.shared_expert_gate.weight", 1),
        ("shared_gate", "mlp.shared_expert.gate_proj.weight", 1),
        ("shared_up", "mlp.shared_expert.up_proj.weight", 1),
        ("shared_down", "mlp.shared_expert.down_proj.weight", 1),
        ("expert_gate", "mlp.experts.{}.gate_proj.weight", 1),
        ("expert_up", "mlp.experts.{}.up_proj.weight", 1),
        ("expert_down", "mlp.experts.{}.down_proj.weight", 1),
        ("expert_gate_bias", "mlp.experts.{}.gate_proj.bias", 0),
        ("expert_up_bias", "mlp.experts.{}.up_proj.bias", 0),
        ("expert_down_bias", "mlp.experts.{}.down_proj.bias", 0),
        ("delta_qkv", "linear_attn.in_proj_qkv.weight", 1),
        ("delta_z", "linear_attn.in_proj_z.weight", 1),
        ("delta_a", "linear_attn.in_proj_a.weight", 1),
        ("delta_b", "linear_attn.in_proj_b.weight", 1),
        ("delta_qkvz", "linear_attn.in_proj_qkvz.weight", 1),
        ("delta_ba", "linear_attn.in_proj_ba.weight", 1),
        ("delta_conv", "linear_attn.conv1d.weight", 0),
        ("delta_dt_bias", "linear_attn.dt_bias", 0),
        ("delta_a_log", "linear_attn.A_log", 0),
        ("delta_norm", "linear_attn.norm.weight", 0),
        ("delta_o", "linear_attn.out_proj.weight", 2),
    )
}

# As PEFT names them: lora_A [r, in] and lora_B [out, r].
ADAPTER_PREFIX = "base_model.model."
for _name in LORA_TARGETS + DELTA_TARGETS:
    _module = ADAPTER_PREFIX + WEIGHTS[_name].hub.removesuffix("weight")
    _inputs = WEIGHTS[_name].inputs
    WEIGHTS[_name + LORA_A] = Weight(f"{_module}lora_A.weight", _inputs)
    WEIGHTS[_name + LORA_B] = Weight(f"{_module}lora_B.weight", 1)


def hub_name(config: DecoderConfig, name: str, names: Mapping[str, str]) -> str:
    """Return how files of this decoder spell a parameter.

    Args:
      config: the decoder's shape.
      name: of the parameter.
      names: of the family, where others name it differently.

    Returns:
      Its name, as in :class:`Weight`.
    """
    if name in names:
        return LAYER + names[name]
    if name == "mlp_norm" and config.post_norms:
        # With norms on both sides the hub calls the feed-forward's first so.
        return LAYER + "pre_feedforward_layernorm.weight"
    return WEIGHTS[name].hub


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
    if name in ("embedding", "output", "delta_conv"):
        return tuple((d,) for d in dims)
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

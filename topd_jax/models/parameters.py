"""The parameters of a decoder: one table of names, shapes and axes."""

import functools
import math
import operator
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from topd_jax.models.config import DecoderConfig
from topd_jax.parallel.sharding import named

if TYPE_CHECKING:
    from qwix import QArray

# Suffixes of a linear map's adapter: x W + scale * (x A) B.
LORA_A, LORA_B = "_lora_a", "_lora_b"


class Parameter(NamedTuple):
    """One row of the parameter table.

    Attributes:
      shape: of the whole array.
      axes: logical axes; layer parameters have "layers" as first one.
      scale: standard deviation of initial weights; None starts at ``start``.
      start: initial value where there is no scale.
    """

    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    scale: float | None
    start: float = 1.0


def parameter_table(config: DecoderConfig) -> dict[str, Parameter]:
    """Return name, shape, logical axes and initial scale of all parameters.

    Args:
      config: the decoder's shape.

    Returns:
      name -> row; names of layer parameters have "layers" as first axis.
    """
    d = config.width
    vocab = Parameter((config.vocab_size, d), ("vocab", "embed"), d**-0.5)
    table = {"embedding": vocab}
    table |= _attention(config)
    table |= (_experts if config.experts else _dense)(config)
    if config.recurrent:
        table |= _delta_rule(config)
    start = 0.0 if config.centered_norms else 1.0
    table["final_norm"] = Parameter((d,), (None,), None, start)
    if not config.tied:
        table["output"] = vocab
    return table | _adapters(config, table)


def layers_of(config: DecoderConfig, name: str) -> list[int]:
    """Return the layers that have a parameter, in the order of its stack.

    Args:
      config: the decoder's shape.
      name: of a parameter that is stacked over layers.
    """
    recurrent = config.recurrent or (False,) * config.layers
    if name.startswith("delta_"):
        return [i for i, kind in enumerate(recurrent) if kind]
    if name.split("_")[0] in ("q", "k", "v", "o", "sinks"):
        return [i for i, kind in enumerate(recurrent) if not kind]
    return list(range(config.layers))


def period_of(config: DecoderConfig) -> int:
    """Return after how many layers their kinds repeat."""
    kinds, n = config.recurrent or (False,) * config.layers, config.layers
    lengths = (p for p in range(1, n + 1) if n % p == 0)
    return next(p for p in lengths if kinds[:p] * (n // p) == kinds)


def arrays_of(
    config: DecoderConfig, arrays: dict[str, Any], index: int
) -> dict[str, Any]:
    """Return the parameters of one layer.

    Args:
      config: the decoder's shape.
      arrays: name -> stacked over the layers that have it, all of them or
        those of one period.
      index: of the layer.
    """
    own = {}
    for name, stacked in arrays.items():
        layers = layers_of(config, name)
        if index in layers:
            at = layers.index(index)
            own[name] = jax.tree.map(operator.itemgetter(at), stacked)
    return own


def parameter_shardings(
    config: DecoderConfig, mesh: Mesh | None
) -> dict[str, NamedSharding | None]:
    """Return where each parameter of a decoder goes, by the rules in force.

    Args:
      config: the decoder's shape.
      mesh: of devices; None is one device.

    Returns:
      parameter -> sharding, or None without a mesh.

    Raises:
      ValueError: where a parameter does not divide over the mesh.
    """
    table = parameter_table(config)
    if mesh is None:
        return dict.fromkeys(table)
    return {
        name: named(mesh, row.shape, row.axes, name=name)
        for name, row in table.items()
    }


def as_floats(p: "jax.Array | QArray", dtype: Any) -> jax.Array:
    """Convert a parameter to the dtype it is computed with.

    Args:
      p: floats, or integers with scales.
      dtype: of the result; the product is rounded to it once.

    Returns:
      Floats of the same shape.
    """
    if not is_quantized(p):
        return p.astype(dtype)
    import qwix

    return qwix.dequantize(p.astype(jnp.float32)).astype(dtype)


def is_quantized(p: "jax.Array | QArray") -> bool:
    """Tell whether a parameter is integers with scales."""
    # By its fields: qwix takes seconds to import, and most runs need none.
    return hasattr(p, "qvalue")


def _attention(config: DecoderConfig) -> dict[str, Parameter]:
    """Return the rows of attention and of a layer's norms."""
    n, d = config.layers, config.width
    h, kv, hd = config.heads, config.kv_heads, config.head_dim
    m, qd = n - sum(config.recurrent), hd * (1 + config.attention_gate)
    query = Parameter(
        (m, d, h, qd), ("layers", "embed", "heads", "head_dim"), d**-0.5
    )
    key = Parameter(
        (m, d, kv, hd), ("layers", "embed", "kv_heads", "head_dim"), d**-0.5
    )
    out_axes = ("layers", "heads", "head_dim", "embed")
    out = Parameter((m, h, hd, d), out_axes, (h * hd) ** -0.5)
    start = 0.0 if config.centered_norms else 1.0
    norm = functools.partial(_vector, start=start)
    # The order is that of the initializer's keys: keep it.
    table = {"attention_norm": norm(n, d)} if config.pre_norms else {}
    table |= {"q": query, "k": key, "v": key, "o": out}
    if config.pre_norms:
        table["mlp_norm"] = norm(n, d)
    if config.post_norms:
        table |= dict.fromkeys(
            ("attention_post_norm", "mlp_post_norm"), norm(n, d)
        )
    if config.qk_norm:
        table |= {"q_norm": norm(m, hd), "k_norm": norm(m, hd)}
    if config.wide_qk_norm:
        table |= {"q_norm": norm(m, h, hd), "k_norm": norm(m, kv, hd)}
    if config.attention_bias:
        bias = _vector(m, kv, hd)
        table |= {"q_bias": _vector(m, h, qd), "k_bias": bias, "v_bias": bias}
    if config.output_bias:
        table["o_bias"] = _vector(m, d)
    if config.sinks:
        table["sinks"] = _vector(m, h)
    return table


def _vector(*shape: int, start: float = 0.0) -> Parameter:
    # Norm and bias vectors are small; spreading them would cost more than it
    # saves.
    axes = ("layers", *(None,) * (len(shape) - 1))
    return Parameter(shape, axes, None, start)


def _dense(config: DecoderConfig) -> dict[str, Parameter]:
    """Return the rows of the gated feed-forward network."""
    n, d, f = config.layers, config.width, config.mlp_width
    wide = Parameter((n, d, f), ("layers", "embed", "mlp"), d**-0.5)
    down = Parameter((n, f, d), ("layers", "mlp", "embed"), f**-0.5)
    table = {"gate": wide, "up": wide, "down": down}
    if config.mlp_bias:
        table |= dict.fromkeys(("gate_bias", "up_bias"), _vector(n, f))
        table["down_bias"] = _vector(n, d)
    return table


def _adapters(
    config: DecoderConfig, table: dict[str, Parameter]
) -> dict[str, Parameter]:
    """Return the factors [N, in..., r] and [N, r, out...] of the targets.

    A starts with the variance of PEFT's uniform draw, 1 / (3 fan_in), B at
    zero, so that the model starts as it is without them.
    """
    rows = {}
    for name in config.lora.targets if config.lora else ():
        shape, axes = table[name].shape, table[name].axes
        split, r = 1 + linear_inputs(name), config.lora.rank
        scale = (3 * math.prod(shape[1:split])) ** -0.5
        rows[name + LORA_A] = Parameter(
            (*shape[:split], r), (*axes[:split], None), scale
        )
        rows[name + LORA_B] = Parameter(
            (shape[0], r, *shape[split:]), (axes[0], None, *axes[split:]),
            None, 0.0,
        )  # fmt: skip
    return rows


def linear_inputs(name: str) -> int:
    """Count the dimensions, after the layers', that a linear map reads."""
    return 2 if name in ("o", "delta_o") else 1


def _delta_rule(config: DecoderConfig) -> dict[str, Parameter]:
    """Return the rows of the layers that keep a recurrent state."""
    n, d = sum(config.recurrent), config.width
    heads, states = config.delta_key_heads, config.delta_value_heads
    k, v = config.delta_key_dim, config.delta_value_dim
    channels, each = 2 * heads * k + states * v, states // heads

    def linear(*shape: int) -> Parameter:
        axes = ("layers", "embed", "heads", "head_dim")
        return Parameter((n, d, *shape), axes[: 2 + len(shape)], d**-0.5)

    if config.delta_grouped:
        table = {
            "delta_qkvz": linear(heads, 2 * (k + each * v)),
            "delta_ba": linear(heads, 2 * each),
        }
    else:
        table = {
            "delta_qkv": linear(channels),
            "delta_z": linear(states, v),
            "delta_b": linear(states),
            "delta_a": linear(states),
        }
    taps, out = config.delta_conv, ("layers", "heads", "head_dim", "embed")
    return table | {
        "delta_conv": Parameter(
            (n, channels, 1, taps), ("layers", None, None, None), taps**-0.5
        ),
        "delta_dt_bias": _vector(n, states, start=1.0),
        "delta_a_log": _vector(n, states),
        "delta_norm": _vector(n, v, start=1.0),
        "delta_o": Parameter((n, states, v, d), out, (states * v) ** -0.5),
    }


def _experts(config: DecoderConfig) -> dict[str, Parameter]:
    """Return the rows of router and experts."""
    n, d = config.layers, config.width
    e, f = config.experts, config.expert_width
    wide = Parameter(
        (n, e, d, f), ("layers", "expert", "embed", "mlp"), d**-0.5
    )
    down_axes = ("layers", "expert", "mlp", "embed")
    table = {
        "router": Parameter((n, d, e), ("layers", "embed", None), d**-0.5),
        "expert_gate": wide,
        "expert_up": wide,
        "expert_down": Parameter((n, e, f, d), down_axes, f**-0.5),
    }
    if config.expert_biases:
        axes = ("layers", "expert", "mlp")
        bias = Parameter((n, e, f), axes, None, 0.0)
        table |= {"expert_gate_bias": bias, "expert_up_bias": bias}
        axes = ("layers", "expert", None)
        table["expert_down_bias"] = Parameter((n, e, d), axes, None, 0.0)
        table["router_bias"] = _vector(n, e)
    if config.shared_expert_width:
        shared = _dense(
            config.replace(mlp_width=config.shared_expert_width, mlp_bias=False)
        )
        table |= {f"shared_{name}": row for name, row in shared.items()}
        axes = ("layers", "embed", None)
        table["shared_router"] = Parameter((n, d, 1), axes, d**-0.5)
    return table

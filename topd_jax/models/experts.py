"""Mixture of experts: each token is read by the k experts its router likes.

``y = sum_{e in top k} p_e * E_e(x)`` with ``p = softmax(x R)``, renormalized
over the chosen ones where the config says so (Qwen3-MoE). Copies of tokens are
sorted by expert and multiplied group by group
(:mod:`topd_jax.models.grouped`: ``jax.lax.ragged_dot``, on TPU megablox), so
no expert has a capacity and no token is dropped.
"""

import functools

import jax
import jax.numpy as jnp

from topd_jax.models.config import DecoderConfig
from topd_jax.models.grouped import grouped_dot
from topd_jax.parallel.collectives import over_experts

ACTIVATIONS = {
    "silu": jax.nn.silu,
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
}


def route(
    x: jax.Array,
    router: jax.Array,
    config: DecoderConfig,
    bias: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Choose the experts of each token, and their weights.

    Args:
      x: [T, D].
      router: [D, E].
      config: for ``experts_per_token`` and ``renormalize``.
      bias: [E] of the router, or None.

    Returns:
      (experts i32[T, k], weights [T, k] in x's dtype).
    """
    scores = x @ router if bias is None else x @ router + bias
    chances = jax.nn.softmax(scores.astype(jnp.float32), axis=-1)
    weights, chosen = jax.lax.top_k(chances, config.experts_per_token)
    if config.renormalize:
        weights = weights / jnp.sum(weights, axis=-1, keepdims=True)
    return chosen, weights.astype(x.dtype)


def mix(
    x: jax.Array, w: dict[str, jax.Array], config: DecoderConfig
) -> jax.Array:
    """Compute the feed-forward layer of a mixture of experts.

    Over a mesh every device holds some experts, reads all tokens of its rows
    and adds what its own experts say; the sum over devices is the output.

    Args:
      x: [B, S, D].
      w: "router" [D, E], "expert_gate" and "expert_up" [E, D, F],
        "expert_down" [E, F, D]; where the config has biases, theirs and the
        router's.
      config: the decoder's shape.

    Returns:
      [B, S, D].
    """
    flat = x.reshape(-1, x.shape[-1])
    chosen, weights = route(flat, w["router"], config, w.get("router_bias"))
    names = ["expert_gate", "expert_up", "expert_down"]
    if config.expert_biases:
        names += [f"{name}_bias" for name in names]
    read = functools.partial(_read, config)
    out = over_experts(read, flat, chosen, weights, *(w[n] for n in names))
    return out.reshape(x.shape)


def _read(
    config: DecoderConfig,
    x: jax.Array,
    chosen: jax.Array,
    weights: jax.Array,
    gate: jax.Array,
    up: jax.Array,
    down: jax.Array,
    *biases: jax.Array,
    first: jax.Array | int,
) -> jax.Array:
    """Compute what experts first .. first + E - 1 add to the output [T, D].

    Copies that belong to other experts are sorted behind all groups, where
    ``grouped_dot`` leaves zeros.
    """
    count, (tokens, copies) = gate.shape[0], chosen.shape
    expert = chosen.reshape(-1) - first
    expert = jnp.where((expert >= 0) & (expert < count), expert, count)
    order = jnp.argsort(expert)  # stable: copies of one expert stay in order
    sizes = jnp.bincount(expert, length=count + 1)[:count].astype(jnp.int32)
    rows = x[order // copies]
    dot = functools.partial(grouped_dot, sizes=sizes)
    of_rows = jnp.minimum(expert[order], count - 1)

    def read(rows: jax.Array, which: int) -> jax.Array:
        out = dot(rows, (gate, up, down)[which])
        return out + biases[which][of_rows] if biases else out

    inner = _gated(read(rows, 0), read(rows, 1), config)
    out = read(inner, 2)[jnp.argsort(order)].reshape(tokens, copies, -1)
    here = (expert < count).reshape(tokens, copies)
    return jnp.sum(jnp.where(here, weights, 0)[..., None] * out, axis=1)


def _gated(gate: jax.Array, up: jax.Array, config: DecoderConfig) -> jax.Array:
    """Compute what the down projection reads."""
    limit = config.swiglu_limit
    if limit is None:
        return ACTIVATIONS[config.activation](gate) * up
    gate, up = jnp.minimum(gate, limit), jnp.clip(up, -limit, limit)
    return (up + 1) * gate * jax.nn.sigmoid(config.swiglu_alpha * gate)

"""Attention by one dense mask in float32: what every other way must equal."""

import functools

import jax
import jax.numpy as jnp


@functools.partial(jax.jit, static_argnames=("scale", "cap"))
def dense_attention(query, key, value, mask, scale, cap=None):
    """Grouped heads [B, S, heads, D] and [B, kv_heads, L, D]; a query that
    attends to nothing gives zero."""
    query, key, value = (x.astype(jnp.float32) for x in (query, key, value))
    shared = query.shape[2] // key.shape[1]
    key, value = (jnp.repeat(x, shared, axis=1) for x in (key, value))
    scores = jnp.einsum("bshd,bhld->bhsl", query, key) * scale
    if cap is not None:
        scores = cap * jnp.tanh(scores / cap)
    mask = mask[:, None]
    weights = jax.nn.softmax(jnp.where(mask, scores, -1e30), axis=-1)
    return jnp.einsum("bhsl,bhld->bshd", jnp.where(mask, weights, 0.0), value)

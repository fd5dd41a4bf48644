"""Rotary positions (Su et al., arXiv:2104.09864).

A decoder may turn its layers in up to three ways: as the config's base says,
by a local base (sliding layers), or not at all. Each way is a row of one small
table; a layer picks its row by number, so that layers can be scanned.
"""

import jax
import jax.numpy as jnp
import numpy as np

from topd_jax.models.config import DecoderConfig
from topd_jax.models.frequencies import RopeScaling, frequencies


def rope_rows(config: DecoderConfig) -> np.ndarray:
    """Return i32[N]: the row of :func:`rope_table` of each layer."""
    return np.unique(_ways(config), return_inverse=True)[1].astype(np.int32)


def rope_table(
    positions: jax.Array, config: DecoderConfig
) -> tuple[jax.Array, jax.Array]:
    """Return cos and sin of positions: f32[R, B, S, 1, rotary_dim / 2] each.

    Args:
      positions: rotary positions.
      config: the decoder's shape.

    Returns:
      (cos, sin), the R ways that the config's layers are turned in.
    """
    scaling, size = config.rope_scaling, config.rotary_dim or config.head_dim
    base = frequencies(config.rope_theta, size, scaling, long=config.long_rope)
    local = frequencies(config.local_rope_theta or config.rope_theta, size)
    factor = 1.0 if scaling is None else scaling.attention_factor
    used = np.unique(_ways(config))  # what no layer uses is left out
    turn = np.stack([base, local, np.zeros_like(base)])[used]
    scale = np.array([factor, 1, 1], np.float32)[used]
    angle = positions[None, ..., None, None].astype(jnp.float32)
    angle = angle * turn[:, None, None, None]
    scale = scale[:, None, None, None, None]
    return jnp.cos(angle) * scale, jnp.sin(angle) * scale


def _ways(config: DecoderConfig) -> np.ndarray:
    """Return i32[N]: 0 for the base, 1 for the local base, 2 for none."""
    ways = np.zeros(config.layers, np.int32)
    if config.local_rope_theta is not None and config.sliding:
        ways[np.asarray(config.sliding)] = 1
    if config.no_rope:
        ways[np.asarray(config.no_rope)] = 2
    return ways


def rotate(
    x: jax.Array, cos: jax.Array, sin: jax.Array, interleaved: bool
) -> jax.Array:
    """Rotate the pairs (i, i + n / 2) of the first n elements of each head.

    Args:
      x: [B, S, heads, head_dim].
      cos: f32[B, S, 1, n / 2].
      sin: the same.
      interleaved: rotate the pairs (2 i, 2 i + 1) instead.

    Returns:
      [B, S, heads, head_dim] in x's dtype.
    """
    size = 2 * cos.shape[-1]
    wide = x[..., :size].astype(jnp.float32)
    if interleaved:
        first, second = wide[..., ::2], wide[..., 1::2]
    else:
        first, second = jnp.split(wide, 2, axis=-1)
    pairs = first * cos - second * sin, second * cos + first * sin
    if interleaved:
        turned = jnp.stack(pairs, axis=-1).reshape(wide.shape)
    else:
        turned = jnp.concatenate(pairs, axis=-1)
    turned = turned.astype(x.dtype)
    if size == x.shape[-1]:
        return turned
    return jnp.concatenate([turned, x[..., size:]], axis=-1)


def grow(
    query: jax.Array, positions: jax.Array, scaling: RopeScaling
) -> jax.Array:
    """Scale queries by their position, for ``scaling.query_beta``.

    Args:
      query: [B, S, heads, head_dim].
      positions: i32[B, S].
      scaling: for ``query_beta`` and ``original_length``.

    Returns:
      [B, S, heads, head_dim] in the query's dtype.
    """
    turns = jnp.floor(positions / scaling.original_length)
    scale = 1 + scaling.query_beta * jnp.log(1 + turns)
    return query * scale[..., None, None].astype(query.dtype)

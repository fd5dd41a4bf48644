"""Keys and values of the tokens that a model has read."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import struct


@struct.dataclass
class Cache:
    """Keys and values of the tokens that a model has read.

    Attributes:
      keys: [N, B, L, kv_heads, head_dim] in compute dtype.
      values: the same shape.
      length: i32[] tokens of each row written so far.
      positions: i32[1, B, L] rotary position of each token; None where no
        layer slides, since nothing else needs them.
    """

    keys: jax.Array
    values: jax.Array
    length: jax.Array
    positions: jax.Array | None = None


def update_slice(
    array: jax.Array, update: jax.Array, start: Sequence[int | jax.Array]
) -> jax.Array:
    """Write a part of an array in place.

    ``jax.lax.dynamic_update_slice`` requires one dtype of all indices, and one
    of both arrays; where ``jax_enable_x64`` is set, integers are int64 unless
    they say otherwise.

    Args:
      array: [...].
      update: of the same rank, not larger; cast to the array's dtype.
      start: index of the update's first element, one a dimension.

    Returns:
      The array with the part replaced.
    """
    indices = [jnp.asarray(i, jnp.int32) for i in start]
    update = update.astype(array.dtype)
    return jax.lax.dynamic_update_slice(array, update, indices)


def write_cache(
    cache: Cache, key: jax.Array, value: jax.Array, index: jax.Array
) -> tuple[Cache, jax.Array, jax.Array]:
    """Write the new keys and values of one layer.

    The whole cache is carried through the scan over layers and written in
    place; as a scanned input and output it would be copied at every token.

    Args:
      cache: of all layers.
      key: [B, S, kv_heads, head_dim] of the new tokens.
      value: the same shape.
      index: i32[] of the layer in the cache.

    Returns:
      (cache, keys [B, L, kv_heads, head_dim] of the layer, its values).
    """
    start = (index, 0, cache.length, 0, 0)
    keys = update_slice(cache.keys, key[None], start)
    values = update_slice(cache.values, value[None], start)
    cache = cache.replace(keys=keys, values=values)
    return cache, keys[index], values[index]

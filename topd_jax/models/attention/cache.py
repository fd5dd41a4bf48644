"""Keys and values of the tokens that a model has read."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import struct


@struct.dataclass
class Cache:
    """Keys and values of the tokens that a model has read.

    That of one layer alone holds them as :func:`fold_heads` returns them.

    Attributes:
      keys: [N, B, kv_heads, L, head_dim] in compute dtype: as attention
        reads them, so that a token that is decoded moves no other's.
      values: the same shape.
      length: i32[] tokens of each row written so far.
      positions: i32[1, B, L] rotary position of each token; None where no
        layer slides, since nothing else needs them.
      states: f32[R, B, H, K, V] of the layers that are recurrent, in the
        place of keys and values; [R, B, M, H, K, V] of M branches; None where
        there is no such layer.
      inputs: [R, B, W, C] newest inputs of their convolutions, or [R, B, M,
        W, C].
    """

    keys: jax.Array
    values: jax.Array
    length: jax.Array
    positions: jax.Array | None = None
    states: jax.Array | None = None
    inputs: jax.Array | None = None


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
    cache: Cache,
    key: jax.Array,
    value: jax.Array,
    index: jax.Array | None,
) -> tuple[Cache, jax.Array, jax.Array]:
    """Write the new keys and values of one layer.

    The whole cache is carried through the scan over layers and written in
    place; as a scanned input and output it would be copied at every token.

    Args:
      cache: of all layers.
      key: [B, S, kv_heads, head_dim] of the new tokens.
      value: the same shape.
      index: i32[] of the layer in the cache; None where the cache is of one
        layer, as :func:`fold_heads` returns it.

    Returns:
      (cache, keys [B, kv_heads, L, head_dim] of the layer, its values).
    """
    key, value = jnp.swapaxes(key, 1, 2), jnp.swapaxes(value, 1, 2)
    if index is None:
        length = cache.length
        new, values = fold_heads(key, value)
        keys = update_slice(cache.keys, new, (0, 0, length))
        values = update_slice(cache.values, values, (0, length, 0))
        cache = cache.replace(keys=keys, values=values)
        return cache, *unfold_heads(keys, values, len(key))
    start = (index, 0, 0, cache.length, 0)
    keys = update_slice(cache.keys, key[None], start)
    values = update_slice(cache.values, value[None], start)
    cache = cache.replace(keys=keys, values=values)
    return cache, keys[index], values[index]


def fold_heads(
    keys: jax.Array, values: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Lay the cache of one layer out as the products of attention take it.

    What lies between a write and its reader, XLA on a CPU would write twice,
    and copy the cache for it; keys that the product reads along their minor
    dimension take 2.5 times as long.

    Args:
      keys: [B, kv_heads, L, head_dim].
      values: the same.

    Returns:
      (keys [B * kv_heads, head_dim, L], values [B * kv_heads, L, head_dim]).
    """
    keys, values = (x.reshape(-1, *x.shape[2:]) for x in (keys, values))
    return keys.mT, values


def unfold_heads(
    keys: jax.Array, values: jax.Array, rows: int
) -> tuple[jax.Array, jax.Array]:
    """Return what :func:`fold_heads` was given, of B = ``rows``."""
    keys, values = (
        x.reshape(rows, -1, *x.shape[1:]) for x in (keys.mT, values)
    )
    return keys, values

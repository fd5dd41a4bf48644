"""The arithmetic of one decoder layer, and the cache that it writes.

Attention goes through :func:`jax.nn.dot_product_attention`, in one place.
"""

import jax
import jax.numpy as jnp
from flax import nnx, struct

from topd_jax.models.config import DecoderConfig
from topd_jax.sharding import constrain

# Below this many ids a lookup by one-hot product is cheaper than a gather,
# whose gradient is a scatter (three times slower on CPU at 100 ids).
_ONE_HOT_VOCAB = 512


@struct.dataclass
class Cache:
    """Keys and values of the columns that a model has read.

    Attributes:
      keys: [N, B, L, kv_heads, head_dim] in compute dtype.
      values: the same shape.
      length: i32[] columns written so far.
    """

    keys: jax.Array
    values: jax.Array
    length: jax.Array


def rms_norm(x: jax.Array, scale: jax.Array, eps: float) -> jax.Array:
    """x / rms(x) * scale, computed in float32 (Zhang & Sennrich, 2019).

    Args:
      x: [..., D].
      scale: [D].
      eps: added to the mean square.

    Returns:
      [..., D] in x's dtype.
    """
    wide = x.astype(jnp.float32)
    square = jnp.mean(wide * wide, axis=-1, keepdims=True)
    normed = (wide * jax.lax.rsqrt(square + eps)).astype(x.dtype)
    return normed * scale.astype(x.dtype)


def embed(
    table: jax.Array, tokens: jax.Array, config: DecoderConfig
) -> jax.Array:
    """Rows of table [V, D] for tokens i32[B, S]: [B, S, D]."""
    table = table.astype(config.dtype)
    if config.vocab_size <= _ONE_HOT_VOCAB:
        one_hot = jax.nn.one_hot(tokens, config.vocab_size, dtype=table.dtype)
        hidden = _linear(one_hot, table)
    else:
        hidden = jnp.take(table, tokens, axis=0)
    return constrain(hidden, "batch", "sequence", "activation_embed")


def rope_table(
    positions: jax.Array, config: DecoderConfig
) -> tuple[jax.Array, jax.Array]:
    """cos, sin of positions i32[B, S]: f32[B, S, 1, head_dim / 2] each.

    The angle of pair i is position * theta ** (-2 i / head_dim) (Su et al.,
    arXiv:2104.09864).
    """
    half = config.head_dim // 2
    exponent = jnp.arange(half, dtype=jnp.float32) * 2 / config.head_dim
    frequency = config.rope_theta**-exponent
    angle = positions[..., None].astype(jnp.float32) * frequency
    return jnp.cos(angle)[:, :, None], jnp.sin(angle)[:, :, None]


def _rotate(x: jax.Array, rope: tuple[jax.Array, jax.Array]) -> jax.Array:
    cos, sin = rope
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate(
        [first * cos - second * sin, second * cos + first * sin], axis=-1
    )
    return turned.astype(x.dtype)


def _linear(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """x [..., I] @ kernel [I, ...]: as one 2-D product.

    The weight gradient of a 3-D product is three times slower on CPU.
    """
    out = x.reshape(-1, x.shape[-1]) @ kernel.reshape(kernel.shape[0], -1)
    return out.reshape(*x.shape[:-1], *kernel.shape[1:])


def layer(
    config: DecoderConfig,
    carry: tuple[jax.Array, Cache | None],
    weights: nnx.Module,
    index: jax.Array,
    *,
    rope: tuple[jax.Array, jax.Array],
    mask: jax.Array,
) -> tuple[jax.Array, Cache | None]:
    """One layer: attention, then the gated feed-forward, both residual.

    Args:
      config: the decoder's shape.
      carry: (hidden [B, S, D], cache or None).
      weights: this layer's parameters, without the stacking dimension.
      index: i32[] number of the layer, where the cache holds its columns.
      rope: from :func:`rope_table`.
      mask: bool[B, 1, S, L] columns each token attends to.

    Returns:
      (hidden, cache) for the next layer.
    """
    hidden, cache = carry
    w = {n: p[...].astype(config.dtype) for n, p in vars(weights).items()
         if isinstance(p, nnx.Param)}  # fmt: skip
    eps = config.norm_eps
    normed = rms_norm(hidden, w["attention_norm"], eps)
    attended, cache = _attention(config, w, normed, cache, index, rope, mask)
    hidden = hidden + attended
    normed = rms_norm(hidden, w["mlp_norm"], eps)
    inner = jax.nn.silu(_linear(normed, w["gate"])) * _linear(normed, w["up"])
    inner = constrain(inner, "batch", "sequence", "activation_mlp")
    hidden = hidden + _linear(inner, w["down"])
    return constrain(hidden, "batch", "sequence", "activation_embed"), cache


def _attention(
    config: DecoderConfig,
    w: dict[str, jax.Array],
    x: jax.Array,
    cache: Cache | None,
    index: jax.Array,
    rope: tuple[jax.Array, jax.Array],
    mask: jax.Array,
) -> tuple[jax.Array, Cache | None]:
    query, key = _linear(x, w["q"]), _linear(x, w["k"])
    value = _linear(x, w["v"])
    if config.qk_norm:
        query = rms_norm(query, w["q_norm"], config.norm_eps)
        key = rms_norm(key, w["k_norm"], config.norm_eps)
    query, key = _rotate(query, rope), _rotate(key, rope)
    if cache is not None:
        cache, key, value = _write(cache, key, value, index)
    query = constrain(query, "batch", "sequence", "activation_heads", None)
    key = constrain(key, "batch", "sequence", "activation_kv_heads", None)
    value = constrain(value, "batch", "sequence", "activation_kv_heads", None)
    out = jax.nn.dot_product_attention(query, key, value, mask=mask)
    out = out.reshape(*x.shape[:-1], -1)
    kernel = w["o"].reshape(-1, config.width)
    return _linear(out, kernel), cache


def _write(
    cache: Cache, key: jax.Array, value: jax.Array, index: jax.Array
) -> tuple[Cache, jax.Array, jax.Array]:
    """Writes one layer's new columns; returns the cache and that layer.

    The whole cache is carried through the scan over layers and written in
    place; as a scanned input and output it would be copied at every token.
    """
    start = (index, 0, cache.length, 0, 0)
    keys = jax.lax.dynamic_update_slice(cache.keys, key[None], start)
    values = jax.lax.dynamic_update_slice(cache.values, value[None], start)
    cache = cache.replace(keys=keys, values=values)
    return cache, keys[index], values[index]

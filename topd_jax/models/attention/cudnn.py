"""Attention by cuDNN on NVIDIA GPUs, a block of queries at a time.

cuDNN's kernel keeps scores in fast memory. It takes no interval mask, so it
gets the mask of a block as a bias, and computes what is masked too. Tests
lower it for CUDA; it has not run on a GPU yet.
"""

import jax
import jax.numpy as jnp


def is_there() -> bool:
    """Tell whether this process computes on NVIDIA GPUs, Ampere or later."""
    device = jax.local_devices()[0]
    return (
        "cuda" in device.client.platform_version
        and float(device.compute_capability) >= 8
    )


def takes(query: jax.Array, cap: float | None) -> bool:
    """Tell whether cuDNN is there and computes attention of such heads.

    Args:
      query: [B, S, heads, head_dim].
      cap: soft cap of the scores, None: there is none.
    """
    fits = query.shape[-1] % 8 == 0 and query.shape[-1] <= 128
    return cap is None and fits and query.dtype == jnp.bfloat16 and is_there()


def attend(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    mask: jax.Array,
    scale: float,
    *,
    implementation: str = "cudnn",
) -> jax.Array:
    """Attend from queries that share their keys by heads; differentiable.

    Args:
      query: [B, S, heads, head_dim].
      key: [B, kv_heads, L, head_dim].
      value: the same.
      mask: bool[B, 1, S, L].
      scale: of the scores.
      implementation: of ``jax.nn.dot_product_attention``.

    Returns:
      [B, S, heads, head_dim].
    """
    length, odd, more = query.shape[1], query.shape[1] % 2, key.shape[2] % 2
    # Its gradients are of even lengths; nothing attends to what is added.
    mask = jnp.pad(mask, ((0, 0), (0, 0), (0, odd), (0, more)))
    query = jnp.pad(query, ((0, 0), (0, odd), (0, 0), (0, 0)))
    key, value = (
        jnp.pad(jnp.swapaxes(x, 1, 2), ((0, 0), (0, more), (0, 0), (0, 0)))
        for x in (key, value)
    )
    return jax.nn.dot_product_attention(
        query, key, value, mask=mask, scale=scale, implementation=implementation
    )[:, :length]

"""TPU attention kernels for interval masks: scores stay in fast memory.

FlashAttention (Dao et al., arXiv:2205.14135, and 2307.08691 for the backward
pass), with an :class:`~topd_jax.models.attention.masks.IntervalMask`. A block
of queries needs a prefix of the keys and one interval of them. Which blocks
these are is computed first; the others are neither read nor multiplied. So a
rollout costs half of its square, and branches and packed rows only what they
attend to.

Maintained kernels cannot express these masks (read in jax 0.10.2). Splash
attention takes a mask that is known at compile time, with segments, or a dense
bool[S, L], which is 1 GiB a row at 32k tokens; paged and ragged paged attention
start every row at key 0, and so have no left padding. None takes two intervals
a query, which is what a branch of a rollout attends to.

Query heads that share keys are read together: row ``s * R + r`` of a block is
query ``s`` of the ``r``-th of ``R`` heads. Scores are held as [keys, rows],
so that what belongs to a query lies along the lanes.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from topd_jax.models.attention import flash_kernels as kernels
from topd_jax.models.attention.flash_blocks import (
    KernelMask,
    arranged,
    grouped,
    sizes_of,
    ungrouped,
)
from topd_jax.models.attention.flash_kernels import Options


def attend(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    mask: KernelMask,
    options: Options,
    blocks: Callable[..., jax.Array],
) -> jax.Array:
    """Attend by the kernels on TPU, by blocks elsewhere; differentiable.

    The choice is made when the program is lowered, so one trace serves all.

    Args:
      query: [B, S, heads, head_dim].
      key: [B, L, kv_heads, head_dim].
      value: the same.
      mask: which keys each query attends to.
      options: of the kernels.
      blocks: (query, key, value, mask) -> the same without them.

    Returns:
      [B, S, heads, head_dim].
    """

    @jax.custom_vjp
    def one(*arrays: Any) -> jax.Array:
        return read(*arrays)[0]

    def read(*arrays: Any) -> tuple[jax.Array, tuple]:
        out, normalizer = jax.lax.platform_dependent(
            *arrays,
            tpu=functools.partial(forward, options=options),
            default=lambda *x: (
                blocks(*x),
                jnp.zeros(normalizer_shape(*x[:2]), jnp.float32),
            ),
        )
        return out, (*arrays, out, normalizer)

    def plainly(*saved: Any) -> tuple:
        *arrays, mask, _, _, cotangent = saved
        _, pull = jax.vjp(lambda *x: blocks(*x, mask), *arrays)
        return pull(cotangent)

    def back(saved: tuple, cotangent: jax.Array) -> tuple:
        cotangents = jax.lax.platform_dependent(
            *saved,
            cotangent,
            tpu=functools.partial(backward, options=options),
            default=plainly,
        )
        nothing = jax.tree.map(
            lambda x: np.zeros(x.shape, jax.dtypes.float0), saved[3]
        )
        return *cotangents, nothing

    one.defvjp(read, back)
    return one(query, key, value, mask)


def forward(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    mask: KernelMask,
    options: Options,
    *,
    causal: bool = True,
) -> tuple[jax.Array, jax.Array]:
    """Compute attention and the log-normalizer of every query.

    Args:
      query: [B, S, heads, head_dim].
      key: [B, L, kv_heads, head_dim]; ``heads`` is a multiple of kv_heads.
      value: the same.
      mask: which keys each query attends to.
      options: see :class:`Options`.
      causal: what the cost is estimated for, see :func:`flash_kernels.call`.

    Returns:
      [B, S, heads, head_dim] in the query's dtype, zero where a query has no
      keys; f32 for :func:`backward`, of :func:`normalizer_shape`.
    """
    sizes = sizes_of(query, key)
    arrays, tables = arranged(sizes, query, key, value, mask)
    lanes, size = sizes.lanes, sizes.size
    row = jax.ShapeDtypeStruct(normalizer_shape(query, key), jnp.float32)
    out, normalizer = kernels.call(
        kernels.READ, sizes, options, tables, arrays,
        outputs={"query": arrays["query"], "normalizer": row},
        sums=[(size, lanes), (1, lanes), (1, lanes)], causal=causal,
    )  # fmt: skip
    return ungrouped(sizes, out), normalizer


def normalizer_shape(query: jax.Array, key: jax.Array) -> tuple[int, ...]:
    """Return (B, kv_heads, 1, padded queries * R), of the log-normalizers."""
    sizes = sizes_of(query, key)
    return sizes.rows, sizes.groups, 1, sizes.query_blocks * sizes.lanes


def backward(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    mask: KernelMask,
    out: jax.Array,
    normalizer: jax.Array,
    cotangent: jax.Array,
    options: Options,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Compute the gradients of :func:`forward` for query, key and value.

    Args:
      query: as there.
      key: as there.
      value: as there.
      mask: as there.
      out: what it returned.
      normalizer: the same.
      cotangent: gradient of ``out``.
      options: as there.

    Returns:
      The three, in shapes and dtypes of what they belong to.
    """
    sizes = sizes_of(query, key)
    arrays, tables = arranged(sizes, query, key, value, mask)
    cotangent = grouped(sizes, cotangent)
    out = grouped(sizes, out).astype(jnp.float32)
    delta = jnp.sum(out * cotangent.astype(jnp.float32), axis=-1)
    arrays |= {
        "cotangent": cotangent, "normalizer": normalizer,
        "delta": delta[:, :, None],
    }  # fmt: skip
    lanes, size, keys = sizes.lanes, sizes.size, sizes.keys
    (on_query,) = kernels.call(
        kernels.ON_QUERY, sizes, options, tables, arrays,
        outputs={"query": arrays["query"]},
        sums=[(lanes, size)],
    )  # fmt: skip
    on_key, on_value = kernels.call(
        kernels.ON_KEY, sizes, options, tables, arrays,
        outputs={n: arrays[n] for n in ("key", "value")},
        sums=[(keys, size), (keys, size)],
    )  # fmt: skip
    on_key, on_value = (
        jnp.swapaxes(x, 1, 2)[:, : key.shape[1]] for x in (on_key, on_value)
    )
    return ungrouped(sizes, on_query), on_key, on_value

"""TPU attention kernels for interval masks: scores stay in fast memory.

FlashAttention (Dao et al., arXiv:2205.14135, and 2307.08691 for the backward
pass), with an :class:`~topd_jax.models.attention.masks.IntervalMask`. A block
of queries needs a prefix of the keys and one interval of them. Which blocks
these are is computed first; the others are neither read nor multiplied. So a
rollout costs half of its square, and branches, packed rows and layers that
slide only what they attend to.

Maintained kernels cannot express these masks. A branch leaves the rollout where
the run finds it, so its prefix ends at a number that no compile-time mask and
no segment knows. Splash attention (jax 0.10.2) then takes a dense bool[S, L],
held as i32 for each of its kernels: compiled for v5p, a row of 32k tokens with
218 branches of 49 behind it takes 22 GB of temporaries, on any tensor axis,
where these take 2.0, and 0.5 on an axis of four; 4096 queries at a time take
3.3 GB there and 47 ms of memory traffic where these take 38 ms in all. Nor
does it skip other segments, or tell a plan what it costs. tokamax (0.0.12, and
0.0.17, which needs jax 0.11) has bounds for each query, but not on TPUs. Paged
attention starts every row at key 0, and so has no left padding.

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
    arranged,
    grouped,
    sizes_of,
    ungrouped,
)
from topd_jax.models.attention.flash_kernels import Options
from topd_jax.models.attention.masks import IntervalMask


def attend(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    mask: IntervalMask,
    options: Options,
    blocks: Callable[..., jax.Array],
) -> jax.Array:
    """Attend by the kernels on TPU, by blocks elsewhere; differentiable.

    The choice is made when the program is lowered, so one trace serves all.

    Args:
      query: [B, S, heads, head_dim].
      key: [B, kv_heads, L, head_dim].
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
    mask: IntervalMask,
    options: Options,
    *,
    causal: bool = True,
) -> tuple[jax.Array, jax.Array]:
    """Compute attention and the log-normalizer of every query.

    Args:
      query: [B, S, heads, head_dim].
      key: [B, kv_heads, L, head_dim]; ``heads`` is a multiple of kv_heads.
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
    mask: IntervalMask,
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
    on_key, on_value = (x[:, :, : key.shape[2]] for x in (on_key, on_value))
    return ungrouped(sizes, on_query), on_key, on_value

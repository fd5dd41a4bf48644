"""Attention over spans as TPU kernels: no score leaves the chip's fast memory.

FlashAttention (Dao et al., arXiv:2205.14135, and 2307.08691 for the backward
pass), with the mask told by :class:`~topd_jax.models.attention.masks.Spans`. A
block of queries
needs a prefix of the columns and one stretch of them; which blocks that are is
worked out beforehand, and the others are neither read nor multiplied. So a
rollout costs half of its square, and branches and packed rows only what they
see. JAX's own splash attention asks for a mask that is known when the program
is compiled, and segments; neither says which prefix a branch leaves.

Query heads that share keys are read together: row ``s * R + r`` of a block is
query ``s`` of the ``r``-th of ``R`` heads. Scores are held as [columns, rows],
so that what belongs to a query lies along the lanes. Ours.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from topd_jax.models.attention import flash_kernels as kernels
from topd_jax.models.attention.flash_blocks import (
    Seen,
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
    seen: Seen,
    options: Options,
    blocks: Callable[..., jax.Array],
) -> jax.Array:
    """Attention by the kernels on TPU, otherwise elsewhere; differentiable.

    The choice is made when the program is lowered, so one trace serves all.

    Args:
      query: [B, S, heads, head_dim].
      key: [B, L, kv_heads, head_dim].
      value: the same.
      seen: what each query sees.
      options: of the kernels.
      blocks: (query, key, value, seen) -> the same without them.

    Returns:
      [B, S, heads, head_dim].
    """

    @jax.custom_vjp
    def one(*arrays: Any) -> jax.Array:
        return read(*arrays)[0]

    def read(*arrays: Any) -> tuple[jax.Array, tuple]:
        out, normaliser = jax.lax.platform_dependent(
            *arrays,
            tpu=functools.partial(forward, options=options),
            default=lambda *x: (
                blocks(*x),
                jnp.zeros(normaliser_shape(*x[:2]), jnp.float32),
            ),
        )
        return out, (*arrays, out, normaliser)

    def plainly(*saved: Any) -> tuple:
        *arrays, seen, _, _, slope = saved
        _, pull = jax.vjp(lambda *x: blocks(*x, seen), *arrays)
        return pull(slope)

    def back(saved: tuple, slope: jax.Array) -> tuple:
        slopes = jax.lax.platform_dependent(
            *saved,
            slope,
            tpu=functools.partial(backward, options=options),
            default=plainly,
        )
        nothing = jax.tree.map(
            lambda x: np.zeros(x.shape, jax.dtypes.float0), saved[3]
        )
        return *slopes, nothing

    one.defvjp(read, back)
    return one(query, key, value, seen)


def forward(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    seen: Seen,
    options: Options,
    *,
    causal: bool = True,
) -> tuple[jax.Array, jax.Array]:
    """Attention, and the log-normaliser of every query.

    Args:
      query: [B, S, heads, head_dim].
      key: [B, L, kv_heads, head_dim]; ``heads`` is a multiple of kv_heads.
      value: the same.
      seen: what each query sees.
      options: see :class:`Options`.
      causal: what the cost is estimated for, see :func:`flash_kernels.call`.

    Returns:
      [B, S, heads, head_dim] in the query's dtype, zero where a query sees
      nothing; f32 for :func:`backward`, of :func:`normaliser_shape`.
    """
    sizes = sizes_of(query, key)
    arrays, tables = arranged(sizes, query, key, value, seen)
    lanes, size = sizes.lanes, sizes.size
    row = jax.ShapeDtypeStruct(normaliser_shape(query, key), jnp.float32)
    out, normaliser = kernels.call(
        kernels.READ, sizes, options, tables, arrays,
        outputs={"query": arrays["query"], "normaliser": row},
        sums=[(size, lanes), (1, lanes), (1, lanes)], causal=causal,
    )  # fmt: skip
    return ungrouped(sizes, out), normaliser


def normaliser_shape(query: jax.Array, key: jax.Array) -> tuple[int, ...]:
    """Of a call's log-normalisers: (B, kv_heads, 1, padded queries * R)."""
    sizes = sizes_of(query, key)
    return sizes.rows, sizes.groups, 1, sizes.query_blocks * sizes.lanes


def backward(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    seen: Seen,
    out: jax.Array,
    normaliser: jax.Array,
    slope: jax.Array,
    options: Options,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Gradients of :func:`forward` for query, key and value.

    Args:
      query: as there.
      key: as there.
      value: as there.
      seen: as there.
      out: what it returned.
      normaliser: the same.
      slope: gradient of ``out``.
      options: as there.

    Returns:
      The three, in shapes and dtypes of what they belong to.
    """
    sizes = sizes_of(query, key)
    arrays, tables = arranged(sizes, query, key, value, seen)
    slope = grouped(sizes, slope)
    out = grouped(sizes, out).astype(jnp.float32)
    delta = jnp.sum(out * slope.astype(jnp.float32), axis=-1)
    arrays |= {
        "slope": slope, "normaliser": normaliser, "delta": delta[:, :, None]
    }  # fmt: skip
    lanes, size, columns = sizes.lanes, sizes.size, sizes.columns
    (on_query,) = kernels.call(
        kernels.ON_QUERY, sizes, options, tables, arrays,
        outputs={"query": arrays["query"]},
        sums=[(lanes, size)],
    )  # fmt: skip
    on_key, on_value = kernels.call(
        kernels.ON_KEY, sizes, options, tables, arrays,
        outputs={n: arrays[n] for n in ("key", "value")},
        sums=[(columns, size), (columns, size)],
    )  # fmt: skip
    on_key, on_value = (
        jnp.swapaxes(x, 1, 2)[:, : key.shape[1]] for x in (on_key, on_value)
    )
    return ungrouped(sizes, on_query), on_key, on_value

"""The kernels of ``flash``, and how they are called for blocks.

A kernel visits the pairs of blocks that need each other, adds the result of
each to f32 arrays in fast memory, and writes its outputs after the last pair of
its outer block. Blocks are [rows of a query block, D] and [keys, D];
what belongs to a query is [1, rows], to a key [keys, 1].
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from topd_jax.models.attention.flash_blocks import (
    Sizes,
    Tables,
    nearest_key,
    nearest_query,
    needed,
)
from topd_jax.types import soft_cap

# Far below any score; finite, since a row without keys must not be nan.
MASKED_SCORE = -1e30
# What the sums of an online softmax begin with.
EMPTY = (0.0, MASKED_SCORE, 0.0)


class Options(NamedTuple):
    """What does not change from call to call; static.

    Attributes:
      scale: of the scores.
      cap: soft cap of the scaled scores; None: there is none.
      interpret: run the kernels without a TPU, slowly.
    """

    scale: float
    cap: float | None = None
    interpret: bool = False


class Kernel(NamedTuple):
    """What is done with a pair of blocks, and after the last one.

    Attributes:
      add: (sizes, options, name -> ref, sums, the key block).
      finish: (options, sums, output refs).
      empty: what each of the sums begins with.
      products: of matrices, a pair.
      by_key: the outer loop is over keys, the inner one over queries.
    """

    add: Callable[..., None]
    finish: Callable[..., None]
    empty: tuple[float, ...]
    products: int
    by_key: bool = False


def call(
    kernel: Kernel,
    sizes: Sizes,
    options: Options,
    tables: Tables,
    arrays: dict[str, jax.Array],
    *,
    outputs: dict[str, Any],
    sums: list[tuple[int, int]],
    causal: bool = True,
) -> list[jax.Array]:
    """Run a kernel over rows, heads and pairs of blocks.

    Args:
      kernel: one of this file's.
      sizes: of the call.
      options: of the call.
      tables: of the call.
      arrays: name -> array.
      outputs: name, for its blocks -> array like it.
      sums: shapes of the f32 arrays that it adds to.
      causal: estimate the cost of half of all pairs, or of all.

    Returns:
      The outputs.
    """
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import tpu as pltpu

    steps = sizes.query_blocks, sizes.key_blocks
    outer, inner = steps[::-1] if kernel.by_key else steps
    return pl.pallas_call(
        functools.partial(
            _visit, kernel, sizes, options, list(arrays), len(outputs), inner
        ),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(tables),
            grid=(sizes.rows, sizes.groups, outer, inner),
            in_specs=[_spec(sizes, n, kernel.by_key) for n in arrays],
            out_specs=[_spec(sizes, n, kernel.by_key) for n in outputs],
            scratch_shapes=[pltpu.VMEM(s, jnp.float32) for s in sums],
        ),
        out_shape=[
            jax.ShapeDtypeStruct(x.shape, x.dtype) for x in outputs.values()
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel",) * 3 + ("arbitrary",)
        ),
        cost_estimate=_cost(kernel, sizes, arrays, outputs, outer, causal),
        interpret=options.interpret,
    )(*tables, *arrays.values())


def _visit(
    kernel: Kernel,
    sizes: Sizes,
    options: Options,
    names: list[str],
    outputs: int,
    steps: int,
    *refs: Any,
) -> None:
    """Run a step of the grid: begin, add a needed pair, or finish."""
    from jax.experimental import pallas as pl

    count = len(Tables._fields)
    tables, refs = Tables(*refs[:count]), refs[count:]
    inputs = dict(zip(names, refs, strict=False))
    out_refs, sums = refs[len(names) :][:outputs], refs[len(names) + outputs :]
    row, _, outer, step = (pl.program_id(i) for i in range(4))
    query, key = (step, outer) if kernel.by_key else (outer, step)

    @pl.when(step == 0)
    def _() -> None:
        for total, empty in zip(sums, kernel.empty, strict=True):
            total[...] = jnp.full_like(total, empty)

    @pl.when(needed(tables, row, query, key))
    def _() -> None:
        kernel.add(sizes, options, inputs, sums, key)

    @pl.when(step == steps - 1)
    def _() -> None:
        kernel.finish(options, sums, out_refs)


def _spec(sizes: Sizes, name: str, by_key: bool) -> Any:
    """Locate the block of an array at a step of the grid."""
    from jax.experimental import pallas as pl

    def place(row: Any, group: Any, outer: Any, inner: Any, *refs: Any) -> Any:
        tables = Tables(*refs)
        if by_key:
            query, key = nearest_query(tables, row, inner, outer), outer
        else:
            query, key = outer, nearest_key(tables, row, outer, inner)
        places = {"row": row, "group": group, "query": query, "key": key}
        return tuple(places.get(axis, 0) for axis in axes)

    axes = _AXES[name]
    shape = {"key": sizes.keys, "query": sizes.lanes, "size": sizes.size}
    whole = {"row": None, "group": None, "one": 1}
    return pl.BlockSpec([(shape | whole)[axis] for axis in axes], place)


def _cost(
    kernel: Kernel,
    sizes: Sizes,
    arrays: dict[str, jax.Array],
    outputs: dict[str, Any],
    outer: int,
    causal: bool,
) -> Any:
    """Estimate the cost of a call, whose inner loop is read ``outer`` times."""
    from jax.experimental import pallas as pl

    keys = arrays["key"].shape[2]
    pairs = sizes.length * keys
    if causal:
        pairs = sizes.length * min(sizes.length, keys) // 2
        outer = max(outer // 2, 1)
    pairs *= sizes.rows * sizes.groups * sizes.shared
    moved = sum(math.prod(x.shape) * x.dtype.itemsize for x in outputs.values())
    for name, x in arrays.items():
        times = 1 if ("key" in _AXES[name]) == kernel.by_key else outer
        moved += times * math.prod(x.shape) * x.dtype.itemsize
    return pl.CostEstimate(
        flops=2 * kernel.products * pairs * sizes.size,
        transcendentals=pairs,
        bytes_accessed=moved,
    )


_OF_QUERY = ("row", "group", "query", "size")
_OF_KEY = ("row", "group", "key", "size")
_AXES = {
    "query": _OF_QUERY,
    "cotangent": _OF_QUERY,
    "key": _OF_KEY,
    "value": _OF_KEY,
    "exists": ("row", "key", "one"),
    **dict.fromkeys(
        ("begin", "prefix", "first", "last"), ("row", "one", "query")
    ),
    **dict.fromkeys(("normalizer", "delta"), ("row", "group", "one", "query")),
}


def dot(
    x: jax.Array,
    y: jax.Array,
    over: tuple[int, int],
    batch: tuple[int, ...] = (),
) -> jax.Array:
    """Multiply in f32, over one axis of each; ``batch`` axes are of both."""
    precise = x.dtype == jnp.float32
    return jax.lax.dot_general(
        x,
        y,
        (((over[0],), (over[1],)), (batch, batch)),
        precision=jax.lax.Precision.HIGHEST if precise else None,
        preferred_element_type=jnp.float32,
    )


def _scores(
    sizes: Sizes, options: Options, refs: dict, block: Any
) -> tuple[jax.Array, jax.Array]:
    """Return the scores [keys, lanes] of a pair of blocks, and their mask."""
    scores = dot(refs["key"][...], refs["query"][...], (1, 1))
    scores = soft_cap(scores * options.scale, options.cap)
    at = jax.lax.broadcasted_iota(jnp.int32, scores.shape, 0)
    at += block * sizes.keys
    mask = (refs["first"][...] <= at) & (at <= refs["last"][...])
    mask |= (refs["begin"][...] <= at) & (at < refs["prefix"][...])
    return scores, mask & (refs["exists"][...] != 0)


def add_keys(
    sums: tuple,
    scores: jax.Array,
    mask: jax.Array,
    product: Callable[[jax.Array], jax.Array],
    axis: int,
) -> None:
    """Add a block of keys to an online softmax.

    Args:
      sums: refs of its sum of values, maximum, and weight; see ``EMPTY``.
      scores: f32[...].
      mask: bool[...], the same shape.
      product: softmax -> its product with the values.
      axis: of the keys.
    """
    total, maximum, weight = sums
    scores = jnp.where(mask, scores, MASKED_SCORE)
    old = maximum[...]
    new = jnp.maximum(old, jnp.max(scores, axis=axis, keepdims=True))
    share = jnp.where(mask, jnp.exp(scores - new), 0.0)
    keep = jnp.exp(old - new)
    maximum[...] = new
    weight[...] = weight[...] * keep + jnp.sum(share, axis, keepdims=True)
    total[...] = total[...] * keep + product(share)


def _add_read(
    sizes: Sizes, options: Options, refs: dict, sums: tuple, block: Any
) -> None:
    scores, mask = _scores(sizes, options, refs, block)
    value = refs["value"][...]

    def product(share: jax.Array) -> jax.Array:
        return dot(value, share.astype(value.dtype), (0, 0))

    add_keys(sums, scores, mask, product, axis=0)


def _finish_read(options: Options, sums: tuple, outputs: tuple) -> None:
    (total, maximum, weight), (out, normalizer) = sums, outputs
    any_key = weight[...] > 0
    safe = jnp.where(any_key, weight[...], 1.0)
    out[...] = (total[...] / safe).T.astype(out.dtype)
    normalizer[...] = jnp.where(
        any_key, maximum[...] + jnp.log(safe), MASKED_SCORE
    )


def _cotangents(
    sizes: Sizes, options: Options, refs: dict, block: Any
) -> tuple[jax.Array, jax.Array]:
    """Return softmax and the gradients of the scores, [keys, lanes] each."""
    scores, mask = _scores(sizes, options, refs, block)
    share = jnp.where(mask, jnp.exp(scores - refs["normalizer"][...]), 0.0)
    on_share = dot(refs["value"][...], refs["cotangent"][...], (1, 1))
    cotangent = share * (on_share - refs["delta"][...])
    if options.cap is not None:
        cotangent *= 1.0 - (scores / options.cap) ** 2
    return share, cotangent


def _add_on_query(
    sizes: Sizes, options: Options, refs: dict, sums: tuple, block: Any
) -> None:
    _, cotangent = _cotangents(sizes, options, refs, block)
    key = refs["key"][...]
    sums[0][...] += dot(cotangent.astype(key.dtype), key, (0, 0))


def _add_on_key(
    sizes: Sizes, options: Options, refs: dict, sums: tuple, block: Any
) -> None:
    on_key, on_value = sums
    share, cotangent = _cotangents(sizes, options, refs, block)
    query, on_out = refs["query"][...], refs["cotangent"][...]
    on_value[...] += dot(share.astype(on_out.dtype), on_out, (1, 0))
    on_key[...] += dot(cotangent.astype(query.dtype), query, (1, 0))


def _finish_gradients(options: Options, sums: tuple, outputs: tuple) -> None:
    """Write the gradients of queries; or of keys, and of values."""
    scales = (options.scale, 1.0)
    for total, out, scale in zip(sums, outputs, scales, strict=False):
        out[...] = (total[...] * scale).astype(out.dtype)


# Attention [rows, D] and log-normalizers; sums: [D, rows], and twice [1, rows].
READ = Kernel(_add_read, _finish_read, EMPTY, products=2)
# Gradient of a query block; sums: [rows, D].
ON_QUERY = Kernel(_add_on_query, _finish_gradients, (0.0,), products=3)
# Gradients of a block of keys and of values; sums: twice [keys, D].
ON_KEY = Kernel(
    _add_on_key, _finish_gradients, (0.0, 0.0), products=4, by_key=True
)

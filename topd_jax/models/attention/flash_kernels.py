"""The kernels of ``flash``, and how they are called for blocks. Ours.

A kernel visits the pairs of blocks that need each other, adds what each gives
to f32 arrays that stay in fast memory, and writes its outputs after the last
pair of its outer block. Blocks are [rows of a query block, D] and [columns, D];
what belongs to a query is [1, rows], to a column [columns, 1].
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
    column_block,
    query_block,
)
from topd_jax.types import soft_cap

# Far below any score; finite, since a row that sees nothing must not be nan.
UNSEEN = -1e30


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
      add: (sizes, options, tables, name -> ref, sums, the column block).
      finish: (options, sums, output refs).
      empty: what each of the sums begins with.
      products: of matrices, a pair.
      by_column: the outer loop is over columns, the inner one over queries.
    """

    add: Callable[..., None]
    finish: Callable[..., None]
    empty: tuple[float, ...]
    products: int
    by_column: bool = False


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
    """Runs a kernel over rows, heads and pairs of blocks.

    Args:
      kernel: one of this file's.
      sizes: of the call.
      options: of the call.
      tables: of the call.
      arrays: name -> array.
      outputs: name, for its blocks -> array like it.
      sums: shapes of the f32 arrays that it adds to.
      causal: estimate the cost of a causal reading, of whose pairs half are
        seen; otherwise, at the most, that of all pairs.

    Returns:
      The outputs.
    """
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import tpu as pltpu

    steps = sizes.query_blocks, sizes.column_blocks
    outer, inner = steps[::-1] if kernel.by_column else steps
    columns = arrays["key"].shape[2]
    pairs = sizes.length * columns
    if causal:
        pairs = sizes.length * min(sizes.length, columns) // 2
    pairs *= sizes.rows * sizes.groups * sizes.shared
    return pl.pallas_call(
        functools.partial(
            _visit, kernel, sizes, options, list(arrays), len(outputs), inner
        ),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(tables),
            grid=(sizes.rows, sizes.groups, outer, inner),
            in_specs=[_spec(sizes, n, kernel.by_column) for n in arrays],
            out_specs=[_spec(sizes, n, kernel.by_column) for n in outputs],
            scratch_shapes=[pltpu.VMEM(s, jnp.float32) for s in sums],
        ),
        out_shape=[
            jax.ShapeDtypeStruct(x.shape, x.dtype) for x in outputs.values()
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel",) * 3 + ("arbitrary",)
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * kernel.products * pairs * sizes.size,
            transcendentals=pairs,
            bytes_accessed=_bytes(
                arrays,
                outputs,
                max(outer // 2, 1) if causal else outer,
                kernel.by_column,
            ),
        ),
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
    """A step of the grid: begins, adds a pair that is needed, or finishes."""
    from jax.experimental import pallas as pl

    count = len(Tables._fields)
    tables, refs = Tables(*refs[:count]), refs[count:]
    given = dict(zip(names, refs, strict=False))
    made, sums = refs[len(names) :][:outputs], refs[len(names) + outputs :]
    row, _, outer, step = (pl.program_id(i) for i in range(4))
    if kernel.by_column:
        column, (_, needed) = outer, query_block(tables, row, outer, step)
    else:
        column, needed = column_block(tables, row, outer, step)

    @pl.when(step == 0)
    def _() -> None:
        for total, empty in zip(sums, kernel.empty, strict=True):
            total[...] = jnp.full_like(total, empty)

    @pl.when(needed)
    def _() -> None:
        kernel.add(sizes, options, tables, given, sums, column)

    @pl.when(step == steps - 1)
    def _() -> None:
        kernel.finish(options, sums, made)


def _spec(sizes: Sizes, name: str, by_column: bool) -> Any:
    """Where the block of an array is at a step of the grid."""
    from jax.experimental import pallas as pl

    def blocks(row: Any, outer: Any, inner: Any, *refs: Any) -> tuple:
        tables = Tables(*refs)
        if by_column:
            return query_block(tables, row, outer, inner)[0], outer
        return outer, column_block(tables, row, outer, inner)[0]

    def place(row: Any, group: Any, *at: Any) -> tuple:
        query, column = blocks(row, *at)
        return {
            "query": (row, group, query, 0),
            "column": (row, group, column, 0),
            "exists": (row, column, 0),
            "span": (row, 0, query),
            "normaliser": (row, group, 0, query),
        }[_KINDS[name]]

    shape = {
        "query": (None, None, sizes.lanes, sizes.size),
        "column": (None, None, sizes.columns, sizes.size),
        "exists": (None, sizes.columns, 1),
        "span": (None, 1, sizes.lanes),
        "normaliser": (None, None, 1, sizes.lanes),
    }[_KINDS[name]]
    return pl.BlockSpec(shape, place)


def _bytes(
    arrays: dict[str, jax.Array],
    outputs: dict[str, Any],
    times: int,
    by_column: bool,
) -> int:
    """Main memory's: what the inner loop reads comes so many times."""
    total = 0
    for name, x in arrays.items():
        of_column = _KINDS[name] in ("column", "exists")
        again = 1 if of_column == by_column else times
        total += again * math.prod(x.shape) * x.dtype.itemsize
    made = outputs.values()
    return total + sum(math.prod(x.shape) * x.dtype.itemsize for x in made)


_KINDS = {
    "query": "query",
    "slope": "query",
    "key": "column",
    "value": "column",
    "exists": "exists",
    "column_place": "exists",
    "prefix": "span",
    "first": "span",
    "last": "span",
    "place": "span",
    "normaliser": "normaliser",
    "delta": "normaliser",
}


def dot(
    x: jax.Array,
    y: jax.Array,
    over: tuple[int, int],
    batch: tuple[int, ...] = (),
) -> jax.Array:
    """A product in f32, over one axis of each; ``batch`` axes are of both."""
    precise = x.dtype == jnp.float32
    return jax.lax.dot_general(
        x,
        y,
        (((over[0],), (over[1],)), (batch, batch)),
        precision=jax.lax.Precision.HIGHEST if precise else None,
        preferred_element_type=jnp.float32,
    )


def _scores(
    sizes: Sizes, options: Options, tables: Tables, refs: dict, column: Any
) -> tuple[jax.Array, jax.Array]:
    """Scores [columns, lanes] of a pair of blocks, and which of them count."""
    scores = dot(refs["key"][...], refs["query"][...], (1, 1))
    scores = soft_cap(scores * options.scale, options.cap)
    at = jax.lax.broadcasted_iota(jnp.int32, scores.shape, 0)
    at += column * sizes.columns
    mask = (refs["first"][...] <= at) & (at <= refs["last"][...])
    mask |= at < refs["prefix"][...]
    mask &= refs["exists"][...] != 0
    if "place" in refs:
        back = refs["place"][...] - refs["column_place"][...]
        mask &= back < tables.reach[0]
    return scores, mask


def _add_read(
    sizes: Sizes,
    options: Options,
    tables: Tables,
    refs: dict,
    sums: tuple,
    column: Any,
) -> None:
    total, most, weight = sums
    scores, mask = _scores(sizes, options, tables, refs, column)
    scores = jnp.where(mask, scores, UNSEEN)
    old = most[...]
    new = jnp.maximum(old, jnp.max(scores, axis=0, keepdims=True))
    share = jnp.where(mask, jnp.exp(scores - new), 0.0)
    keep = jnp.exp(old - new)
    most[...] = new
    weight[...] = weight[...] * keep + jnp.sum(share, 0, keepdims=True)
    value = refs["value"][...]
    more = dot(value, share.astype(value.dtype), (0, 0))
    total[...] = total[...] * keep + more


def _finish_read(options: Options, sums: tuple, made: tuple) -> None:
    (total, most, weight), (out, normaliser) = sums, made
    seen = weight[...] > 0
    safe = jnp.where(seen, weight[...], 1.0)
    out[...] = (total[...] / safe).T.astype(out.dtype)
    normaliser[...] = jnp.where(seen, most[...] + jnp.log(safe), UNSEEN)


def _slopes(
    sizes: Sizes, options: Options, tables: Tables, refs: dict, column: Any
) -> tuple[jax.Array, jax.Array]:
    """Shares and gradients of the scaled products, [columns, lanes] each."""
    scores, mask = _scores(sizes, options, tables, refs, column)
    share = jnp.where(mask, jnp.exp(scores - refs["normaliser"][...]), 0.0)
    on_share = dot(refs["value"][...], refs["slope"][...], (1, 1))
    slope = share * (on_share - refs["delta"][...])
    if options.cap is not None:
        slope *= 1.0 - (scores / options.cap) ** 2
    return share, slope


def _add_on_query(
    sizes: Sizes,
    options: Options,
    tables: Tables,
    refs: dict,
    sums: tuple,
    column: Any,
) -> None:
    _, slope = _slopes(sizes, options, tables, refs, column)
    key = refs["key"][...]
    sums[0][...] += dot(slope.astype(key.dtype), key, (0, 0))


def _finish_on_query(options: Options, sums: tuple, made: tuple) -> None:
    made[0][...] = (sums[0][...] * options.scale).astype(made[0].dtype)


def _add_on_key(
    sizes: Sizes,
    options: Options,
    tables: Tables,
    refs: dict,
    sums: tuple,
    column: Any,
) -> None:
    on_key, on_value = sums
    share, slope = _slopes(sizes, options, tables, refs, column)
    query, on_out = refs["query"][...], refs["slope"][...]
    on_value[...] += dot(share.astype(on_out.dtype), on_out, (1, 0))
    on_key[...] += dot(slope.astype(query.dtype), query, (1, 0))


def _finish_on_key(options: Options, sums: tuple, made: tuple) -> None:
    made[0][...] = (sums[0][...] * options.scale).astype(made[0].dtype)
    made[1][...] = sums[1][...].astype(made[1].dtype)


# Attention [rows, D] and log-normalisers; sums: [D, rows], and twice [1, rows].
READ = Kernel(_add_read, _finish_read, (0.0, UNSEEN, 0.0), products=2)
# Gradient of a query block; sums: [rows, D].
ON_QUERY = Kernel(_add_on_query, _finish_on_query, (0.0,), products=3)
# Gradients of a block of keys and of values; sums: twice [columns, D].
ON_KEY = Kernel(
    _add_on_key, _finish_on_key, (0.0, 0.0), products=4, by_column=True
)

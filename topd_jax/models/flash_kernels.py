"""The kernels of ``flash``, and how they are called for blocks. Ours."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from topd_jax.models.flash_blocks import (
    Sizes,
    Tables,
    column_block,
    query_block,
)

# Far below any score; finite, since a row that sees nothing must not be nan.
_UNSEEN = -1e30


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


def call(
    kernel: Callable[..., None],
    sizes: Sizes,
    options: Options,
    tables: Tables,
    arrays: dict[str, jax.Array],
    *,
    outputs: dict[str, Any],
    scratch: list[tuple[int, int]],
    products: int,
    by_column: bool = False,
) -> list[jax.Array]:
    """Runs a kernel over rows, heads and pairs of blocks.

    Args:
      kernel: (tables, name -> ref, scratch refs, output refs).
      sizes: of the call.
      options: of the call.
      tables: of the call.
      arrays: name -> array.
      outputs: name, for its blocks -> array like it.
      scratch: f32 shapes.
      products: of matrices, a pair of blocks.
      by_column: the inner loop is over queries.

    Returns:
      The outputs.
    """
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import tpu as pltpu

    steps = sizes.query_blocks, sizes.column_blocks
    names = list(arrays)

    def blocks(row: Any, outer: Any, inner: Any, tables: Tables) -> tuple:
        if by_column:
            return query_block(tables, row, outer, inner)[0], outer
        return outer, column_block(tables, row, outer, inner)[0]

    def spec(name: str) -> pl.BlockSpec:
        def place(row, group, outer, inner, *refs):
            query, column = blocks(row, outer, inner, Tables(*refs))
            return {
                "query": (row, group, query, 0),
                "column": (row, group, column, 0),
                "exists": (row, column, 0),
                "span": (row, 0, query),
                "normaliser": (row, group, 0, query),
            }[kind]

        kind = _KINDS[name]
        shape = {
            "query": (None, None, sizes.lanes, sizes.size),
            "column": (None, None, sizes.columns, sizes.size),
            "exists": (None, sizes.columns, 1),
            "span": (None, 1, sizes.lanes),
            "normaliser": (None, None, 1, sizes.lanes),
        }[kind]
        return pl.BlockSpec(shape, place)

    def run(*refs: Any) -> None:
        told, refs = Tables(*refs[: len(tables)]), refs[len(tables) :]
        given = dict(zip(names, refs, strict=False))
        made = refs[len(names) : len(names) + len(outputs)]
        kernel(told, given, refs[len(names) + len(outputs) :], made)

    grid = (sizes.rows, sizes.groups, *(steps[::-1] if by_column else steps))
    # Of a causal reading half of the pairs are seen.
    pairs = sizes.length * min(sizes.length, arrays["key"].shape[2]) // 2
    pairs *= sizes.rows * sizes.groups * sizes.shared
    moved = _bytes(sizes, arrays, outputs, by_column)
    return pl.pallas_call(
        run,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(tables),
            grid=grid,
            in_specs=[spec(name) for name in names],
            out_specs=[spec(name) for name in outputs],
            scratch_shapes=[pltpu.VMEM(s, jnp.float32) for s in scratch],
        ),
        out_shape=[
            jax.ShapeDtypeStruct(x.shape, x.dtype) for x in outputs.values()
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel",) * 3 + ("arbitrary",)
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * products * pairs * sizes.size,
            transcendentals=pairs,
            bytes_accessed=moved,
        ),
        interpret=options.interpret,
    )(*tables, *arrays.values())


def _bytes(
    sizes: Sizes,
    arrays: dict[str, jax.Array],
    outputs: dict[str, Any],
    by_column: bool,
) -> int:
    """Main memory's: what the inner loop reads comes for half of the outer."""
    total = 0
    outer = sizes.column_blocks if by_column else sizes.query_blocks
    for name, x in arrays.items():
        of_column = _KINDS[name] in ("column", "exists")
        again = 1 if of_column == by_column else max(outer // 2, 1)
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


def _dot(x: jax.Array, y: jax.Array, over: tuple[int, int]) -> jax.Array:
    """A product in f32, over one axis of each."""
    precise = x.dtype == jnp.float32
    return jax.lax.dot_general(
        x,
        y,
        (((over[0],), (over[1],)), ((), ())),
        precision=jax.lax.Precision.HIGHEST if precise else None,
        preferred_element_type=jnp.float32,
    )


def _scores(
    sizes: Sizes, options: Options, tables: Tables, refs: dict, column: Any
) -> tuple[jax.Array, jax.Array]:
    """Scores [columns, lanes] of a pair of blocks, and which of them count."""
    scores = _dot(refs["key"][...], refs["query"][...], (1, 1)) * options.scale
    if options.cap is not None:
        scores = options.cap * jnp.tanh(scores / options.cap)
    at = jax.lax.broadcasted_iota(jnp.int32, scores.shape, 0)
    at += column * sizes.columns
    mask = (refs["first"][...] <= at) & (at <= refs["last"][...])
    mask |= at < refs["prefix"][...]
    mask &= refs["exists"][...] != 0
    if "place" in refs:
        back = refs["place"][...] - refs["column_place"][...]
        mask &= back < tables.reach[0]
    return scores, mask


def read(
    sizes: Sizes,
    options: Options,
    tables: Tables,
    refs: dict,
    scratch: tuple,
    made: tuple,
) -> None:
    from jax.experimental import pallas as pl

    total, most, weight = scratch
    row, _, query, step = (pl.program_id(i) for i in range(4))
    column, needed = column_block(tables, row, query, step)

    @pl.when(step == 0)
    def _() -> None:
        total[...] = jnp.zeros_like(total)
        weight[...] = jnp.zeros_like(weight)
        most[...] = jnp.full_like(most, _UNSEEN)

    @pl.when(needed)
    def _() -> None:
        scores, mask = _scores(sizes, options, tables, refs, column)
        scores = jnp.where(mask, scores, _UNSEEN)
        old = most[...]
        new = jnp.maximum(old, jnp.max(scores, axis=0, keepdims=True))
        share = jnp.where(mask, jnp.exp(scores - new), 0.0)
        keep = jnp.exp(old - new)
        most[...] = new
        weight[...] = weight[...] * keep + jnp.sum(share, 0, keepdims=True)
        value = refs["value"][...]
        more = _dot(value, share.astype(value.dtype), (0, 0))
        total[...] = total[...] * keep + more

    @pl.when(step == sizes.column_blocks - 1)
    def _() -> None:
        out, normaliser = made
        seen = weight[...] > 0
        safe = jnp.where(seen, weight[...], 1.0)
        out[...] = (total[...] / safe).T.astype(out.dtype)
        normaliser[...] = jnp.where(seen, most[...] + jnp.log(safe), 0.0)


def _slopes(
    sizes: Sizes, options: Options, tables: Tables, refs: dict, column: Any
) -> tuple[jax.Array, jax.Array]:
    """Shares and gradients of the scaled products, [columns, lanes] each."""
    scores, mask = _scores(sizes, options, tables, refs, column)
    share = jnp.where(mask, jnp.exp(scores - refs["normaliser"][...]), 0.0)
    on_share = _dot(refs["value"][...], refs["slope"][...], (1, 1))
    slope = share * (on_share - refs["delta"][...])
    if options.cap is not None:
        slope *= 1.0 - (scores / options.cap) ** 2
    return share, slope


def slope_of_query(
    sizes: Sizes,
    options: Options,
    tables: Tables,
    refs: dict,
    scratch: tuple,
    made: tuple,
) -> None:
    from jax.experimental import pallas as pl

    (total,), (out,) = scratch, made
    row, _, query, step = (pl.program_id(i) for i in range(4))
    column, needed = column_block(tables, row, query, step)

    @pl.when(step == 0)
    def _() -> None:
        total[...] = jnp.zeros_like(total)

    @pl.when(needed)
    def _() -> None:
        _, slope = _slopes(sizes, options, tables, refs, column)
        key = refs["key"][...]
        total[...] += _dot(slope.astype(key.dtype), key, (0, 0))

    @pl.when(step == sizes.column_blocks - 1)
    def _() -> None:
        out[...] = (total[...] * options.scale).astype(out.dtype)


def slope_of_key(
    sizes: Sizes,
    options: Options,
    tables: Tables,
    refs: dict,
    scratch: tuple,
    made: tuple,
) -> None:
    from jax.experimental import pallas as pl

    on_key, on_value = scratch
    row, _, column, step = (pl.program_id(i) for i in range(4))
    _, needed = query_block(tables, row, column, step)

    @pl.when(step == 0)
    def _() -> None:
        on_key[...] = jnp.zeros_like(on_key)
        on_value[...] = jnp.zeros_like(on_value)

    @pl.when(needed)
    def _() -> None:
        share, slope = _slopes(sizes, options, tables, refs, column)
        query, on_out = refs["query"][...], refs["slope"][...]
        on_value[...] += _dot(share.astype(on_out.dtype), on_out, (1, 0))
        on_key[...] += _dot(slope.astype(query.dtype), query, (1, 0))

    @pl.when(step == sizes.query_blocks - 1)
    def _() -> None:
        made[0][...] = (on_key[...] * options.scale).astype(made[0].dtype)
        made[1][...] = on_value[...].astype(made[1].dtype)

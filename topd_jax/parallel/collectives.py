"""Hand-written collectives: work that the compiler would not divide well.

Each function says what every device computes from its part of the arrays, and
how the parts are combined. :mod:`topd_jax.parallel.rules` says which device
has which part.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from topd_jax.parallel.rules import mesh_axes, rules_in_force
from topd_jax.parallel.sharding import (
    constrain,
    dividing,
    divisible_spec,
    mesh_in_use,
)


def to_products(x: jax.Array, *axes: str | None) -> jax.Array:
    """Reshard activations to where the parameters are that they multiply.

    Args:
      x: [B, ...], its rows where the rules put "batch".
      *axes: logical axes of the other dimensions.

    Returns:
      x, its rows where the rules put "product_batch"; x itself where that
      is the same.
    """
    return constrain(x, "product_batch", *axes) if _reshards() else x


def to_rows(x: jax.Array, *axes: str | None) -> jax.Array:
    """Invert :func:`to_products`.

    Args:
      x: [B, ...].
      *axes: logical axes of the other dimensions.

    Returns:
      x, its rows where the rules put "batch".
    """
    return constrain(x, "batch", *axes) if _reshards() else x


def _reshards() -> bool:
    rules = rules_in_force()
    return rules["product_batch"] != rules["batch"]


def over_experts(
    read: Callable[..., jax.Array],
    x: jax.Array,
    chosen: jax.Array,
    weights: jax.Array,
    gate: jax.Array,
    up: jax.Array,
    down: jax.Array,
    *biases: jax.Array,
) -> jax.Array:
    """Sum the outputs of all experts for each token, wherever experts are.

    Every device holds some experts, and some columns of each. It reads all
    tokens of its rows, which are gathered over the expert axis, and the parts
    are summed. No token moves to an expert, so none can be dropped.

    Args:
      read: (x, chosen, weights, gate, up, down, *biases, first=first) ->
        [T, D], the part of experts first .. first + len(gate) - 1.
      x: [T, D].
      chosen: i32[T, k] experts of each token.
      weights: [T, k].
      gate: [E, D, F].
      up: [E, D, F].
      down: [E, F, D].
      *biases: of the three, [E, F], [E, F] and [E, D], or none.

    Returns:
      [T, D].
    """
    mesh = mesh_in_use()
    arrays = gate, up, down, *biases
    if mesh is None:
        return read(x, chosen, weights, *arrays, first=0)
    wide = divisible_spec(mesh, gate.shape, ("expert", None, "mlp"))
    expert, _, columns = wide
    rules = rules_in_force()
    gathered = mesh_axes(rules["expert"])
    rows = tuple(a for a in mesh_axes(rules["tokens"]) if a not in gathered)
    row = dividing(mesh, x.shape, (rows, None))
    of_inner, of_outer = PartitionSpec(expert, columns), PartitionSpec(expert)
    specs = wide, wide, of_inner, of_inner, of_inner, of_outer

    @functools.partial(
        jax.shard_map,
        in_specs=(row, row, row, *specs[: len(arrays)]),
        out_specs=row,
        # Grouped products do not say over which axes their result varies.
        check_vma=False,
    )
    def sum_parts(x: jax.Array, *rest: jax.Array) -> jax.Array:
        chosen, weights, gate, *others = rest
        first = jax.lax.axis_index(expert) * gate.shape[0] if expert else 0
        if biases and columns:  # the last is added to the sum over columns
            once = jax.lax.axis_index(columns) == 0
            others[-1] = jnp.where(once, others[-1], 0)
        out = read(x, chosen, weights, gate, *others, first=first)
        parts = mesh_axes(expert) + mesh_axes(columns)
        return jax.lax.psum(out, parts) if parts else out

    return sum_parts(x, chosen, weights, *arrays)


def over_heads(
    read: Callable[..., jax.Array],
    query: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    *rest: Any,
) -> jax.Array | None:
    """Compute attention over the rows, heads and queries of each device.

    Keys are gathered over the axis that spreads queries. What is said of them
    counts columns of the whole row, wherever the query is.

    Args:
      read: (query, keys, values, *rest) -> attention of one device's part.
      query: [B, S, heads, head_dim].
      keys: [B, kv_heads, L, head_dim], or [N, B, ...] of all layers.
      values: the same.
      *rest: arrays [], [B] and [B, S, ...], and dataclasses of these and of
        ``exists``, bool[B, L].

    Returns:
      [B, S, heads, head_dim]; None where heads would be separated
      from their keys.
    """
    mesh = mesh_in_use()
    if mesh is None:
        return read(query, keys, values, *rest)
    query_axes = ("batch", "sequence", "activation_heads", None)
    key_axes = ("batch", "activation_kv_heads", None, None)
    of_query = divisible_spec(mesh, query.shape, query_axes)
    of_key = divisible_spec(mesh, keys.shape[-4:], key_axes)
    if of_query[2] != of_key[1]:
        return None

    def place(path: tuple, x: jax.Array) -> PartitionSpec:
        of_columns = path[-1:] == (jax.tree_util.GetAttrKey("exists"),)
        return PartitionSpec(*of_query[: 1 if of_columns else min(x.ndim, 2)])

    held = PartitionSpec(*(None,) * (keys.ndim - 4), *of_key)
    places = jax.tree_util.tree_map_with_path(place, rest)
    attend = jax.shard_map(
        read,
        in_specs=(of_query, held, held, *places),
        out_specs=of_query,
        # Kernels do not say over which axes their result varies.
        check_vma=False,
    )
    return attend(query, keys, values, *rest)


def row_parts(rows: int) -> tuple[tuple[str, ...], int]:
    """Return the mesh axes that so many rows are spread over, and the parts."""
    mesh = mesh_in_use()
    if mesh is None:
        return (), 1
    axes = mesh_axes(divisible_spec(mesh, (rows,), ("batch",))[0])
    return axes, math.prod(mesh.shape[axis] for axis in axes)


def over_rows(
    write: Callable[..., list[jax.Array]],
    rows: int,
    held: list[jax.Array],
    new: list[jax.Array],
    dims: list[int | None],
    *places: jax.Array,
) -> list[jax.Array]:
    """Write rows into arrays, each device those that it has.

    The compiler would gather arrays whose rows are written by number.

    Args:
      write: (held, new, *places) -> held, of one device's part.
      rows: of the arrays that are written to.
      held: these arrays.
      new: arrays that are written, of as many dimensions.
      dims: the dimension of each that rows are; None where all have it whole.
      *places: i32[rows of new] by rows, or i32[].

    Returns:
      The arrays.
    """
    axes, _ = row_parts(rows)
    if not axes:
        return write(held, new, *places)

    def spec(dim: int | None) -> PartitionSpec:
        whole = PartitionSpec()
        return whole if dim is None else PartitionSpec(*(None,) * dim, axes)

    specs = [spec(dim) for dim in dims]
    return jax.shard_map(
        write,
        in_specs=(specs, specs, *(spec(0 if x.ndim else None) for x in places)),
        out_specs=specs,
        axis_names=set(axes),
        check_vma=False,
    )(held, new, *places)


def top_k(
    x: jax.Array, k: int, rows: str = "tokens", columns: str | None = "vocab"
) -> tuple[jax.Array, jax.Array]:
    """Compute :func:`jax.lax.top_k` of logits without gathering them.

    Each device takes the best of its own ids, and the best of those are
    taken; the compiler would gather all logits on every device. Not
    differentiable.

    Args:
      x: [..., V].
      k: at most V.
      rows: logical axis of the leading dimensions, taken as one.
      columns: logical axis of V; None if every device has all of it.

    Returns:
      (values [..., k], descending; their ids i32[..., k]). Equal values are
      in the order of their ids.
    """
    mesh = mesh_in_use()
    x = jax.lax.stop_gradient(x)
    if mesh is None:
        return jax.lax.top_k(x, k)
    flat = x.reshape(-1, x.shape[-1])
    partition = divisible_spec(mesh, flat.shape, (rows, columns))
    ways = math.prod(mesh.shape[name] for name in mesh_axes(partition[1]))
    out = PartitionSpec(partition[0], None)
    if k > flat.shape[1] // ways:
        partition = out
    spread = partition[1]

    @functools.partial(
        jax.shard_map,
        in_specs=partition,
        out_specs=(out, out),
        # Gathered in the same order everywhere, so the same everywhere.
        check_vma=False,
    )
    def best_of_all(x: jax.Array) -> tuple[jax.Array, jax.Array]:
        values, ids = jax.lax.top_k(x, k)
        if spread is None:
            return values, ids
        ids += jax.lax.axis_index(spread) * x.shape[1]
        values, ids = (
            jax.lax.all_gather(a, spread, axis=1, tiled=True)
            for a in (values, ids)
        )
        best, places = jax.lax.top_k(values, k)
        return best, jnp.take_along_axis(ids, places, axis=1)

    return jax.tree.map(
        lambda best: best.reshape(*x.shape[:-1], k), best_of_all(flat)
    )

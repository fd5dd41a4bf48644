"""Work that a mesh shares in a way that the compiler does not find. Ours.

Each function says what every device does with the part that it holds, and how
the parts become a whole; :mod:`topd_jax.parallel.sharding` tells who holds
what.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from topd_jax.parallel.sharding import (
    constrain,
    dividing,
    mesh_axes,
    mesh_in_use,
    rules_in_force,
)


def to_products(x: jax.Array, *axes: str | None) -> jax.Array:
    """Activations, moved to where the parameters are that they meet.

    Args:
      x: [B, ...], its rows where the rules have "batch".
      *axes: logical axes of the other dimensions.

    Returns:
      x, its rows where the rules have "product_batch"; x itself where that
      is the same.
    """
    return constrain(x, "product_batch", *axes) if _moves() else x


def to_rows(x: jax.Array, *axes: str | None) -> jax.Array:
    """The way back from :func:`to_products`.

    Args:
      x: [B, ...].
      *axes: logical axes of the other dimensions.

    Returns:
      x, its rows where the rules have "batch".
    """
    return constrain(x, "batch", *axes) if _moves() else x


def _moves() -> bool:
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
) -> jax.Array:
    """Sums what all experts say of each token, wherever they are held.

    Every device holds some experts, and of those some columns; it reads all
    tokens of its rows, which are gathered over the expert axis, and the parts
    are summed. No token moves to an expert, so none can be dropped.

    Args:
      read: (x, chosen, weights, gate, up, down, first) -> [T, D], the share
        of experts first .. first + len(gate) - 1.
      x: [T, D].
      chosen: i32[T, k] experts of each token.
      weights: [T, k].
      gate: [E, D, F].
      up: [E, D, F].
      down: [E, F, D].

    Returns:
      [T, D].
    """
    mesh = mesh_in_use()
    if mesh is None or math.prod(mesh.shape.values()) == 1:
        return read(x, chosen, weights, gate, up, down, 0)
    rules = rules_in_force()
    wide = dividing(mesh, gate.shape, (rules["expert"], None, rules["mlp"]))
    expert, _, columns = wide
    apart = mesh_axes(rules["expert"])
    rows = tuple(a for a in mesh_axes(rules["tokens"]) if a not in apart)
    row = dividing(mesh, x.shape, (rows, None))

    @functools.partial(
        jax.shard_map,
        in_specs=(row, row, row, wide, wide, PartitionSpec(expert, columns)),
        out_specs=row,
        # Grouped products do not say over which axes their result varies.
        check_vma=False,
    )
    def share(x: jax.Array, *rest: jax.Array) -> jax.Array:
        *routing, gate, up, down = rest
        first = jax.lax.axis_index(expert) * gate.shape[0] if expert else 0
        out = read(x, *routing, gate, up, down, first)
        parts = mesh_axes(expert) + mesh_axes(columns)
        return jax.lax.psum(out, parts) if parts else out

    return share(x, chosen, weights, gate, up, down)


def over_heads(
    read: Callable[..., jax.Array],
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    seen: Any,
) -> jax.Array | None:
    """Attention of the rows, heads and queries that a device has.

    Keys come together over the axis that spreads queries; what a query sees is
    told in columns of the whole row, wherever the query is.

    Args:
      read: (query, key, value, seen) -> attention, of a device's part.
      query: [B, S, heads, head_dim].
      key: [B, L, kv_heads, head_dim].
      value: the same.
      seen: a :class:`~topd_jax.models.attention.flash.Seen`.

    Returns:
      [B, S, heads, head_dim]; None where heads and their keys would part.
    """
    mesh = mesh_in_use()
    if mesh is None or math.prod(mesh.shape.values()) == 1:
        return read(query, key, value, seen)
    ours, theirs = _heads_held(mesh, query.shape, key.shape)
    if ours[2] != theirs[2]:
        return None
    of_query, of_column = PartitionSpec(*ours[:2]), PartitionSpec(ours[0])
    places = type(seen)(
        exists=of_column,
        prefix=of_query,
        first=of_query,
        last=of_query,
        rows=None if seen.rows is None else of_query,
        columns=None if seen.columns is None else of_column,
        reach=PartitionSpec(),
    )
    share = jax.shard_map(
        read,
        in_specs=(ours, theirs, theirs, places),
        out_specs=ours,
        # Kernels do not say over which axes their result varies.
        check_vma=False,
    )
    return share(query, key, value, seen)


def over_cached_heads(
    read: Callable[..., jax.Array],
    query: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    index: jax.Array,
    mask: jax.Array,
    first: jax.Array,
    last: jax.Array,
) -> jax.Array | None:
    """Attention of the rows and heads that a device has, from a cache.

    Args:
      read: (query, keys, values, index, mask, first, last) -> attention, of
        a device's part.
      query: [B, 1, heads, head_dim].
      keys: [N, B, L, kv_heads, head_dim].
      values: the same.
      index: i32[] layer that is read.
      mask: i32[B, 1, L].
      first: i32[B].
      last: i32[].

    Returns:
      [B, 1, heads, head_dim]; None where heads and their keys would part.
    """
    mesh = mesh_in_use()
    if mesh is None or math.prod(mesh.shape.values()) == 1:
        return read(query, keys, values, index, mask, first, last)
    ours, theirs = _heads_held(mesh, query.shape, keys.shape[1:])
    if ours[2] != theirs[2]:
        return None
    cache, rows = PartitionSpec(None, *theirs), PartitionSpec(ours[0])
    alike = PartitionSpec()
    share = jax.shard_map(
        read,
        in_specs=(ours, cache, cache, alike, rows, rows, alike),
        out_specs=ours,
        # Kernels do not say over which axes their result varies.
        check_vma=False,
    )
    return share(query, keys, values, index, mask, first, last)


def _heads_held(
    mesh: Mesh, query: tuple[int, ...], key: tuple[int, ...]
) -> tuple[PartitionSpec, PartitionSpec]:
    """How [B, S, heads, D] and [B, L, kv_heads, D] are spread."""
    rules = rules_in_force()
    rows, heads, groups = (
        rules[n] for n in ("batch", "activation_heads", "activation_kv_heads")
    )
    return (
        dividing(mesh, query, (rows, rules["sequence"], heads, None)),
        dividing(mesh, key, (rows, None, groups, None)),
    )


def top_k(
    x: jax.Array, k: int, rows: str = "tokens", columns: str | None = "vocab"
) -> tuple[jax.Array, jax.Array]:
    """:func:`jax.lax.top_k` of logits, whose rows and ids stay where they are.

    Each device takes the best of the ids that it holds, and of these the best
    are taken; the compiler would gather all logits on every device. Not
    differentiable.

    Args:
      x: [..., V].
      k: at most V.
      rows: logical axis of the leading dimensions, taken as one.
      columns: logical axis of V; None: every device has all of it.

    Returns:
      (values [..., k], falling; their ids i32[..., k]); of equal ones the
      lower ids come first.
    """
    mesh = mesh_in_use()
    x = jax.lax.stop_gradient(x)
    if mesh is None or math.prod(mesh.shape.values()) == 1:
        return jax.lax.top_k(x, k)
    flat = x.reshape(-1, x.shape[-1])
    rules = rules_in_force()
    held = dividing(mesh, flat.shape, (rules[rows], columns and rules[columns]))
    ways = math.prod(mesh.shape[name] for name in mesh_axes(held[1]))
    if k > flat.shape[1] // ways:
        held = PartitionSpec(held[0], None)
    spread, out = held[1], PartitionSpec(held[0], None)

    @functools.partial(
        jax.shard_map,
        in_specs=held,
        out_specs=(out, out),
        # Gathered in the same order everywhere, so the same everywhere.
        check_vma=False,
    )
    def share(x: jax.Array) -> tuple[jax.Array, jax.Array]:
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
        lambda found: found.reshape(*x.shape[:-1], k), share(flat)
    )

"""Work that a mesh shares in a way that the compiler does not find. Ours.

Each function says what every device does with the part that it holds, and how
the parts become a whole; :mod:`topd_jax.sharding` tells who holds what.
"""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from topd_jax.sharding import (
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

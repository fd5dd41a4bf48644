"""Describe a mesh to the fused losses, which know none."""

import dataclasses
import math

import jax
from jax.sharding import Mesh, NamedSharding

from topd_jax.parallel.rules import Rules, mesh_axes, rules_in_force, using
from topd_jax.parallel.sharding import divisible_spec, spec_on
from topd_jax.types import Layout

_LOSS_AXES = ("batch", "sequence", "tokens", "vocab", "embed")


def loss_layout(
    mesh: Mesh | None = None,
    rules: Rules | None = None,
    *,
    chunk_size: int | None = None,
) -> Layout:
    """Describe a mesh to the fused losses.

    Args:
      mesh: with any axis names; None takes the one that ``jax.set_mesh`` set,
        or one device.
      rules: mesh axis, or axes, of the logical axes "batch", "sequence",
        "tokens" (batch and sequence), "vocab" and "embed"; an axis without a
        rule is not spread. None takes the rules in force.
      chunk_size: tokens whose logits exist at a time; None chooses.

    Returns:
      The layout. Equal arguments give equal layouts.

    Raises:
      ValueError: for a rule that names an axis which the mesh does not have.

    Example:
      ``loss_layout(mesh, {"batch": "x", "tokens": "x", "vocab": "y"})``
    """
    used = jax.sharding.get_abstract_mesh() if mesh is None else mesh
    if used is None or used.empty or used.size == 1:
        return Layout(chunk_size)
    rules = rules_in_force() if rules is None else rules
    table = {axis: mesh_axes(rules.get(axis)) for axis in _LOSS_AXES}
    ways = {}
    with using(table):
        for axis in _LOSS_AXES:
            (axes,) = spec_on(used, (axis,))
            ways[axis] = math.prod(used.shape[a] for a in mesh_axes(axes))
    return Layout(chunk_size, ways, _Constrain(mesh, tuple(table.items())))


@dataclasses.dataclass(frozen=True)
class _Constrain:
    """Pin an array to logical axes of a mesh; hashable, unlike a closure."""

    mesh: Mesh | None
    table: tuple[tuple[str, tuple[str, ...]], ...]

    def __call__(self, x: jax.Array, *axes: str | None) -> jax.Array:
        mesh = self.mesh
        used = jax.sharding.get_abstract_mesh() if mesh is None else mesh
        with using(dict(self.table)):
            partition = divisible_spec(used, x.shape, axes)
        if mesh is not None:
            partition = NamedSharding(mesh, partition)
        return jax.lax.with_sharding_constraint(x, partition)

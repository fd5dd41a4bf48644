"""The device mesh, and how arrays are laid out on it.

:func:`make_mesh` builds the mesh. The other functions translate the logical
axes of an array to a sharding, by the rules of
:mod:`topd_jax.parallel.rules`.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import (
    AbstractMesh,
    AxisType,
    Mesh,
    NamedSharding,
    PartitionSpec,
)

from topd_jax.parallel.rules import Axes, mesh_axes, rules_in_force

MESH_AXES = ("data", "fsdp", "tensor", "expert", "sequence")


def make_mesh(
    data: int = -1,
    fsdp: int = 1,
    tensor: int = 1,
    expert: int = 1,
    sequence: int = 1,
    *,
    devices: Sequence[jax.Device] | None = None,
) -> Mesh:
    """Build a mesh with the axes that the default rules name.

    Args:
      data: devices that rows are spread over; -1 takes every device that the
        others leave.
      fsdp: devices that rows and parameters are spread over.
      tensor: devices that heads, columns and vocabulary are spread over.
      expert: devices that rows, and the experts of a mixture, are spread over.
      sequence: devices that the columns of a row are spread over.
      devices: None takes all of ``jax.devices()``.

    Returns:
      A mesh with automatic axes.

    Raises:
      ValueError: where the axes do not multiply to the number of devices.
    """
    devices = list(jax.devices() if devices is None else devices)
    others = (fsdp, tensor, expert, sequence)
    rest = math.prod(others)
    if data == -1:
        data = max(len(devices) // max(rest, 1), 1)
    sizes = dict(zip(MESH_AXES, (data, *others), strict=True))
    if data * rest != len(devices) or min(others) < 1:
        spelled = " x ".join(f"{name}={size}" for name, size in sizes.items())
        raise ValueError(
            f"mesh {spelled} needs {data * rest} devices and there are "
            f"{len(devices)}; every axis is at least 1, and data=-1 takes "
            "what the others leave"
        )
    grid = np.asarray(devices).reshape(list(sizes.values()))
    return Mesh(grid, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def mesh_in_use() -> AbstractMesh | None:
    """Return the mesh that ``jax.set_mesh`` set, or None for one device.

    Raises:
      ValueError: for one whose axes are not automatic.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh is None or mesh.empty or mesh.size == 1:
        return None
    explicit = [a for a in mesh.explicit_axes if mesh.shape[a] > 1]
    if explicit:
        raise ValueError(
            f"the axes {', '.join(explicit)} of the mesh in use are "
            "explicit and must be automatic: make it with axis_types="
            f"(jax.sharding.AxisType.Auto,) * {len(mesh.axis_names)}"
        )
    return mesh


def spec_on(
    mesh: Mesh | AbstractMesh, axes: Sequence[str | None]
) -> PartitionSpec:
    """Translate logical axes to axes of one mesh, by the rules in force.

    Args:
      mesh: any mesh.
      axes: one logical name, or None, per dimension.

    Returns:
      The partition; nothing is spread on a mesh of one device.

    Raises:
      ValueError: for a name without a rule, or a mesh axis that the mesh does
        not have.
    """
    rules = rules_in_force()
    parts = []
    for axis in axes:
        if axis is not None and axis not in rules:
            raise ValueError(
                f"no sharding rule for the logical axis {axis!r}; rules: "
                f"{sorted(rules)}"
            )
        parts.append(None if axis is None else rules[axis])
        missing = [n for n in mesh_axes(parts[-1]) if n not in mesh.shape]
        if missing and mesh.size == 1:
            return PartitionSpec(*(None,) * len(axes))
        if missing:
            names = ", ".join(mesh.shape)
            raise ValueError(
                f"the rule of the logical axis {axis!r} names the mesh axis "
                f"{missing[0]!r} and the mesh has {names}; pass rules for its "
                "axes: with topd_jax.parallel.rules.using("
                f"{{{axis!r}: {next(iter(mesh.shape))!r}, ...}})"
            )
    return PartitionSpec(*parts)


def divisible_spec(
    mesh: Mesh | AbstractMesh,
    shape: Sequence[int],
    axes: Sequence[str | None],
) -> PartitionSpec:
    """Return :func:`spec_on`, cut down to what divides the array.

    Args:
      mesh: any mesh.
      shape: of the array.
      axes: its logical axes, one per dimension.

    Returns:
      For each dimension, the longest prefix of its mesh axes that divides it.
    """
    return dividing(mesh, shape, spec_on(mesh, axes))


def dividing(
    mesh: Mesh | AbstractMesh, shape: Sequence[int], partition: Sequence[Axes]
) -> PartitionSpec:
    """Cut a partition down to what divides the array.

    Args:
      mesh: that has the axes.
      shape: of the array.
      partition: mesh axes, one entry per dimension.

    Returns:
      For each dimension, the longest prefix of its mesh axes that divides it.
    """
    parts = []
    for size, part in zip(shape, partition, strict=True):
        names = mesh_axes(part)
        while size % math.prod(mesh.shape[name] for name in names):
            names = names[:-1]
        parts.append(names[0] if len(names) == 1 else names or None)
    return PartitionSpec(*parts)


def named(
    mesh: Mesh,
    shape: Sequence[int],
    axes: Sequence[str | None],
    *,
    name: str = "array",
) -> NamedSharding:
    """Return the sharding of one array, checked against its shape.

    Args:
      mesh: any mesh.
      shape: the array's shape.
      axes: its logical axes, one per dimension.
      name: of the array, for errors.

    Returns:
      The sharding.

    Raises:
      ValueError: as :func:`spec_on`, and where a dimension does not divide
        among its devices.
    """
    partition = spec_on(mesh, axes)
    for size, part, axis in zip(shape, partition, axes, strict=True):
        parts = mesh_axes(part)
        ways = math.prod(mesh.shape[p] for p in parts)
        if size % ways:
            raise ValueError(
                f"{name}: {axis}={size} must be divisible by the mesh axes "
                f"{'x'.join(parts)} ({ways}); choose a smaller axis or a rule "
                f"that leaves {axis!r} unsharded"
            )
    return NamedSharding(mesh, partition)


def tree_shardings(
    tree: object,
    mesh: Mesh,
    logical_axes: Mapping[str, Sequence[str | None]],
) -> object:
    """Return the shardings of a model, or of a state that mirrors one.

    A leaf is recognized by the last attribute name of its path, or by the end
    of its path where a name has a "/", so the moments of an optimizer are
    spread as the parameters they belong to. The scales of a quantized
    parameter are spread as it is, where they divide.

    Args:
      tree: any pytree of arrays or ``ShapeDtypeStruct``.
      mesh: any mesh.
      logical_axes: parameter name -> logical axes.

    Returns:
      The same tree with a ``NamedSharding`` per leaf; leaves without a name
      in ``logical_axes`` are replicated.
    """

    def one(path: tuple, leaf: jax.Array) -> NamedSharding:
        name = parameter_name(path, leaf, logical_axes)
        if name is None:
            return replicated(mesh)
        axes = logical_axes[name]
        if path[-1] == jax.tree_util.GetAttrKey("scale"):
            return NamedSharding(mesh, divisible_spec(mesh, leaf.shape, axes))
        return named(mesh, leaf.shape, axes, name=name)

    return jax.tree_util.tree_map_with_path(one, tree)


def parameter_name(
    path: tuple, leaf: jax.Array, logical_axes: Mapping[str, Sequence]
) -> str | None:
    """Return the parameter that a leaf is (a part of); None if unknown.

    Args:
      path: of the leaf, as JAX has it.
      leaf: an array or ``ShapeDtypeStruct``.
      logical_axes: as in :func:`tree_shardings`.
    """
    names = [k.name for k in path if hasattr(k, "name")]
    names = [n for n in names if n in logical_axes]
    where = "/" + jax.tree_util.keystr(path, simple=True, separator="/")
    names += [n for n in logical_axes if "/" in n and where.endswith("/" + n)]
    if not names or len(logical_axes[names[-1]]) != leaf.ndim:
        return None
    return names[-1]


def coarser(sharding: NamedSharding, shape: Sequence[int]) -> NamedSharding:
    """Return the sharding of an array with one entry for several of another's.

    Args:
      sharding: of the other array.
      shape: of this one; as many dimensions.

    Returns:
      The same, but dimensions that no longer divide are left whole.
    """
    partition = tuple(sharding.spec)
    partition += (None,) * (len(shape) - len(partition))
    mesh = sharding.mesh
    return NamedSharding(mesh, dividing(mesh, shape, partition))


def row_ways(mesh: Mesh) -> int:
    """Return how many parts the rows of a batch are spread into.

    Args:
      mesh: any mesh.
    """
    (rows,) = spec_on(mesh, ("batch",))
    return math.prod(mesh.shape[axis] for axis in mesh_axes(rows))


def batch_shardings(tree: object, mesh: Mesh) -> object:
    """Return shardings that spread the leading dimension, rows."""

    def one(x: jax.Array) -> NamedSharding:
        axes = ("batch",) + (None,) * (x.ndim - 1)
        return named(mesh, x.shape, axes, name="batch_size")

    return jax.tree.map(one, tree)


def spread_rows(batch: object, mesh: Mesh) -> object:
    """Put a batch that every process holds whole on the mesh, by rows.

    Args:
      batch: a tree of host arrays [B, ...], the same in every process.
      mesh: from :func:`make_mesh`.

    Returns:
      The tree on the mesh.

    Raises:
      ValueError: where the rows do not divide over the mesh.
    """
    return jax.tree.map(
        lambda x, where: jax.make_array_from_callback(
            x.shape, where, lambda index: x[index]
        ),
        batch,
        batch_shardings(batch, mesh),
    )


def replicated(mesh: Mesh) -> NamedSharding:
    """Return the sharding of what every device has whole."""
    return NamedSharding(mesh, PartitionSpec())


def reshard(
    tree: object, logical_axes: Mapping[str, Sequence[str | None]]
) -> object:
    """Move a model's parameters to where the rules in force put them.

    Args:
      tree: the model, inside a jitted function.
      logical_axes: parameter name -> logical axes.

    Returns:
      The model; dimensions that do not divide are whole.
    """

    def one(path: tuple, leaf: jax.Array) -> jax.Array:
        name = parameter_name(path, leaf, logical_axes)
        return leaf if name is None else constrain(leaf, *logical_axes[name])

    return jax.tree_util.tree_map_with_path(one, tree)


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """Pin an activation to its logical axes on the mesh in use.

    Args:
      x: any array inside a jitted function.
      *axes: one logical axis, or None, per dimension.

    Returns:
      x, with its sharding fixed; x itself where no mesh is set.

    Raises:
      ValueError: where a rule names an axis that the mesh does not have.
    """
    mesh = mesh_in_use()
    if mesh is None:
        return x
    # An activation that does not divide (3 kv heads on 2 devices) is left to
    # the compiler; parameters are refused instead, by named().
    return jax.lax.with_sharding_constraint(
        x, divisible_spec(mesh, x.shape, axes)
    )


def constrain_rows(tree: Any) -> Any:
    """Pin activations [B, ...] to the mesh in use by their rows alone.

    Args:
      tree: of arrays inside a jitted function.

    Returns:
      The tree, as :func:`constrain` returns its arrays.

    Raises:
      ValueError: as there.
    """
    return jax.tree.map(
        lambda x: constrain(x, "batch", *(None,) * (x.ndim - 1)), tree
    )

"""The device mesh, and the rules from logical axes to mesh axes.

The rest of the project speaks of *logical* axes ("embed", "heads", "batch");
this file alone knows the mesh axes:

* ``data``: replicas, each with rows of its own;
* ``fsdp``: rows too, and the parameters are spread over it;
* ``tensor``: heads, feed-forward columns and vocabulary are spread over it;
* ``expert``: rows, and the experts of a mixture are spread over it.

Student and teacher each carry their own :data:`Rules`, so that a large teacher
may be spread over more axes than a small student.
"""

import functools
import math
from collections.abc import Callable, Mapping, Sequence

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

MESH_AXES = ("data", "fsdp", "tensor", "expert")

Rules = Mapping[str, str | tuple[str, ...] | None]

RULES: dict[str, str | tuple[str, ...] | None] = {
    # activations
    "batch": ("data", "fsdp", "expert"),
    "sequence": None,
    "activation_embed": None,
    "activation_heads": "tensor",
    "activation_kv_heads": "tensor",
    "activation_mlp": "tensor",
    # parameters
    "layers": None,
    "vocab": "tensor",
    "embed": "fsdp",
    "heads": "tensor",
    "kv_heads": "tensor",
    "head_dim": None,
    "mlp": "tensor",
    "expert": "expert",
}


def make_mesh(
    data: int = -1,
    fsdp: int = 1,
    tensor: int = 1,
    expert: int = 1,
    *,
    devices: Sequence[jax.Device] | None = None,
) -> Mesh:
    """Builds the mesh over the axes data, fsdp, tensor and expert.

    Args:
      data: replicas; -1 takes every device the others leave.
      fsdp: devices that a parameter and the rows are spread over.
      tensor: devices that heads, columns and vocabulary are spread over.
      expert: devices that rows, and the experts of a mixture, are spread over.
      devices: all of ``jax.devices()`` unless told.

    Returns:
      A mesh with automatic axes.

    Raises:
      ValueError: where the axes do not multiply to the number of devices.
    """
    devices = list(jax.devices() if devices is None else devices)
    others = {"fsdp": fsdp, "tensor": tensor, "expert": expert}
    sizes = {"data": data} | others
    if min(others.values()) < 1 or (data < 1 and data != -1):
        raise ValueError(
            f"mesh axes {_spelt(sizes, ', ')} must be positive; only data may "
            "be -1 (all that is left)"
        )
    rest = math.prod(others.values())
    if data == -1:
        sizes["data"] = max(len(devices) // rest, 1)
    if sizes["data"] * rest != len(devices):
        raise ValueError(
            f"mesh {_spelt(sizes, ' x ')} needs {sizes['data'] * rest} devices "
            f"and there are {len(devices)}; set data=-1 to take what the "
            "others leave"
        )
    grid = np.asarray(devices).reshape([sizes[name] for name in MESH_AXES])
    return Mesh(grid, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def _spelt(sizes: Mapping[str, int], between: str) -> str:
    return between.join(f"{name}={size}" for name, size in sizes.items())


def spec(axes: Sequence[str | None], rules: Rules = RULES) -> PartitionSpec:
    """Translates an array's logical axes to mesh axes.

    Args:
      axes: one logical name, or None, a dimension.
      rules: logical name -> mesh axis, mesh axes or None.

    Returns:
      The partition of the array.

    Raises:
      ValueError: for a name without a rule, or a mesh axis used twice.
    """
    parts = []
    for axis in axes:
        if axis is not None and axis not in rules:
            raise ValueError(
                f"no sharding rule for the logical axis {axis!r}; rules: "
                f"{sorted(rules)}"
            )
        parts.append(None if axis is None else rules[axis])
    used = [m for p in parts if p for m in ((p,) if isinstance(p, str) else p)]
    if len(used) != len(set(used)):
        raise ValueError(
            f"logical axes {tuple(axes)} put one mesh axis on two dimensions: "
            f"{parts}; change a rule"
        )
    return PartitionSpec(*parts)


def named(
    mesh: Mesh,
    shape: Sequence[int],
    axes: Sequence[str | None],
    rules: Rules = RULES,
    *,
    name: str = "array",
) -> NamedSharding:
    """The sharding of one array, checked against its shape.

    Args:
      mesh: from :func:`make_mesh`.
      shape: the array's shape.
      axes: its logical axes, one a dimension.
      rules: logical axis -> mesh axis.
      name: what to call the array in an error.

    Returns:
      The sharding.

    Raises:
      ValueError: where a dimension does not divide among its devices.
    """
    partition = spec(axes, rules)
    for size, part, axis in zip(shape, partition, axes, strict=True):
        parts = (part,) if isinstance(part, str) else (part or ())
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
    rules: Rules = RULES,
) -> object:
    """Shardings for every leaf of a model, or of a state that mirrors one.

    A leaf is recognised by the last attribute name of its path, or by the end
    of its path where a name has a "/", so the moments of an optimizer are
    spread as the parameters they belong to. The scales of a quantised
    parameter are spread as it is, where they divide.

    Args:
      tree: any pytree of arrays or ``ShapeDtypeStruct``.
      mesh: from :func:`make_mesh`.
      logical_axes: parameter name -> logical axes.
      rules: logical axis -> mesh axis.

    Returns:
      The same tree with a ``NamedSharding`` a leaf; leaves without a name in
      ``logical_axes`` are replicated.
    """

    def one(path: tuple, leaf: jax.Array) -> NamedSharding:
        names = [k.name for k in path if hasattr(k, "name")]
        names = [n for n in names if n in logical_axes]
        where = "/" + jax.tree_util.keystr(path, simple=True, separator="/")
        names += [
            n for n in logical_axes if "/" in n and where.endswith("/" + n)
        ]
        if not names or len(logical_axes[names[-1]]) != leaf.ndim:
            return NamedSharding(mesh, PartitionSpec())
        axes = logical_axes[names[-1]]
        if path[-1] == jax.tree_util.GetAttrKey("scale"):
            return coarser(NamedSharding(mesh, spec(axes, rules)), leaf.shape)
        return named(mesh, leaf.shape, axes, rules, name=names[-1])

    return jax.tree_util.tree_map_with_path(one, tree)


def coarser(sharding: NamedSharding, shape: Sequence[int]) -> NamedSharding:
    """The sharding of an array with one entry for several of another's.

    Args:
      sharding: of the other array.
      shape: of this one; as many dimensions.

    Returns:
      The same, but dimensions that no longer divide are left whole.
    """
    partition = tuple(sharding.spec)
    partition += (None,) * (len(shape) - len(partition))
    mesh = sharding.mesh
    return NamedSharding(mesh, _dividing(mesh, shape, partition))


def batch_shardings(tree: object, mesh: Mesh) -> object:
    """Shardings that spread the leading dimension, rows, over the mesh."""
    return jax.tree.map(
        lambda x: named(
            mesh,
            x.shape,
            ("batch",) + (None,) * (x.ndim - 1),
            name="batch_size",
        ),
        tree,
    )


def row_ways(mesh: Mesh) -> int:
    """How many parts the rows of a batch are spread into.

    Args:
      mesh: as :func:`make_mesh` builds it.
    """
    return math.prod(mesh.shape[axis] for axis in RULES["batch"])


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding of what every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """Pins an activation to its logical axes on the mesh in use.

    Args:
      x: any array inside a jitted function.
      *axes: one logical axis, or None, a dimension.

    Returns:
      x, with its sharding fixed; x itself where no mesh is set.
    """
    mesh = _mesh_in_use()
    if mesh is None:
        return x
    # An activation that does not divide (3 kv heads on 2 devices) is left to
    # the compiler; parameters are refused instead, by named().
    return jax.lax.with_sharding_constraint(
        x, _dividing(mesh, x.shape, spec(axes))
    )


def _dividing(
    mesh: Mesh | jax.sharding.AbstractMesh,
    shape: Sequence[int],
    partition: Sequence[str | tuple[str, ...] | None],
) -> PartitionSpec:
    parts = []
    for size, part in zip(shape, partition, strict=True):
        names = (part,) if isinstance(part, str) else (part or ())
        ways = math.prod(mesh.shape[p] for p in names)
        parts.append(part if size % ways == 0 else None)
    return PartitionSpec(*parts)


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
    mesh = _mesh_in_use()
    if mesh is None or math.prod(mesh.shape.values()) == 1:
        return read(x, chosen, weights, gate, up, down, 0)
    experts, columns = mesh.shape["expert"], mesh.shape["tensor"]
    expert = "expert" if gate.shape[0] % experts == 0 else None
    tensor = "tensor" if gate.shape[2] % columns == 0 else None
    rows = x.shape[0] % (mesh.shape["data"] * mesh.shape["fsdp"]) == 0
    row = PartitionSpec(("data", "fsdp") if rows else None, None)
    wide = PartitionSpec(expert, None, tensor)

    @functools.partial(
        jax.shard_map,
        in_specs=(row, row, row, wide, wide, PartitionSpec(expert, tensor)),
        out_specs=row,
        # Grouped products do not say over which axes their result varies.
        check_vma=False,
    )
    def share(x: jax.Array, *rest: jax.Array) -> jax.Array:
        *routing, gate, up, down = rest
        first = jax.lax.axis_index("expert") * gate.shape[0] if expert else 0
        out = read(x, *routing, gate, up, down, first)
        parts = tuple(axis for axis in (expert, tensor) if axis)
        return jax.lax.psum(out, parts) if parts else out

    return share(x, chosen, weights, gate, up, down)


def _mesh_in_use() -> jax.sharding.AbstractMesh | None:
    mesh = jax.sharding.get_abstract_mesh()
    if mesh is None or mesh.empty or not set(MESH_AXES) <= set(mesh.axis_names):
        return None
    return mesh

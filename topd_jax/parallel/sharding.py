"""The device mesh, and the rules from logical axes to mesh axes.

The rest of the project speaks of *logical* axes ("embed", "heads", "batch");
this file alone knows the mesh axes:

* ``data``: replicas, each with rows of its own;
* ``fsdp``: rows too, and the parameters are spread over it;
* ``tensor``: heads, feed-forward columns and vocabulary are spread over it;
* ``expert``: rows, and the experts of a mixture are spread over it;
* ``sequence``: the columns of the rows that are learnt from. Queries stay
  where they are, keys and values come together a layer at a time (Llama 3,
  arXiv:2407.21783, section 3.3.2).

Writing a token at a time asks for other rules than reading many at once:
:data:`DECODING` names them, :func:`using` puts them into force. There, and
where a cache is kept (:data:`READING`), rows are spread over sequence too.
"""

import contextlib
import contextvars
import math
from collections.abc import Iterator, Mapping, Sequence

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

MESH_AXES = ("data", "fsdp", "tensor", "expert", "sequence")

Rules = Mapping[str, str | tuple[str, ...] | None]

RULES: dict[str, str | tuple[str, ...] | None] = {
    # activations
    "batch": ("data", "fsdp", "expert"),
    "product_batch": ("data", "fsdp", "expert"),
    "tokens": ("data", "fsdp", "expert", "sequence"),
    "draws": ("data", "fsdp", "expert", "sequence", "tensor"),
    "sequence": "sequence",
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

# Rules of a model that keeps a cache: its columns are not in the order that
# they are read in, so each row's stay together.
READING: Rules = RULES | {
    "batch": ("data", "fsdp", "expert", "sequence"),
    "product_batch": ("data", "fsdp", "expert", "sequence"),
    "sequence": None,
}

_WIDE = ("tensor", "fsdp")

_FEW = ("data", "expert", "sequence")
_PRODUCTS: Rules = (
    READING
    | dict.fromkeys(("activation_mlp", "vocab", "heads", "kv_heads", "mlp"),
                    _WIDE)
    | dict.fromkeys(("product_batch", "tokens"), _FEW)
    | {"draws": (*_FEW, *_WIDE), "embed": None}
)  # fmt: skip

# Rules of a loop over tokens. At every token "train" gathers each parameter
# over fsdp again; "gathered" does so once, before the loop; "tensor" never
# does: fsdp becomes a second tensor axis, and activations are summed instead.
# "rows" does as "tensor" where parameters are multiplied with, and lets each
# row, its attention and its cache stay where they are.
DECODING: dict[str, Rules] = {
    "train": READING,
    "gathered": READING | {"embed": None},
    "tensor": _PRODUCTS
    | dict.fromkeys(("activation_heads", "activation_kv_heads"), _WIDE)
    | {"batch": _FEW},
    "rows": _PRODUCTS,
}

_in_force: contextvars.ContextVar[Rules] = contextvars.ContextVar(
    "rules", default=RULES
)


def make_mesh(
    data: int = -1,
    fsdp: int = 1,
    tensor: int = 1,
    expert: int = 1,
    sequence: int = 1,
    *,
    devices: Sequence[jax.Device] | None = None,
) -> Mesh:
    """Builds the mesh over the axes that this file begins with.

    Args:
      data: replicas; -1 takes every device the others leave.
      fsdp: devices that a parameter and the rows are spread over.
      tensor: devices that heads, columns and vocabulary are spread over.
      expert: devices that rows, and the experts of a mixture, are spread over.
      sequence: devices that the columns of a row are spread over.
      devices: all of ``jax.devices()`` unless told.

    Returns:
      A mesh with automatic axes.

    Raises:
      ValueError: where the axes do not multiply to the number of devices.
    """
    devices = list(jax.devices() if devices is None else devices)
    others = (fsdp, tensor, expert, sequence)
    sizes = dict(zip(MESH_AXES, (data, *others), strict=True))
    if min(others) < 1 or (data < 1 and data != -1):
        raise ValueError(
            f"mesh axes {_spelt(sizes, ', ')} must be positive; only data may "
            "be -1 (all that is left)"
        )
    rest = math.prod(others)
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
    used = [m for p in parts for m in mesh_axes(p)]
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
        name = _name(path, leaf, logical_axes)
        if name is None:
            return replicated(mesh)
        axes = logical_axes[name]
        if path[-1] == jax.tree_util.GetAttrKey("scale"):
            return coarser(NamedSharding(mesh, spec(axes, rules)), leaf.shape)
        return named(mesh, leaf.shape, axes, rules, name=name)

    return jax.tree_util.tree_map_with_path(one, tree)


def _name(
    path: tuple, leaf: jax.Array, logical_axes: Mapping[str, Sequence]
) -> str | None:
    """Which parameter a leaf is (a part of); None for no known one."""
    names = [k.name for k in path if hasattr(k, "name")]
    names = [n for n in names if n in logical_axes]
    where = "/" + jax.tree_util.keystr(path, simple=True, separator="/")
    names += [n for n in logical_axes if "/" in n and where.endswith("/" + n)]
    if not names or len(logical_axes[names[-1]]) != leaf.ndim:
        return None
    return names[-1]


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
    return NamedSharding(mesh, dividing(mesh, shape, partition))


def batch_shardings(tree: object, mesh: Mesh) -> object:
    """Shardings that spread the leading dimension, rows, over the mesh."""

    def one(x: jax.Array) -> NamedSharding:
        axes = ("batch",) + (None,) * (x.ndim - 1)
        return named(mesh, x.shape, axes, name="batch_size")

    return jax.tree.map(one, tree)


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding of what every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())


@contextlib.contextmanager
def using(rules: Rules) -> Iterator[None]:
    """Puts rules into force for what is traced inside.

    JAX does not know of them: what is jitted inside must not be jitted under
    other rules too, or be told them as a static argument.

    Args:
      rules: that :func:`constrain` shall follow.
    """
    token = _in_force.set(rules)
    try:
        yield
    finally:
        _in_force.reset(token)


def respread(
    tree: object, logical_axes: Mapping[str, Sequence[str | None]], rules: Rules
) -> object:
    """Moves a model's parameters to where other rules want them.

    Args:
      tree: the model, inside a jitted function.
      logical_axes: parameter name -> logical axes.
      rules: where to; dimensions that do not divide stay whole.

    Returns:
      The model; itself where no mesh is set.
    """
    mesh = mesh_in_use()
    if mesh is None:
        return tree

    def one(path: tuple, leaf: jax.Array) -> jax.Array:
        name = _name(path, leaf, logical_axes)
        if name is None:
            return leaf
        partition = spec(logical_axes[name], rules)
        return jax.lax.with_sharding_constraint(
            leaf, dividing(mesh, leaf.shape, partition)
        )

    return jax.tree_util.tree_map_with_path(one, tree)


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """Pins an activation to its logical axes on the mesh in use.

    Args:
      x: any array inside a jitted function.
      *axes: one logical axis, or None, a dimension.

    Returns:
      x, with its sharding fixed; x itself where no mesh is set.
    """
    mesh = mesh_in_use()
    if mesh is None:
        return x
    # An activation that does not divide (3 kv heads on 2 devices) is left to
    # the compiler; parameters are refused instead, by named().
    return jax.lax.with_sharding_constraint(
        x, dividing(mesh, x.shape, spec(axes, rules_in_force()))
    )


def dividing(
    mesh: Mesh | jax.sharding.AbstractMesh,
    shape: Sequence[int],
    partition: Sequence[str | tuple[str, ...] | None],
) -> PartitionSpec:
    """A partition, cut down to what divides the array.

    Args:
      mesh: in use.
      shape: of the array.
      partition: mesh axes, one entry a dimension.

    Returns:
      Of each dimension's mesh axes as many, from the first, as divide it.
    """
    parts = []
    for size, part in zip(shape, partition, strict=True):
        names = mesh_axes(part)
        while size % math.prod(mesh.shape[name] for name in names):
            names = names[:-1]
        parts.append(names[0] if len(names) == 1 else names or None)
    return PartitionSpec(*parts)


def mesh_axes(part: str | tuple[str, ...] | None) -> tuple[str, ...]:
    """The mesh axes of a rule, or of one dimension of a partition."""
    return (part,) if isinstance(part, str) else tuple(part or ())


def rules_in_force() -> Rules:
    """:data:`RULES`, or those of the :func:`using` that is traced."""
    return _in_force.get()


def mesh_in_use() -> jax.sharding.AbstractMesh | None:
    """The mesh that :func:`jax.set_mesh` set; None where it is none of ours."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh is None or mesh.empty or not set(MESH_AXES) <= set(mesh.axis_names):
        return None
    return mesh

"""Rules from logical axes to mesh axes.

Models, losses and samplers speak of *logical* axes ("embed", "heads",
"batch"). Rules say which mesh axes each of them is spread over. The default
rules name the axes of :func:`~topd_jax.parallel.sharding.make_mesh`:

* ``data``: rows; every device has all parameters;
* ``fsdp``: rows and parameters;
* ``tensor``: heads, feed-forward columns and vocabulary;
* ``expert``: rows, and the experts of a mixture;
* ``sequence``: the columns of rows that are learned from. Queries stay in
  place, keys and values are gathered one layer at a time (Llama 3,
  arXiv:2407.21783, section 3.3.2).

A mesh with other axes takes rules of its own::

    with jax.set_mesh(mesh), using({"batch": "x", "vocab": "y", "mlp": "y"}):
        rollout(model, prompts, key, ...)
"""

import contextlib
from collections.abc import Iterator, Mapping

import jax

Axes = str | tuple[str, ...] | None
Rules = Mapping[str, Axes]

RULES: dict[str, Axes] = {
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

# How a model is spread while it writes one token at a time; see
# decoding_rules.
DECODING = ("train", "gathered", "tensor", "rows")

# JAX traces again under another value, so what is jitted never keeps the
# rules of an earlier call.
_in_force = jax.make_user_context(tuple(RULES.items()))


def rules_in_force() -> Rules:
    """Return :data:`RULES`, or the rules of the innermost :func:`using`."""
    return dict(_in_force.value)


@contextlib.contextmanager
def using(rules: Rules) -> Iterator[None]:
    """Put rules into force for what is called inside.

    Args:
      rules: logical axis -> mesh axis, mesh axes or None. A logical axis of
        :data:`RULES` that is left out is not spread, with three exceptions:
        "product_batch" follows "batch", "tokens" follows "batch" and
        "sequence", and "draws" follows "tokens" and "vocab".
    """
    tokens = _joined(rules.get("batch"), rules.get("sequence"))
    complete = {
        **dict.fromkeys(RULES),
        "product_batch": rules.get("batch"),
        "tokens": tokens,
        "draws": _joined(tokens, rules.get("vocab")),
        **rules,
    }
    frozen = tuple(
        (name, tuple(axes) if isinstance(axes, list) else axes)
        for name, axes in complete.items()
    )
    with _in_force(frozen):
        yield


def reading_rules() -> Rules:
    """Return the rules in force, of a model that keeps a cache.

    The columns of a cache are not in the order in which they are read, so
    each row's stay together: rows take the axes of the sequence.
    """
    rules = rules_in_force()
    batch = _joined(rules["batch"], rules["sequence"])
    return {
        **rules,
        "batch": batch,
        "product_batch": batch,
        "sequence": None,
    }


def decoding_rules(sharding: str) -> Rules:
    """Return the rules of a loop that writes one token at a time.

    Args:
      sharding: one of :data:`DECODING`. "train" gathers every parameter over
        the axes of "embed" (fsdp) at every token; "gathered" does so once,
        before the loop; "tensor" never does: those axes become tensor axes,
        and activations are summed instead; "rows" multiplies as "tensor"
        does, and keeps each row, its attention and its cache in place.

    Raises:
      ValueError: for another name.
    """
    if sharding not in DECODING:
        raise ValueError(
            f"sharding={sharding!r} must be one of {', '.join(DECODING)}"
        )
    rules = reading_rules()
    if sharding == "train":
        return rules
    if sharding == "gathered":
        return {**rules, "embed": None}
    fsdp = mesh_axes(rules["embed"])
    wide = _joined(rules["mlp"], fsdp)
    rows = tuple(a for a in mesh_axes(rules["batch"]) if a not in fsdp)
    products = ("activation_mlp", "vocab", "heads", "kv_heads", "mlp")
    rules = {
        **rules,
        **dict.fromkeys(products, wide),
        "product_batch": rows,
        "tokens": rows,
        "draws": _joined(rows, wide),
        "embed": None,
    }
    if sharding == "rows":
        return rules
    heads = dict.fromkeys(("activation_heads", "activation_kv_heads"), wide)
    return {**rules, **heads, "batch": rows}


def mesh_axes(axes: Axes) -> tuple[str, ...]:
    """Return the mesh axes of a rule, or of one dimension of a partition."""
    return (axes,) if isinstance(axes, str) else tuple(axes or ())


def _joined(*parts: Axes) -> tuple[str, ...]:
    names = [name for part in parts for name in mesh_axes(part)]
    return tuple(dict.fromkeys(names))

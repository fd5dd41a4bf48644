"""Named tensors of a file into a decoder, and back; layers cut out.

Files hold one tensor a layer and linear maps as [out, in]; the decoder holds
one array a parameter, stacked over layers, as [in..., out...]. One parameter
at a time is read and placed (:mod:`topd_jax.models.io.streaming`), so host
memory
never holds two copies of a model.
"""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from topd_jax.models.config import DecoderConfig
from topd_jax.models.decoder import Decoder
from topd_jax.models.io.families import file_shape, weight
from topd_jax.models.io.streaming import (
    Finish,
    Read,
    block_bytes,
    local_blocks,
    progress,
    stream,
)
from topd_jax.models.parameters import parameter_layers, parameter_table
from topd_jax.parallel.hosts import on_host
from topd_jax.parallel.sharding import RULES, Rules, named

_FLOATS = ("float32", "float16", "bfloat16")


class TensorInfo(NamedTuple):
    """What a file says of one tensor before it is read."""

    shape: tuple[int, ...]
    dtype: str


def file_tensors(
    config: DecoderConfig, spelling: str
) -> dict[str, tuple[str, tuple[int, ...], tuple[int, ...]]]:
    """The tensors that a file of this decoder holds.

    Args:
      config: the decoder's shape.
      spelling: "hub" or "gguf", a field of
        :class:`~topd_jax.models.io.families.Weight`.

    Returns:
      name in the file -> (parameter, index into it, shape in the file); the
      index is (), (row of its layer,) or (row, expert).
    """
    tensors = {}
    for name, row in parameter_table(config).items():
        spelt = weight(config, name)
        template = getattr(spelt, spelling)
        if row.axes[0] != "layers":
            tensors[template] = name, (), file_shape(name, row.shape)
            continue
        for i, layer in enumerate(parameter_layers(config, name)):
            shape = file_shape(name, row.shape[1 + spelt.expert :])
            if not spelt.expert:
                tensors[template.format(layer)] = name, (i,), shape
                continue
            for expert in range(config.experts):
                tensor = template.format(layer, expert)
                tensors[tensor] = name, (i, expert), shape
    return tensors


def check_tensors(
    config: DecoderConfig,
    spelling: str,
    found: Mapping[str, TensorInfo],
    where: str,
) -> None:
    """Refuses a file that does not hold exactly the decoder's tensors.

    Args:
      config: the decoder's shape.
      spelling: "hub" or "gguf".
      found: what the file holds.
      where: the file, for the error.

    Raises:
      ValueError: naming every missing, extra, misshaped and mistyped tensor.
    """
    expected = file_tensors(config, spelling)
    faults = {
        "missing": [name for name in expected if name not in found],
        "not expected": [name for name in found if name not in expected],
        "wrong shape": [
            f"{name} is {list(found[name].shape)}, not {list(shape)}"
            for name, (_, _, shape) in expected.items()
            if name in found and found[name].shape != shape
        ],
        "wrong dtype": [
            f"{name} is {found[name].dtype}, not one of {', '.join(_FLOATS)}"
            for name in expected
            if name in found and found[name].dtype not in _FLOATS
        ],
    }
    lines = [
        f"{fault} ({len(names)}): " + ", ".join(names)
        for fault, names in faults.items()
        if names
    ]
    if lines:
        raise ValueError(
            f"the tensors of {where} do not fit its config "
            f"({config.layers} layers, tied={config.tied}):\n  "
            + "\n  ".join(lines)
        )


def assemble(
    config: DecoderConfig,
    spelling: str,
    read: Read,
    *,
    label: str,
    mesh: Mesh | None = None,
    rules: Rules | None = None,
    finish: Finish | None = None,
) -> Decoder:
    """Builds a decoder from a file's tensors, one parameter at a time.

    Args:
      config: the decoder's shape.
      spelling: "hub" or "gguf".
      read: (name in the file, slices) -> that part of it as floats, linear
        maps [out, in].
      label: the model's name, for the progress bar.
      mesh: where to spread the parameters; None keeps them on one device.
      rules: logical axis -> mesh axis; None takes the default rules.
      finish: (parameter, array) -> what the decoder holds instead; called as
        soon as the parameter is placed, before the next one is read.

    Returns:
      The model, its parameters in ``config.param_dtype``.

    Raises:
      ValueError: where a parameter does not divide over the mesh.
    """
    # Shardings first: a mesh that does not fit is told before any reading.
    shardings = shardings_of(config, mesh, rules)
    table, dtype = parameter_table(config), config.param_dtype
    sources: dict[str, list[tuple[str, tuple[int, ...]]]] = {}
    for tensor, (name, index, _) in file_tensors(config, spelling).items():
        sources.setdefault(name, []).append((tensor, index))
    total = sum(
        block_bytes(local_blocks(table[name].shape, shardings[name]), dtype)
        for name in sources
    )
    arrays = {}
    with progress(label, total) as advance:
        for name, tensors in sources.items():
            array = stream(
                name, table[name].shape, dtype, tensors, read,
                shardings[name], advance,
            )  # fmt: skip
            arrays[name] = array if finish is None else finish(name, array)
    return Decoder(config, arrays)


def shardings_of(
    config: DecoderConfig, mesh: Mesh | None, rules: Rules | None
) -> dict[str, NamedSharding | None]:
    """Where each parameter of a decoder goes.

    Args:
      config: the decoder's shape.
      mesh: of devices; None is one device.
      rules: logical axis -> mesh axis; None takes the default rules.

    Returns:
      parameter -> sharding, or None without a mesh.

    Raises:
      ValueError: where a parameter does not divide over the mesh.
    """
    table = parameter_table(config)
    if mesh is None:
        return dict.fromkeys(table)
    rules = RULES if rules is None else rules
    return {
        name: named(mesh, row.shape, row.axes, rules, name=name)
        for name, row in table.items()
    }


def disassemble(
    model: Decoder, spelling: str
) -> Iterator[tuple[str, np.ndarray]]:
    """The tensors of a decoder as a file spells them, one at a time.

    Args:
      model: any decoder, on one device or spread over a mesh. In a program of
        several processes every one of them must iterate.
      spelling: "hub" or "gguf".

    Yields:
      (name in the file, contiguous array), in the order of
      :func:`file_tensors`.
    """
    arrays = model.arrays
    host, held = np.empty(0), None
    for tensor, row in file_tensors(model.config, spelling).items():
        name, index, shape = row
        if held != name:
            host, held = _to_host(arrays[name]), name
        array = host[index]
        if weight(model.config, name).inputs:
            array = array.reshape(shape[::-1]).T
        yield tensor, np.ascontiguousarray(array).reshape(shape)


def drop_layers(model: Decoder, keep: Sequence[int]) -> Decoder:
    """The same network with only some of its layers.

    Ours: a student that starts from its teacher. Every array is a copy, so
    the student may be donated while the teacher lives on.

    Args:
      model: the network to cut.
      keep: indices of the layers to keep, ascending.

    Returns:
      A decoder of ``len(keep)`` layers, spread over devices as ``model`` is.

    Raises:
      ValueError: where ``keep`` is empty, unsorted or out of range.
    """
    keep = [int(i) for i in keep]
    layers = model.config.layers
    ascending = keep == sorted(set(keep))
    if not keep or not ascending or keep[0] < 0 or keep[-1] >= layers:
        raise ValueError(
            f"keep={keep} must be ascending layer indices, each once, "
            f"0..{layers - 1}; for instance {list(range(0, layers, 2))}"
        )
    table = parameter_table(model.config)
    arrays = {}
    for name, array in model.arrays.items():
        if table[name].axes[0] == "layers":
            owners = parameter_layers(model.config, name)
            rows = [i for i, layer in enumerate(owners) if layer in keep]
            if not rows:  # no layer of this kind is left
                continue
            kept = np.asarray(rows)
            arrays[name] = _each(lambda x, i=kept: x[i], array)
        else:
            arrays[name] = _each(jnp.copy, array)
    return Decoder(model.config.keep_layers(keep), arrays)


def _each(cut: Callable[[jax.Array], jax.Array], array: Any) -> Any:
    """Cuts an array, or both arrays of a quantised matrix, where they are."""
    return jax.tree.map(lambda x: jax.device_put(cut(x), x.sharding), array)


def fingerprint(model: Any) -> str:
    """A hash of a decoder's config and of every bit of its parameters.

    Each element's bits are mixed with its index and added up as integers
    modulo 2**32, so the sum does not depend on the order of addition: the
    same on any mesh. ``remat`` and ``unroll`` do not count, nor do options
    at their default: one that is added later changes no fingerprint.

    Args:
      model: any decoder; of another model the parameters alone are hashed,
        by the path of each in the pytree, and not the function.

    Returns:
      64 hexadecimal digits.
    """
    fields, arrays = {}, {"": model}
    if isinstance(model, Decoder):
        config, arrays = model.config, model.arrays
        fields = {
            field.name: getattr(config, field.name)
            for field in dataclasses.fields(config)
            if field.name not in ("remat", "unroll", "attention")
            and getattr(config, field.name) != field.default
        }
    digest = hashlib.sha256(
        json.dumps(fields, sort_keys=True, default=vars).encode()
    )
    parts = {  # a quantised matrix is two arrays
        f"{name}{jax.tree_util.keystr(path)}{x.shape}{x.dtype}": x
        for name in sorted(arrays)
        for path, x in jax.tree_util.tree_leaves_with_path(arrays[name])
    }
    # Known to every process, also those without devices of the model's.
    sums = on_host([_bit_sums(x) for x in parts.values()])
    for label, found in zip(parts, sums, strict=True):
        digest.update(label.encode())
        digest.update(found.astype("<u4").tobytes())
    return digest.hexdigest()


@jax.jit
def _bit_sums(x: jax.Array) -> jax.Array:
    if x.dtype == jnp.int4:
        x = x.astype(jnp.int8)
    sizes = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}
    wide = sizes[x.dtype.itemsize]
    bits = jax.lax.bitcast_convert_type(x, wide).astype(jnp.uint32)
    index = jnp.zeros(x.shape, jnp.uint32)
    for axis, size in enumerate(x.shape):
        place = jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
        index = index * np.uint32(size) + place
    mixed = _mix(bits ^ _mix(index + np.uint32(0x9E3779B9)))
    again = _mix(mixed + np.uint32(0x85EBCA6B))
    sums = [jnp.sum(part, dtype=jnp.uint32) for part in (mixed, again)]
    return jnp.stack(sums)


def _mix(x: jax.Array) -> jax.Array:
    """The 32-bit finaliser of MurmurHash3 (Appleby): a bijection."""
    x = (x ^ (x >> 16)) * np.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * np.uint32(0xC2B2AE35)
    return x ^ (x >> 16)


def _to_host(array: jax.Array) -> np.ndarray:
    if array.is_fully_addressable:
        return np.asarray(array)
    from jax.experimental import multihost_utils

    return multihost_utils.process_allgather(array, tiled=True)

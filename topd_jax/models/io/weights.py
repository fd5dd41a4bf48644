"""Named tensors of a file into a decoder, and back.

Files hold one tensor a layer and linear maps as [out, in]; the decoder holds
one array a parameter, stacked over layers, as [in..., out...]. One parameter
at a time is read and placed (:mod:`topd_jax.models.io.streaming`), so host
memory never holds two copies of a model.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from tqdm import tqdm

from topd_jax.models.config import DecoderConfig
from topd_jax.models.decoder import Decoder
from topd_jax.models.io.families import Family
from topd_jax.models.io.fused import TensorInfo, split_fused
from topd_jax.models.io.streaming import Read, Rows, stream
from topd_jax.models.io.tensors import WEIGHTS, file_shape, hub_name
from topd_jax.models.parameters import (
    layers_of,
    parameter_shardings,
    parameter_table,
)
from topd_jax.parallel import hosts

# What becomes of a parameter once it is placed, by name.
Finish = Callable[[str, jax.Array], object]

_FLOATS = ("float32", "float16", "bfloat16")
# Models below this are read before a bar could be looked at.
_SHOWN_BYTES = 64 << 20


class Placement(NamedTuple):
    """Where the parameters of a model that is read go.

    Attributes:
      label: the model's name, for the progress bar.
      mesh: where to spread the parameters; None keeps them on one device.
      finish: (parameter, array) -> what the decoder holds instead; called as
        soon as the parameter is placed, before the next one is read.
    """

    label: str = "model"
    mesh: Mesh | None = None
    finish: Finish | None = None


def file_tensors(config: DecoderConfig, family: Family | None = None) -> Rows:
    """List the tensors that a file of this decoder holds.

    Args:
      config: the decoder's shape.
      family: of the file; its fused tensors are listed in parts. None names
        them as most do.

    Returns:
      name in the file -> (parameter, index into it, shape in the file).
    """
    tensors = {}
    for name, row in parameter_table(config).items():
        stacked = row.shape[: 1 + WEIGHTS[name].expert]
        if row.axes[0] != "layers":
            stacked = ()
        shape = file_shape(name, row.shape[len(stacked) :])
        template = hub_name(config, name, family.names if family else {})
        layers = layers_of(config, name)
        for index in np.ndindex(stacked):
            at = [layers[i] for i in index[:1]] + [*index[1:]]
            tensors[template.format(*at)] = name, index, shape
    return tensors


def require_tensors(
    expected: Mapping[str, tuple[int, ...]],
    tensors: Mapping[str, TensorInfo],
    where: str,
) -> None:
    """Refuse a file that does not hold exactly these tensors.

    Args:
      expected: name -> shape.
      tensors: of the file.
      where: beginning of the error, the file.

    Raises:
      ValueError: naming every missing, extra, misshaped and mistyped tensor.
    """
    both = [name for name in expected if name in tensors]
    faults = {
        "missing": [name for name in expected if name not in tensors],
        "not expected": [name for name in tensors if name not in expected],
        "wrong shape": [
            f"{n} is {list(tensors[n].shape)}, not {list(expected[n])}"
            for n in both
            if tensors[n].shape != expected[n]
        ],
        "wrong dtype": [
            f"{n} is {tensors[n].dtype}, not one of {', '.join(_FLOATS)}"
            for n in both
            if tensors[n].dtype not in _FLOATS
        ],
    }
    if any(faults.values()):
        raise ValueError(
            f"{where}:\n  "
            + "\n  ".join(
                f"{fault} ({len(names)}): {', '.join(names)}"
                for fault, names in faults.items()
                if names
            )
        )


def assemble(
    config: DecoderConfig,
    tensors: Mapping[str, TensorInfo],
    read: Read,
    placement: Placement,
    where: str = "the file",
    family: Family | None = None,
) -> Decoder:
    """Build a decoder from a file's tensors, one parameter at a time.

    Args:
      config: the decoder's shape.
      tensors: all of the file, by their names in safetensors files; those of
        all experts of a layer may be one.
      read: (name, slices) -> that part of it as floats, linear maps [out, in].
      placement: of the parameters.
      where: the file, for the error.
      family: of the file; None names tensors as most do.

    Returns:
      The model, its parameters in ``config.param_dtype``.

    Raises:
      ValueError: where the tensors are not exactly the decoder's, all of them
        by name, or a parameter does not divide over the mesh.
    """
    expected = file_tensors(config, family)
    fused = family.fused if family else ()
    tensors, read = split_fused(tensors, read, expected, fused)
    require_tensors(
        {name: shape for name, (_, _, shape) in expected.items()},
        tensors,
        f"the tensors of {where} do not fit its config ({config.layers} "
        f"layers, tied={config.tied})",
    )

    def parameter(name: str, sharding: NamedSharding | None) -> jax.Array:
        shape = parameter_table(config)[name].shape
        return stream(name, shape, config.param_dtype, expected, read, sharding)

    return build(config, parameter, placement)


def build(
    config: DecoderConfig,
    parameter: Callable[[str, NamedSharding | None], jax.Array],
    placement: Placement,
) -> Decoder:
    """Build a decoder from its parameters, one at a time.

    A bar of bytes is shown while a large model is read.

    Args:
      config: the decoder's shape.
      parameter: (name, sharding) -> the parameter.
      placement: of the parameters.

    Returns:
      The model.

    Raises:
      ValueError: where a parameter does not divide over the mesh.
    """
    # Shardings first: a mesh that does not fit is refused before any reading.
    shardings = parameter_shardings(config, placement.mesh)
    width = jnp.dtype(config.param_dtype).itemsize
    sizes = {
        name: math.prod(row.shape) * width
        for name, row in parameter_table(config).items()
    }
    arrays, total = {}, sum(sizes.values())
    with tqdm(
        total=total, desc=placement.label, unit="B", unit_scale=True,
        disable=total < _SHOWN_BYTES or not hosts.is_first(),
    ) as bar:  # fmt: skip
        for name, size in sizes.items():
            array = parameter(name, shardings[name])
            if placement.finish is not None:
                array = placement.finish(name, array)
            arrays[name] = array
            bar.update(size)
    return Decoder(config, arrays)


def disassemble(
    model: Decoder, tensors: Rows | None = None, keep: int = 1
) -> Iterator[tuple[str, np.ndarray]]:
    """Yield the tensors of a decoder as a file spells them, one at a time.

    Args:
      model: any decoder, on one device or spread over a mesh. In a program of
        several processes every one of them must iterate.
      tensors: which, in the form of :func:`file_tensors`; None takes all.
      keep: parameters that the host holds at once.

    Yields:
      (name in the file, contiguous array), in the same order.
    """
    if tensors is None:
        tensors = file_tensors(model.config)
    held: dict[str, np.ndarray] = {}
    for tensor, (name, index, shape) in tensors.items():
        if name not in held:
            if len(held) == keep:
                del held[next(iter(held))]
            (held[name],) = hosts.on_host([model.arrays[name]])
        array = held[name][index]
        if WEIGHTS[name].inputs:
            array = array.reshape(shape[::-1]).T
        yield tensor, np.ascontiguousarray(array).reshape(shape)

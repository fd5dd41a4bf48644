"""Named tensors of a file into a decoder, and back.

Files hold one tensor a layer and linear maps as [out, in]; the decoder holds
one array a parameter, stacked over layers, as [in..., out...]. One parameter
at a time is read and placed (:mod:`topd_jax.models.io.streaming`), so host
memory never holds two copies of a model.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from topd_jax.models.config import DecoderConfig
from topd_jax.models.decoder import Decoder
from topd_jax.models.io.families import file_shape, weight
from topd_jax.models.io.streaming import (
    Advance,
    Finish,
    Read,
    block_bytes,
    local_blocks,
    progress,
    stream,
)
from topd_jax.models.parameters import parameter_table
from topd_jax.parallel.rules import RULES, Rules
from topd_jax.parallel.sharding import named

_FLOATS = ("float32", "float16", "bfloat16")


class TensorInfo(NamedTuple):
    """What a file says of one tensor before it is read."""

    shape: tuple[int, ...]
    dtype: str


def file_tensors(
    config: DecoderConfig, spelling: str
) -> dict[str, tuple[str, tuple[int, ...], tuple[int, ...]]]:
    """List the tensors that a file of this decoder holds.

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
        spelled = weight(config, name)
        template = getattr(spelled, spelling)
        if row.axes[0] != "layers":
            tensors[template] = name, (), file_shape(name, row.shape)
            continue
        # Layers, and experts where the parameter has one of each.
        stacked = row.shape[: 1 + spelled.expert]
        shape = file_shape(name, row.shape[len(stacked) :])
        for index in np.ndindex(stacked):
            tensors[template.format(*index)] = name, index, shape
    return tensors


def split_experts(
    tensors: Mapping[str, TensorInfo],
    read: Read,
    parts_of: Callable[[str], Sequence[str]],
) -> tuple[dict[str, TensorInfo], Read]:
    """Show tensors that hold all experts as one tensor an expert.

    Args:
      tensors: name -> shape and dtype of all tensors.
      read: (name, slices) -> array.
      parts_of: name of a tensor -> names of the equal parts of its rows, "{}"
        for the expert; () where the tensor is shown as it is.

    Returns:
      The first two, in the spelling of one tensor an expert.
    """
    shown: dict[str, TensorInfo] = {}
    origins: dict[str, tuple[str, int, int]] = {}
    for name, info in tensors.items():
        parts = parts_of(name) if len(info.shape) == 3 else ()
        if not parts:
            shown[name] = info
            continue
        experts, rows, width = info.shape
        rows //= len(parts)
        for expert in range(experts):
            for i, part in enumerate(parts):
                own = part.format(expert)
                shown[own] = TensorInfo((rows, width), info.dtype)
                origins[own] = name, expert, i * rows

    def read_part(name: str, index: tuple[slice, ...]) -> np.ndarray:
        if name not in origins:
            return read(name, index)
        whole, expert, start = origins[name]
        rows, *others = index
        moved = slice(start + rows.start, start + rows.stop)
        return read(whole, (slice(expert, expert + 1), moved, *others))[0]

    return shown, read_part


def check_tensors(
    config: DecoderConfig,
    spelling: str,
    tensors: Mapping[str, TensorInfo],
    where: str,
) -> None:
    """Refuse a file that does not hold exactly the decoder's tensors.

    Args:
      config: the decoder's shape.
      spelling: "hub" or "gguf".
      tensors: of the file.
      where: the file, for the error.

    Raises:
      ValueError: naming every missing, extra, misshaped and mistyped tensor.
    """
    expected = file_tensors(config, spelling)
    shapes = {name: shape for name, (_, _, shape) in expected.items()}
    if faults := tensor_faults(shapes, tensors):
        raise ValueError(
            f"the tensors of {where} do not fit its config "
            f"({config.layers} layers, tied={config.tied}):\n  {faults}"
        )


def tensor_faults(
    expected: Mapping[str, tuple[int, ...]], tensors: Mapping[str, TensorInfo]
) -> str:
    """Name every missing, extra, misshaped and mistyped tensor of a file.

    Args:
      expected: name -> shape.
      tensors: of the file.

    Returns:
      A line a kind of fault; "" where there is none.
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
    return "\n  ".join(
        f"{fault} ({len(names)}): {', '.join(names)}"
        for fault, names in faults.items()
        if names
    )


class Placement(NamedTuple):
    """Where the parameters of a model that is read go.

    Attributes:
      label: the model's name, for the progress bar.
      mesh: where to spread the parameters; None keeps them on one device.
      rules: logical axis -> mesh axis; None takes the default rules.
      finish: (parameter, array) -> what the decoder holds instead; called as
        soon as the parameter is placed, before the next one is read.
    """

    label: str = "model"
    mesh: Mesh | None = None
    rules: Rules | None = None
    finish: Finish | None = None


def assemble(
    config: DecoderConfig,
    spelling: str,
    read: Read,
    placement: Placement,
) -> Decoder:
    """Build a decoder from a file's tensors, one parameter at a time.

    Args:
      config: the decoder's shape.
      spelling: "hub" or "gguf".
      read: (name in the file, slices) -> that part of it as floats, linear
        maps [out, in].
      placement: of the parameters.

    Returns:
      The model, its parameters in ``config.param_dtype``.

    Raises:
      ValueError: where a parameter does not divide over the mesh.
    """
    tensors: dict[str, list[tuple[str, tuple[int, ...]]]] = {}
    for tensor, (name, index, _) in file_tensors(config, spelling).items():
        tensors.setdefault(name, []).append((tensor, index))

    def parameter(
        name: str, sharding: NamedSharding | None, advance: Advance
    ) -> jax.Array:
        shape = parameter_table(config)[name].shape
        return stream(
            name, shape, config.param_dtype, tensors[name], read, sharding,
            advance,
        )  # fmt: skip

    return build(config, parameter, placement)


def build(
    config: DecoderConfig,
    parameter: Callable[[str, NamedSharding | None, Advance], jax.Array],
    placement: Placement,
) -> Decoder:
    """Build a decoder from its parameters, one at a time.

    Args:
      config: the decoder's shape.
      parameter: (name, sharding, report of bytes read) -> the parameter.
      placement: of the parameters.

    Returns:
      The model.

    Raises:
      ValueError: where a parameter does not divide over the mesh.
    """
    # Shardings first: a mesh that does not fit is refused before any reading.
    shardings = shardings_of(config, placement.mesh, placement.rules)
    table, finish = parameter_table(config), placement.finish
    total = sum(
        block_bytes(
            local_blocks(row.shape, shardings[name]), config.param_dtype
        )
        for name, row in table.items()
    )
    arrays = {}
    with progress(placement.label, total) as advance:
        for name in table:
            array = parameter(name, shardings[name], advance)
            arrays[name] = array if finish is None else finish(name, array)
    return Decoder(config, arrays)


def shardings_of(
    config: DecoderConfig, mesh: Mesh | None, rules: Rules | None
) -> dict[str, NamedSharding | None]:
    """Return where each parameter of a decoder goes.

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
    """Yield the tensors of a decoder as a file spells them, one at a time.

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


def _to_host(array: jax.Array) -> np.ndarray:
    if array.is_fully_addressable:
        return np.asarray(array)
    from jax.experimental import multihost_utils

    return multihost_utils.process_allgather(array, tiled=True)

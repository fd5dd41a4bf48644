"""Adapters in the directories that PEFT writes and loads, without torch.

``adapter_config.json`` says rank, scale and targets, and
``adapter_model.safetensors`` holds ``lora_A`` [r, in] and ``lora_B`` [out, r]
of every adapted linear map. Reading is strict: what would change the
arithmetic and is not implemented is refused by name. Adapters of maps that a
family fuses (q, k and v of Phi-3) are read and not written: PEFT has one A for
all of them, and here each has its own.
"""

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from safetensors.numpy import save_file

from topd_jax.models.config import DecoderConfig, Lora
from topd_jax.models.decoder import Decoder
from topd_jax.models.io.export import check_free, staged, write_json
from topd_jax.models.io.families import FAMILIES
from topd_jax.models.io.fused import TensorInfo
from topd_jax.models.io.huggingface import (
    open_tensors,
    read_json,
    require_file,
    resolve,
)
from topd_jax.models.io.streaming import Read, Rows, stream
from topd_jax.models.io.tensors import ADAPTER_PREFIX, WEIGHTS
from topd_jax.models.io.weights import (
    disassemble,
    file_tensors,
    require_tensors,
)
from topd_jax.models.lora import adapted_config
from topd_jax.models.parameters import parameter_shardings, parameter_table

CONFIG_FILE = "adapter_config.json"
TENSOR_FILE = "adapter_model.safetensors"

# Read here, or of no consequence to the arithmetic of a loaded adapter:
# dropout acts in PEFT's own training only.
_READ = frozenset(
    {
        "peft_type", "r", "lora_alpha", "target_modules", "use_rslora",
        "task_type", "bias", "init_lora_weights", "auto_mapping",
        "peft_version", "base_model_name_or_path", "revision",
        "inference_mode", "lora_dropout", "exclude_modules", "megatron_core",
        "qalora_group_size", "eva_config",
    }
)  # fmt: skip
_ONLY: dict[str, tuple[object, ...]] = {
    "peft_type": ("LORA",),
    "task_type": ("CAUSAL_LM", None),
    "bias": ("none",),
    # The others change the model below the adapters.
    "init_lora_weights": (True, False, None, "gaussian", "orthogonal", "eva"),
}
_MERGE = (
    "merge it with peft (merge_and_unload, save_pretrained) and give the "
    "merged model"
)


def load_adapter(
    model: Decoder,
    source: str | os.PathLike,
    *,
    mesh: Mesh | None = None,
) -> Decoder:
    """Put the adapters of a PEFT directory beside a decoder's linear maps.

    Args:
      model: the decoder that they belong to, without adapters.
      source: a directory, or a hub name.
      mesh: where to spread them; None is one device.

    Returns:
      The model with adapters, which are float32.

    Raises:
      ValueError: for fields that are not supported, and for every missing,
        extra or misshaped tensor, by name.
    """
    directory = resolve(source)
    fields, path = read_json(directory / CONFIG_FILE), directory / TENSOR_FILE
    require_file(path)
    with open_tensors([path]) as (tensors, read):
        tensors, read = _split(tensors, read, model.config)
        lora = _lora(model.config, fields, tensors, directory)
        config = adapted_config(model, lora)
        rows = _adapter_tensors(config)
        require_tensors(
            {name: shape for name, (_, _, shape) in rows.items()},
            tensors,
            f"the tensors of {path} do not fit its config and this model, so "
            f"{_MERGE}",
        )
        table = parameter_table(config)
        shardings = parameter_shardings(config, mesh)
        arrays = {
            name: stream(
                name, table[name].shape, "float32", rows, read, shardings[name]
            )
            for name in dict.fromkeys(name for name, _, _ in rows.values())
        }
    return Decoder(config, model.arrays | arrays)


def save_adapter(
    model: Decoder, directory: str | os.PathLike, *, base: str
) -> Path:
    """Write a decoder's adapters as a directory that PEFT loads.

    In a program of several processes every process must call this; the first
    one writes.

    Args:
      model: a decoder with adapters.
      directory: destination; must be new or empty.
      base: name or path of the model without them.

    Returns:
      The directory.

    Raises:
      ValueError: where there are no adapters, or the place is taken.
      OSError: where the disk is full or refuses; nothing has changed then.
    """
    lora = model.config.lora
    if lora is None:
        raise ValueError(
            "the model has no adapters to write; write it whole, with "
            "save_model"
        )
    target = Path(directory).resolve()
    check_free(target)
    tensors = dict(disassemble(model, _adapter_tensors(model.config)))
    if jax.process_index() != 0:
        return target
    whole = float(lora.alpha).is_integer()
    fields = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": lora.rank,
        "lora_alpha": int(lora.alpha) if whole else lora.alpha,
        "use_rslora": lora.rank_stabilized,
        "target_modules": [_module(t) for t in lora.targets],
        "bias": "none",
        "lora_dropout": 0.0,
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    with staged(target) as staging:
        save_file(tensors, staging / TENSOR_FILE, metadata={"format": "pt"})
        write_json(staging / CONFIG_FILE, fields)
    return target


def _split(
    tensors: Mapping[str, TensorInfo], read: Read, config: DecoderConfig
) -> tuple[dict[str, TensorInfo], Read]:
    """Show the adapter of a map that files fuse as one of each parameter.

    B A of the fused map has the rows of all of them: each has the same A and
    its own rows of B.
    """
    fused = {
        spec.hub.split(".")[-2]: spec.parameters
        for family in FAMILIES.values()
        for spec in family.fused
        if not spec.experts
    }
    sizes = {n: shape[0] for n, _, shape in file_tensors(config).values()}
    shown: dict[str, TensorInfo] = {}
    places: dict[str, tuple[str, int]] = {}
    for tensor, info in tensors.items():
        stem, _, end = tensor.rpartition(".lora_")
        block, _, module = stem.rpartition(".")
        parameters = fused.get(module, ())
        is_b = end.startswith("B")
        whole = sum(sizes.get(name, 0) for name in parameters)
        if not whole or (is_b and info.shape[:1] != (whole,)):
            shown[tensor] = info
            continue
        start = 0
        for name in parameters:
            part = f"{block}.{_module(name)}.lora_{end}"
            rows = sizes[name] if is_b else info.shape[0]
            shown[part] = TensorInfo((rows, *info.shape[1:]), info.dtype)
            places[part] = tensor, start
            start += rows if is_b else 0

    def read_part(name: str, index: tuple[slice, ...]) -> np.ndarray:
        tensor, start = places.get(name, (name, 0))
        rows, *others = index
        moved = slice(start + rows.start, start + rows.stop)
        return read(tensor, (moved, *others))

    return shown, read_part


def _adapter_tensors(config: DecoderConfig) -> Rows:
    """List the tensors of a PEFT file, as :func:`file_tensors` does."""
    return {
        name: row
        for name, row in file_tensors(config).items()
        if name.startswith(ADAPTER_PREFIX)
    }


def _module(target: str) -> str:
    return WEIGHTS[target].hub.split(".")[-2]


def _lora(
    config: DecoderConfig,
    fields: Mapping[str, Any],
    tensors: Iterable[str],
    directory: Path,
) -> Lora:
    """Read the adapters' shape."""
    where = directory / CONFIG_FILE
    problems = [
        f"{name}={fields.get(name)!r} is not supported, only "
        f"{', '.join(map(repr, allowed))}"
        for name, allowed in _ONLY.items()
        if fields.get(name) not in allowed
    ]
    problems += [
        f"{name}={value!r} is not supported"
        for name, value in fields.items()
        if name not in _READ and value
    ]
    rank, alpha = fields.get("r"), fields.get("lora_alpha")
    if type(rank) is not int or rank < 1:
        problems.append(f"r={rank!r} must be a positive integer")
    if type(alpha) not in (int, float) or alpha <= 0:
        problems.append(f"lora_alpha={alpha!r} must be a positive number")
    if problems:
        raise ValueError(
            f"{where} cannot be read: {'; '.join(problems)}; {_MERGE}"
        )
    # The tensors tell: target_modules may be a regular expression.
    modules = {name.split(".lora_")[0].split(".")[-1] for name in tensors}
    targets = tuple(t for t in config.lora_targets if _module(t) in modules)
    stabilized = bool(fields.get("use_rslora"))
    return Lora(rank, float(alpha), targets or config.lora_targets, stabilized)

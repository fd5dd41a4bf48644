"""Adapters in the directories that PEFT writes and loads, without torch.

``adapter_config.json`` says rank, scale and targets, and
``adapter_model.safetensors`` holds ``lora_A`` [r, in] and ``lora_B`` [out, r]
of every adapted linear map. Reading is strict: what would change the
arithmetic and is not implemented is refused by name.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from topd_jax.models.config import DecoderConfig, Lora
from topd_jax.models.decoder import Decoder
from topd_jax.models.io.export import check_free, staged, write_json
from topd_jax.models.io.families import WEIGHTS
from topd_jax.models.io.huggingface import read_json, resolve
from topd_jax.models.io.weights import TensorInfo, tensor_faults
from topd_jax.models.lora import add_lora, split
from topd_jax.models.parameters import (
    LORA_A,
    LORA_B,
    linear_inputs,
    parameter_table,
)
from topd_jax.parallel.hosts import on_host
from topd_jax.parallel.rules import Rules

CONFIG_FILE = "adapter_config.json"
TENSOR_FILE = "adapter_model.safetensors"

_PREFIX = "base_model.model."
_FACTORS = ((LORA_A, "lora_A"), (LORA_B, "lora_B"))
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
    rules: Rules | None = None,
) -> Decoder:
    """Put the adapters of a PEFT directory beside a decoder's linear maps.

    Args:
      model: the decoder that they belong to, without adapters.
      source: a directory, or a hub name.
      mesh: where to spread them; None is one device.
      rules: logical axis -> mesh axis; None takes the default rules.

    Returns:
      The model with adapters, which are float32.

    Raises:
      ValueError: for fields that are not supported, and for every missing,
        extra or misshaped tensor, by name.
    """
    directory = resolve(source)
    fields = read_json(directory / CONFIG_FILE)
    tensors = _read_tensors(directory)
    lora = _lora(model.config, fields, tensors, directory)
    config = model.config.replace(lora=lora)
    rows = adapter_tensors(config)
    shapes = {name: shape for name, (_, _, shape) in rows.items()}
    held = {n: TensorInfo(x.shape, x.dtype.name) for n, x in tensors.items()}
    if faults := tensor_faults(shapes, held):
        raise ValueError(
            f"the tensors of {directory / TENSOR_FILE} do not fit its config "
            f"and this model:\n  {faults}\n{_MERGE}"
        )
    table = parameter_table(config)
    arrays = {
        name: np.empty(table[name].shape, np.float32)
        for name in {name for name, _, _ in rows.values()}
    }
    for tensor, (name, i, _) in rows.items():
        target = arrays[name][i]
        target[...] = tensors[tensor].T.reshape(target.shape)
    return add_lora(model, lora, arrays, mesh=mesh, rules=rules)


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
    adapters, frozen = split(model)
    if frozen is None:
        raise ValueError(
            "the model has no adapters to write; write it whole, with "
            "save_model"
        )
    target = Path(directory).resolve()
    check_free(target, overwrite=False)
    host = on_host(adapters.arrays)
    if jax.process_index() != 0:
        return target
    tensors = {
        tensor: np.ascontiguousarray(host[name][i].reshape(shape[::-1]).T)
        for tensor, (name, i, shape) in adapter_tensors(model.config).items()
    }
    lora = adapters.lora
    whole = float(lora.alpha).is_integer()
    fields = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": lora.rank,
        "lora_alpha": int(lora.alpha) if whole else lora.alpha,
        "use_rslora": lora.rank_stabilized,
        "target_modules": [_module(t).split(".")[-1] for t in lora.targets],
        "bias": "none",
        "lora_dropout": 0.0,
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    with staged(target, sum(x.nbytes for x in tensors.values())) as staging:
        save_file(tensors, staging / TENSOR_FILE, metadata={"format": "pt"})
        write_json(staging / CONFIG_FILE, fields)
    return target


def adapter_tensors(
    config: DecoderConfig,
) -> dict[str, tuple[str, int, tuple[int, int]]]:
    """List the tensors of a PEFT file for this decoder.

    Args:
      config: of a decoder with adapters.

    Returns:
      name in the file -> (parameter, row of its layer, shape in the file).
    """
    table, tensors = parameter_table(config), {}
    for target in config.lora.targets:
        module = _PREFIX + _module(target)
        for i in range(config.layers):
            for suffix, factor in _FACTORS:
                shape = table[target + suffix].shape[1:]
                inputs = linear_inputs(target) if suffix == LORA_A else 1
                size = int(np.prod(shape[:inputs]))
                tensors[f"{module.format(i)}.{factor}.weight"] = (
                    target + suffix, i, (int(np.prod(shape)) // size, size),
                )  # fmt: skip
    return tensors


def _module(target: str) -> str:
    return WEIGHTS[target].hub.removesuffix(".weight")


def _lora(
    config: DecoderConfig,
    fields: Mapping[str, Any],
    tensors: Mapping[str, np.ndarray],
    directory: Path,
) -> Lora:
    """Read the adapters' shape."""
    where = directory / CONFIG_FILE
    problems = [
        f"{name}={fields.get(name)!r} is not supported, only "
        f"{', '.join(map(repr, allowed))}"
        for name, allowed in _ONLY.items()
        if name != "init_lora_weights" or name in fields
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
    targets, unknown = _targets(config, fields.get("target_modules"), tensors)
    if unknown or not targets:
        known = ", ".join(
            _module(t).split(".")[-1] for t in config.lora_targets
        )
        problems.append(
            f"target_modules={fields.get('target_modules')!r} must be some of "
            f"{known}"
        )
    if problems:
        raise ValueError(
            f"{where} cannot be read: {'; '.join(problems)}; {_MERGE}"
        )
    stabilized = bool(fields.get("use_rslora"))
    return Lora(rank, float(alpha), targets, stabilized)


def _targets(
    config: DecoderConfig, given: object, tensors: Mapping[str, np.ndarray]
) -> tuple[tuple[str, ...], list[str]]:
    """Return (parameters that are adapted, modules that are not known)."""
    parameters = {_module(t).split(".")[-1]: t for t in config.lora_targets}
    if given == "all-linear":
        return config.lora_targets, []
    if isinstance(given, str):  # a regular expression; the tensors tell
        modules = [name.split(".lora_")[0] for name in tensors]
    else:
        modules = list(given) if isinstance(given, list) else []
    names = {str(m).split(".")[-1] for m in modules}
    known = tuple(parameters[n] for n in sorted(names & set(parameters)))
    return known, sorted(names - set(parameters))


def _read_tensors(directory: Path) -> dict[str, np.ndarray]:
    path = directory / TENSOR_FILE
    if not path.exists():
        others = sorted(p.name for p in directory.glob("*.bin"))
        hint = f"; convert {', '.join(others)} to safetensors" if others else ""
        raise ValueError(f"no file {path}{hint}")
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{path} cannot be read ({error}); was its download cut short?"
        ) from error

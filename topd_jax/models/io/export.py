"""Writes a decoder as a Hugging Face directory that transformers loads.

Everything is written beside the destination and renamed at the end, so a full
disk or a kill leaves what was there before.
"""

import contextlib
import errno
import json
import math
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import save_file

from topd_jax.models.decoder import Decoder
from topd_jax.models.io.hub_config import config_json
from topd_jax.models.io.huggingface import (
    INDEX_FILE,
    TOKENIZER_FILES,
    read_json,
)
from topd_jax.models.io.weights import disassemble, file_tensors
from topd_jax.models.lora import merge_lora
from topd_jax.models.quantization import require_floats

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_GENERATION = "generation_config.json"
_SPECIAL_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
# transformers says "no limit" with int(1e30).
_NO_LIMIT = 10**9


def save_model(
    model: Decoder,
    directory: str | os.PathLike,
    *,
    model_type: str | None = None,
    tokenizer: "PreTrainedTokenizerBase | None" = None,
    source: str | os.PathLike | None = None,
    extra: Mapping[str, Any] | None = None,
    dtype: str | None = None,
    max_shard_bytes: int = 5_000_000_000,
    overwrite: bool = False,
) -> Path:
    """Write config.json, safetensors and the tokenizer's files.

    In a program of several processes every process must call this; the first
    one writes.

    Args:
      model: what to write; adapters are merged.
      directory: destination; must be new or empty, unless ``overwrite``.
      model_type: a family; None takes that of ``source``, or else the first
        that fits.
      tokenizer: saved with the model; its special ids go into the config.
      source: directory of the model this one descends from; its tokenizer's
        files and generation_config.json are copied, its special ids and
        length limit kept. ``tokenizer`` goes before it.
      extra: config fields that do not change the logits, over all others.
      dtype: of the written tensors; None writes them as they are kept.
      max_shard_bytes: above this the weights are split, with an index.
      overwrite: replace a directory that holds an earlier model.

    Returns:
      The directory.

    Raises:
      ValueError: for a family or field that does not fit, a quantized model,
        or a destination that is not free.
      OSError: where the disk is full or refuses; nothing has changed then.
    """
    require_floats(model, "export")
    model = merge_lora(model)
    target = Path(directory).resolve()
    check_free(target, overwrite)
    inherited, like = _inherited(tokenizer, source)
    fields = config_json(
        model.config, model_type, inherited | (extra or {}), like
    )
    dtype = dtype or model.config.param_dtype
    fields |= {"dtype": dtype, "torch_dtype": dtype}
    plan, shards = _shards(model, dtype, max_shard_bytes)
    if jax.process_index() != 0:
        for _ in shards:  # the others' part in gathering
            pass
        return target
    with staged(target, plan.metadata["total_size"]) as staging:
        for file, tensors in shards:
            save_file(tensors, staging / file, metadata={"format": "pt"})
        if plan.is_sharded:
            owners = plan.tensor_to_filename
            index = {"metadata": plan.metadata, "weight_map": owners}
            write_json(staging / INDEX_FILE, index)
        write_json(staging / "config.json", fields)
        _write_tokenizer(staging, tokenizer, source, fields)
    return target


def check_free(target: Path, overwrite: bool) -> None:
    """Refuse a directory whose contents would be lost.

    Args:
      target: where something is to be written.
      overwrite: whether a model that is there may go.

    Raises:
      ValueError: where the directory is not empty, and may not go or holds
        something else than a model.
    """
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return
    if not overwrite:
        raise ValueError(
            f"{target} exists and is not empty; choose another directory, or "
            "pass overwrite=True to replace a model that it holds"
        )
    if not (target / "config.json").exists():
        raise ValueError(
            f"{target} holds no model (no config.json) and will not be "
            "replaced; choose another directory"
        )


def _inherited(
    tokenizer: "PreTrainedTokenizerBase | None",
    source: str | os.PathLike | None,
) -> tuple[dict[str, Any], str | None]:
    """Return the fields that a model takes over, and its source's family."""
    fields, like = {}, None
    if source is not None:
        config = read_json(Path(source) / "config.json")
        like = config.get("model_type")
        names = (*_SPECIAL_IDS, "max_position_embeddings")
        fields = {n: config[n] for n in names if config.get(n) is not None}
    if tokenizer is not None:
        ids = {name: getattr(tokenizer, name) for name in _SPECIAL_IDS}
        fields |= {n: int(i) for n, i in ids.items() if i is not None}
        if tokenizer.model_max_length < _NO_LIMIT:
            limit = int(tokenizer.model_max_length)
            fields["max_position_embeddings"] = limit
    return fields, like


def _shards(
    model: Decoder, dtype: str, most: int
) -> tuple[Any, Iterator[tuple[str, dict[str, np.ndarray]]]]:
    """Return the hub's plan of the files, and their tensors one by one."""
    # Slow to import, and needed here only.
    from huggingface_hub import split_state_dict_into_shards_factory

    rows, width = file_tensors(model.config), jnp.dtype(dtype).itemsize
    plan = split_state_dict_into_shards_factory(
        rows,
        get_storage_size=lambda row: math.prod(row[2]) * width,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=most,
    )

    def shards() -> Iterator[tuple[str, dict[str, np.ndarray]]]:
        for file, names in plan.filename_to_tensors.items():
            tensors = disassemble(model, {name: rows[name] for name in names})
            yield file, {n: x.astype(dtype, copy=False) for n, x in tensors}

    return plan, shards()


def _write_tokenizer(
    staging: Path,
    tokenizer: "PreTrainedTokenizerBase | None",
    source: str | os.PathLike | None,
    fields: Mapping[str, Any],
) -> None:
    copied = []
    if source is not None:
        names = (_GENERATION,) if tokenizer else (*TOKENIZER_FILES, _GENERATION)
        copied = [n for n in names if (Path(source) / n).exists()]
        for name in copied:
            shutil.copy(Path(source) / name, staging / name)
    if tokenizer is not None:
        tokenizer.save_pretrained(str(staging))
    if _GENERATION not in copied:
        ids = {n: fields[n] for n in _SPECIAL_IDS if n in fields}
        write_json(staging / _GENERATION, ids)


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write a file as ``transformers`` does: indented, with a final newline."""
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


@contextlib.contextmanager
def staged(target: Path, needed: int) -> Iterator[Path]:
    """Yield a directory beside ``target`` that replaces it on success."""
    parent = target.parent
    staging = parent / f".{target.name}.partial"
    previous = parent / f".{target.name}.previous"
    try:
        parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(staging, ignore_errors=True)  # of a run that was killed
        free = shutil.disk_usage(parent).free
        if needed > free:
            raise OSError(
                errno.ENOSPC, f"{needed:,} bytes needed, {free:,} free"
            )
        staging.mkdir()
        yield staging
        if target.exists():
            shutil.rmtree(previous, ignore_errors=True)
            target.rename(previous)
        staging.rename(target)
        shutil.rmtree(previous, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(staging, ignore_errors=True)
        if previous.exists() and not target.exists():
            previous.rename(target)
        raise OSError(
            getattr(error, "errno", None) or errno.EIO,
            f"could not write {target} ({error}); nothing there was changed: "
            "free some space or choose another directory",
        ) from error
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise

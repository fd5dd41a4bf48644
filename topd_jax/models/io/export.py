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
from topd_jax.models.io.families import FAMILIES, Family
from topd_jax.models.io.fused import join, whole_tensors
from topd_jax.models.io.hub_config import config_json
from topd_jax.models.io.huggingface import INDEX_FILE
from topd_jax.models.io.weights import disassemble, file_tensors
from topd_jax.models.lora import merge_lora
from topd_jax.models.quantization import require_floats

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_SPECIAL_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
# transformers says "no limit" with int(1e30).
_NO_LIMIT = 10**9


def save_model(
    model: Decoder,
    directory: str | os.PathLike,
    *,
    model_type: str | None = None,
    tokenizer: "PreTrainedTokenizerBase | None" = None,
    extra: Mapping[str, Any] | None = None,
    dtype: str | None = None,
    max_shard_bytes: int = 5_000_000_000,
) -> Path:
    """Write config.json, safetensors and the tokenizer's files.

    In a program of several processes every process must call this; the first
    one writes.

    Args:
      model: what to write; adapters are merged.
      directory: destination; must be new or empty.
      model_type: a family; None takes the first that fits.
      tokenizer: saved with the model; its special ids and its length limit go
        into the config.
      extra: config fields that do not change the logits, over those of the
        tokenizer; those that follow from the decoder stay.
      dtype: of the written tensors; None writes them as they are kept.
      max_shard_bytes: above this the weights are split, with an index.

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
    check_free(target)
    others: dict[str, Any] = {}
    if tokenizer is not None:
        ids = {name: getattr(tokenizer, name) for name in _SPECIAL_IDS}
        others = {n: int(i) for n, i in ids.items() if i is not None}
        if tokenizer.model_max_length < _NO_LIMIT:
            limit = int(tokenizer.model_max_length)
            others["max_position_embeddings"] = limit
    fields = config_json(model.config, model_type, others | (extra or {}))
    dtype = dtype or model.config.param_dtype
    fields |= {"dtype": dtype, "torch_dtype": dtype}
    family = FAMILIES[fields["model_type"]]
    plan, shards = _shards(model, family, dtype, max_shard_bytes)
    if jax.process_index() != 0:
        for _ in shards:  # the others' part in gathering
            pass
        return target
    with staged(target) as staging:
        for file, tensors in shards:
            save_file(tensors, staging / file, metadata={"format": "pt"})
        if plan.is_sharded:
            owners = plan.tensor_to_filename
            index = {"metadata": plan.metadata, "weight_map": owners}
            write_json(staging / INDEX_FILE, index)
        write_json(staging / "config.json", fields)
        if tokenizer is not None:
            tokenizer.save_pretrained(str(staging))
        ids = {n: fields[n] for n in _SPECIAL_IDS if n in fields}
        write_json(staging / "generation_config.json", ids)
    return target


def check_free(target: Path) -> None:
    """Refuse a directory whose contents would be lost.

    Args:
      target: where something is to be written.

    Raises:
      ValueError: where it is there and not an empty directory.
    """
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise ValueError(
            f"{target} exists and is not empty; remove it, or choose another "
            "directory"
        )


def _shards(
    model: Decoder, family: Family, dtype: str, most: int
) -> tuple[Any, Iterator[tuple[str, dict[str, np.ndarray]]]]:
    """Return the hub's plan of the files, and their tensors one by one."""
    # Slow to import, and needed here only.
    from huggingface_hub import split_state_dict_into_shards_factory

    rows, width = file_tensors(model.config, family), jnp.dtype(dtype).itemsize
    wholes = whole_tensors(rows, family.fused)
    keep = max((len(f.parameters) for f in family.fused), default=1)
    plan = split_state_dict_into_shards_factory(
        wholes,
        get_storage_size=lambda whole: math.prod(whole.shape) * width,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=most,
    )

    def shards() -> Iterator[tuple[str, dict[str, np.ndarray]]]:
        for file, names in plan.filename_to_tensors.items():
            own = [part for name in names for part in wholes[name].parts]
            parts = disassemble(model, {n: rows[n] for n in own}, keep)
            tensors = {}
            for name in names:
                arrays = [next(parts)[1] for _ in wholes[name].parts]
                whole = join(arrays, wholes[name].fused)
                tensors[name] = whole.astype(dtype, copy=False)
            yield file, tensors

    return plan, shards()


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write a file as ``transformers`` does: indented, with a final newline."""
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


@contextlib.contextmanager
def staged(target: Path) -> Iterator[Path]:
    """Yield a directory beside ``target`` that becomes it on success.

    Args:
      target: a new or empty directory.

    Raises:
      OSError: where the disk is full or refuses; nothing is left then.
    """
    staging = target.parent / f".{target.name}.partial"
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(staging, ignore_errors=True)  # of a run that was killed
        staging.mkdir()
        yield staging
        staging.replace(target)
    except (OSError, SafetensorError) as error:
        raise OSError(
            getattr(error, "errno", None) or errno.EIO,
            f"could not write {target} ({error}); nothing there was changed: "
            "free some space or choose another directory",
        ) from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)

"""What the files of a model say of it, without reading its weights (ours).

Shape, tokenizer and ends of sequence, from config.json,
generation_config.json and the tokenizer's files, or from the metadata of a
GGUF file: seconds at most, however large the model is.
"""

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from topd_jax.data.tokenizers import SentencePieceTokenizer
from topd_jax.models.config import DecoderConfig
from topd_jax.models.io.gguf import gguf_config, open_gguf, packaged_gguf
from topd_jax.models.io.gguf_tokenizer import gguf_tokenizer
from topd_jax.models.io.hub_config import decoder_config
from topd_jax.models.io.huggingface import load_tokenizer, read_json, resolve
from topd_jax.models.io.loading import PACKAGE, run_tokenizer
from topd_jax.models.io.runs import is_run, run_config, tokenizer_directory

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_GGUF_ENDS = ("tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id")


@dataclasses.dataclass(frozen=True)
class Description:
    """A model, as its files describe it.

    Attributes:
      config: its shape.
      tokenizer: of transformers, or ours; None where there is none.
      end_ids: ids that end its text, as its files name them: see
        :func:`end_ids`.
      config_end_ids: those that config.json names; generation ignores them
        where generation_config.json exists.
    """

    config: DecoderConfig
    tokenizer: "PreTrainedTokenizerBase | SentencePieceTokenizer | None"
    end_ids: tuple[int, ...]
    config_end_ids: tuple[int, ...] = ()


def describe(source: str | os.PathLike, **options: Any) -> Description:
    """Describes a model from wherever :func:`topd_jax.models.load` reads it.

    Args:
      source: as there.
      **options: dtype, param_dtype, remat, unroll and ignore, as there.

    Returns:
      The description; no weight has been read.

    Raises:
      ValueError: for whatever is missing, broken or not supported.
    """
    if _is_gguf(source):
        file = _open(source)
        return Description(
            gguf_config(file, **options),
            gguf_tokenizer(file),
            _ids(file.metadata, _GGUF_ENDS),
        )
    if is_run(source):
        config = run_config(source)
        config = config.replace(**options) if options else config
        return Description(
            config, run_tokenizer(tokenizer_directory(source)), ()
        )
    directory = resolve(source)
    path = directory / "config.json"
    fields = read_json(path)
    return Description(
        decoder_config(fields, where=str(path), **options),
        load_tokenizer(directory),
        _directory_ends(directory, fields),
        _ids(fields, ("eos_token_id",)),
    )


def end_ids(source: str | os.PathLike) -> tuple[int, ...]:
    """The ids at which generation with this model stops.

    generation_config.json names them ("eos_token_id", one or several: the end
    of a turn beside the end of a text); config.json does where that file is
    missing, as in transformers. A GGUF file names both in its metadata. The
    tokenizer's own end is not among them unless they say so. A run of ours
    has its tokenizer's alone.

    Args:
      source: as in :func:`topd_jax.models.load`.

    Returns:
      The ids in the files' order; () where they name none.

    Raises:
      ValueError: where the source is not there, or its file is not JSON.
    """
    if _is_gguf(source):
        return _ids(_open(source).metadata, _GGUF_ENDS)
    if is_run(source):
        return ()
    directory = resolve(source)
    return _directory_ends(directory, read_json(directory / "config.json"))


def _directory_ends(directory: Path, config: Mapping) -> tuple[int, ...]:
    path = directory / "generation_config.json"
    fields = read_json(path) if path.exists() else config
    return _ids(fields, ("eos_token_id",))


def _ids(fields: Mapping, names: tuple[str, ...]) -> tuple[int, ...]:
    found: list[int] = []
    for name in names:
        value = fields.get(name)
        found += value if isinstance(value, list) else [value]
    return tuple(dict.fromkeys(int(i) for i in found if i is not None))


def _is_gguf(source: str | os.PathLike) -> bool:
    return str(source).startswith(PACKAGE) or str(source).endswith(".gguf")


def _open(source: str | os.PathLike) -> Any:
    name = str(source)
    packaged = name.startswith(PACKAGE)
    return open_gguf(
        packaged_gguf(name.removeprefix(PACKAGE)) if packaged else name
    )

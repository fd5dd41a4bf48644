"""Models in Hugging Face directories: safetensors, without torch.

transformers itself is used for tokenizers only.
"""

import contextlib
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from safetensors import SafetensorError, safe_open

from topd_jax.models.config import DecoderConfig
from topd_jax.models.decoder import Decoder
from topd_jax.models.io.families import Family
from topd_jax.models.io.fused import TensorInfo
from topd_jax.models.io.mxfp4 import expand_mxfp4
from topd_jax.models.io.streaming import Read
from topd_jax.models.io.tensors import WEIGHTS
from topd_jax.models.io.weights import (
    Placement,
    assemble,
)
from topd_jax.models.io.wrappers import text_tensors
from topd_jax.parallel import buckets
from topd_jax.settings import parse_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
)

_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
# Objects and lists in each other, in JSON.
_DEEPEST = 50
_HUB_NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*")


def resolve(source: str | os.PathLike) -> Path:
    """Find a model's directory, on this disk or on the hub.

    Args:
      source: a directory, one in a bucket (``gs://...``), or a hub name such
        as ``Qwen/Qwen3-0.6B``, whose files are then downloaded into a cache.

    Returns:
      A local directory.

    Raises:
      ValueError: where it is neither, or the hub cannot be reached.
    """
    path = buckets.as_path(source)
    if path.is_dir():
        return buckets.copied(path)
    if path.exists():
        raise ValueError(
            f"{path} is a file; give the directory that holds config.json, or "
            "a file that ends in .gguf"
        )
    if not _HUB_NAME.fullmatch(str(source)):
        raise ValueError(
            f"no model at {path}: there is no such directory, and it is not a "
            "hub name (owner/name); check the path"
        )
    import huggingface_hub  # slow to import, and needed here only

    patterns = ["*.json", "*.safetensors", *TOKENIZER_FILES]
    try:
        return Path(
            huggingface_hub.snapshot_download(
                str(source),
                allow_patterns=patterns,
                # The weights once more, in the format of their makers.
                ignore_patterns=["*/*", "consolidated*"],
            )
        )
    except Exception as error:  # the client raises a dozen unrelated types
        raise ValueError(
            f"no model {source!r}: there is no such directory here, and the "
            f"hub did not give it ({type(error).__name__}); check the name "
            "and the network, or download it elsewhere and give its directory"
        ) from error


def hub_decoder(
    family: Family,
    directory: Path,
    config: DecoderConfig,
    placement: Placement,
) -> Decoder:
    """Load a decoder from safetensors.

    A tied model's file may hold ``lm_head.weight`` as well if it equals the
    embedding; where it does not, the config is wrong and loading refuses.

    Args:
      family: of the model.
      directory: holds ``model.safetensors``, or
        ``model.safetensors.index.json`` and its shards.
      config: the decoder's shape.
      placement: of the parameters.

    Returns:
      The model.

    Raises:
      ValueError: for a missing or broken file, or tensors that do not fit,
        all of them by name.
    """
    paths, named = _weight_files(directory)
    with open_tensors(paths) as (tensors, read):
        if lost := sorted(named - tensors.keys()):
            raise ValueError(
                f"{directory / INDEX_FILE} names {len(lost)} tensors that no "
                f"shard holds: {', '.join(lost)}; download them again"
            )
        # Old files hold inv_freq, which follows from rope_theta; new ones a
        # head that predicts several tokens, which the reference ignores.
        tensors = {
            name: info
            for name, info in tensors.items()
            if not name.endswith("rotary_emb.inv_freq")
            if not name.startswith("mtp.")
        }
        tensors, read = text_tensors(tensors, read)
        if family.packed:
            tensors, read = expand_mxfp4(tensors, read)
        if config.tied:
            _drop_tied_head(tensors, read, directory)
        return assemble(
            config, tensors, read, placement, str(directory), family
        )


def load_tokenizer(
    directory: str | os.PathLike,
) -> "PreTrainedTokenizerBase | None":
    """Load the tokenizer beside a model.

    Args:
      directory: of the model.

    Returns:
      The tokenizer; None where the directory holds none.

    Raises:
      ValueError: where its files cannot be read.
    """
    directory = Path(directory)
    there = [require_regular(directory / name) for name in TOKENIZER_FILES]
    if not any(there):
        return None
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(
            str(directory), trust_remote_code=False
        )
    except Exception as error:  # transformers raises many unrelated types
        raise ValueError(
            f"the tokenizer in {directory} cannot be read: {error}"
        ) from error


def without_further_ids(tokenizer: Any, rows: int) -> Any:
    """Take special tokens off a tokenizer that a model has no row for.

    Gemma 3's of one size have one for images, which this size does not read.

    Args:
      tokenizer: changed in place, unless it ends, pads or begins texts with
        such a token, or has others: these are refused where it is used.
      rows: of the model's embedding.

    Returns:
      The tokenizer.
    """
    added = getattr(tokenizer, "added_tokens_decoder", {})
    further = {i for i, token in added.items() if i >= rows and token.special}
    names = ("bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id")
    used = {getattr(tokenizer, name, None) for name in names}
    if not further or further & used or not tokenizer.is_fast:
        return tokenizer
    from tokenizers import Tokenizer

    fields = json.loads(tokenizer.backend_tokenizer.to_str())
    fields["added_tokens"] = [
        token for token in fields["added_tokens"] if token["id"] not in further
    ]
    tokenizer._tokenizer = Tokenizer.from_str(json.dumps(fields))
    return tokenizer


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Args:
      path: of the file.

    Returns:
      The object.

    Raises:
      ValueError: where the file is missing or is not a JSON object, or where
        its objects and lists nest deeper than any model's do.
    """
    if not require_regular(path):
        raise ValueError(f"no file {path}; is this a model?")
    value = parse_json(path.read_bytes(), str(path))
    if not isinstance(value, dict):
        raise ValueError(f"{path} must hold a JSON object, not {value!r:.40}")
    inner: list[Any] = [value]
    for _ in range(_DEEPEST):
        lists = [i.values() if isinstance(i, dict) else i for i in inner]
        inner = [v for i in lists for v in i if isinstance(v, dict | list)]
    if inner:
        raise ValueError(
            f"{path} nests deeper than {_DEEPEST} objects; correct the file"
        )
    return value


def _drop_tied_head(
    tensors: dict[str, TensorInfo],
    read: Read,
    directory: Path,
) -> None:
    head, embedding = WEIGHTS["output"].hub, WEIGHTS["embedding"].hub
    if head not in tensors or embedding not in tensors:
        return
    whole = (slice(None),)
    if not np.array_equal(read(head, whole), read(embedding, whole)):
        raise ValueError(
            f"{directory}: {head} differs from {embedding}, yet config.json "
            'says "tie_word_embeddings": true; set it to false to load both'
        )
    del tensors[head]


@contextlib.contextmanager
def open_tensors(
    paths: Sequence[Path],
) -> Iterator[tuple[dict[str, TensorInfo], Read]]:
    """Open safetensors files.

    Args:
      paths: of the files.

    Yields:
      (name -> what the tensor is, (name, slices) -> that part of it).

    Raises:
      ValueError: where a file is broken, or two hold a tensor differently.
    """
    tensors, owner = {}, {}
    with contextlib.ExitStack() as stack:
        for path in paths:
            require_regular(path)
            try:
                handle = stack.enter_context(safe_open(path, "np"))
            except (SafetensorError, OSError) as error:
                raise ValueError(
                    f"{path} cannot be read ({error}); was its download cut "
                    "short?"
                ) from error
            for name in handle.keys():  # noqa: SIM118 (not a dict)
                part = handle.get_slice(name)
                if name in owner and not np.array_equal(
                    owner[name].get_tensor(name), handle.get_tensor(name)
                ):
                    raise ValueError(
                        f"{path} and another file hold {name}, each with "
                        "other values; keep the one that the model was saved "
                        "with"
                    )
                kind = part.get_dtype()
                tensors[name] = TensorInfo(
                    tuple(part.get_shape()), _DTYPES.get(kind, kind)
                )
                owner[name] = handle
        yield tensors, lambda name, index: owner[name].get_slice(name)[index]


def require_regular(path: Path) -> bool:
    """Tell whether a file is there; refuse what is there and is no file.

    Args:
      path: of the file. A pipe would be waited for without end.

    Raises:
      ValueError: for a folder, a pipe, or a link that leads nowhere.
    """
    if os.path.lexists(path) and not path.is_file():
        raise ValueError(
            f"{path} is no file but a folder, a pipe or a link that leads "
            "nowhere; put the file in its place, or remove it"
        )
    return path.is_file()


def require_file(path: Path, other: str = "") -> None:
    """Refuse a directory without a file of tensors.

    Args:
      path: of the file.
      other: what might have been there instead, for the error.

    Raises:
      ValueError: naming files of torch that are there, to be converted.
    """
    if not require_regular(path):
        bins = sorted(p.name for p in path.parent.glob("*.bin"))
        hint = f"; convert {', '.join(bins)} to safetensors" if bins else ""
        raise ValueError(f"no file {path} {other}".rstrip() + hint)


def _weight_files(directory: Path) -> tuple[list[Path], set[str]]:
    """Return the files of tensors, and the tensors that an index names."""
    if require_regular(directory / SINGLE_FILE):
        return [directory / SINGLE_FILE], set()
    index = directory / INDEX_FILE
    require_file(index, f"or {SINGLE_FILE}")
    names = read_json(index).get("weight_map")
    if not isinstance(names, Mapping) or not names:
        raise ValueError(f'{index} has no "weight_map"; is it cut short?')
    if odd := [name for name in names.values() if not isinstance(name, str)]:
        raise ValueError(
            f'{index}: "weight_map" names {odd[0]!r}; each tensor must have '
            "the name of a file: download it again"
        )
    shards = sorted(set(names.values()))
    absent = [name for name in shards if not (directory / name).exists()]
    if absent:
        raise ValueError(
            f"{directory} lacks {len(absent)} of its {len(shards)} shards: "
            f"{', '.join(absent)}; download them"
        )
    return [directory / name for name in shards], set(names)

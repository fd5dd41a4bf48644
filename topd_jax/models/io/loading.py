"""Find a model and read it: a directory, a hub name, a GGUF file, or a run.

:func:`load` reads everything. :func:`describe` and :func:`shape_of` read no
weights: seconds at most, however large the model is.
"""

import dataclasses
import functools
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jax.sharding import Mesh

from topd_jax.models.config import DecoderConfig
from topd_jax.models.decoder import Decoder
from topd_jax.models.io.families import family_of
from topd_jax.models.io.gguf import (
    gguf_config,
    open_gguf,
    packaged_gguf,
)
from topd_jax.models.io.gguf_tokenizer import gguf_tokenizer
from topd_jax.models.io.gguf_weights import gguf_decoder
from topd_jax.models.io.hub_config import decoder_config
from topd_jax.models.io.huggingface import (
    hub_decoder,
    load_tokenizer,
    read_json,
    require_regular,
    resolve,
    without_further_ids,
)
from topd_jax.models.io.runs import (
    is_run,
    run_config,
    run_decoder,
    tokenizer_directory,
)
from topd_jax.models.io.weights import Finish, Placement
from topd_jax.models.io.wrappers import text_fields
from topd_jax.parallel import buckets

if TYPE_CHECKING:
    from sentencepiece import SentencePieceProcessor
    from transformers import PreTrainedTokenizerBase

    Tokenizer = PreTrainedTokenizerBase | SentencePieceProcessor

_PACKAGE = "package:"
_SENTENCEPIECE = "tokenizer.model"
# Token ids are int32.
_LARGEST_ID = np.iinfo(np.int32).max
_GGUF_ENDS = ("tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id")


def load(
    source: str | os.PathLike,
    *,
    dtype: str = "float32",
    param_dtype: str = "float32",
    remat: str = "none",
    unroll: int = 1,
    mesh: Mesh | None = None,
    length: int = 0,
    finish: Finish | None = None,
) -> "tuple[Decoder, Tokenizer | None]":
    """Load a model and its tokenizer.

    Args:
      source: a Hugging Face directory, a hub name (``owner/name``), a path
        that ends in ``.gguf``, ``package:NAME[==VERSION]`` for the GGUF file
        inside an installed Python package, or the work directory of a run
        (its student's latest checkpoint; ``WORKDIR/best`` for the best,
        ``WORKDIR/checkpoints/STEP`` for one).
      dtype: compute dtype, "float32" or "bfloat16".
      param_dtype: dtype in which parameters are kept.
      remat: see :class:`~topd_jax.models.config.DecoderConfig`.
      unroll: see the same.
      mesh: where to spread the parameters, by the rules in force
        (:func:`topd_jax.parallel.rules.using`); None is one device.
      length: tokens of the longest row that it will read, for models with
        "longrope"; 0: they take their short factors, and the student of a run
        those of the run.
      finish: (parameter, array) -> what the model holds instead; called as
        soon as each is placed, before the next one is read.

    Returns:
      (model, tokenizer): the tokenizer as its library reads it, of
      transformers or, for a run in the tiny world, of sentencepiece; None
      where the source has none. See
      :func:`topd_jax.data.tokenizers.wrap_tokenizer`.

    Raises:
      ValueError: for whatever is missing, broken or not supported, and for a
        tokenizer with an id that the model has no row for.
    """
    files = describe(
        source, length=length, dtype=dtype, param_dtype=param_dtype,
        remat=remat, unroll=unroll,
    )  # fmt: skip
    placement = Placement(Path(source).name, mesh, finish)
    model = files.read_decoder(files.config, placement)
    tokenizer = files.tokenizer
    rows, largest = files.config.vocab_size, _largest_id(tokenizer)
    if largest >= rows:
        raise ValueError(
            f"{source}: the tokenizer has ids up to {largest} and the model "
            f"{rows} rows; they do not belong together: take the tokenizer "
            "that came with the weights, or resize the model's embedding"
        )
    return model, tokenizer


@dataclasses.dataclass(frozen=True)
class Description:
    """A model, as its files describe it.

    Attributes:
      config: its shape.
      end_ids: ids at which generation stops, in the files' order.
        generation_config.json names them ("eos_token_id", one or several: the
        end of a turn beside the end of a text); config.json does where that
        file is missing, as in transformers. A GGUF file names both in its
        metadata, and a run none. The tokenizer's own end is not among them
        unless they say so.
      model_type: as config.json spells it; "" for other sources.
      config_end_ids: those that config.json names; generation ignores them
        where generation_config.json exists.
      longest: tokens that config.json is for; 0: nothing says it.
      read_tokenizer: the tokenizer, as :func:`load` returns it.
      read_decoder: (config, placement) -> the model.
    """

    config: DecoderConfig
    read_tokenizer: "Callable[[], Tokenizer | None]"
    read_decoder: Callable[[DecoderConfig, Placement], Decoder]
    end_ids: tuple[int, ...] = ()
    config_end_ids: tuple[int, ...] = ()
    model_type: str = ""
    longest: int = 0

    @functools.cached_property
    def tokenizer(self) -> "Tokenizer | None":
        """Return the tokenizer, read once."""
        rows = self.config.vocab_size
        return without_further_ids(self.read_tokenizer(), rows)


def describe(
    source: str | os.PathLike,
    *,
    length: int = 0,
    **options: Any,
) -> Description:
    """Describe a model without reading its weights.

    Args:
      source: as in :func:`load`.
      length: as there.
      **options: dtype, param_dtype, remat and unroll, as there.

    Returns:
      The description.

    Raises:
      ValueError: for whatever is missing, broken or not supported.
    """
    name, of = str(source), functools.partial
    if _is_gguf(name):
        packaged = name.startswith(_PACKAGE)
        file = open_gguf(
            packaged_gguf(name.removeprefix(_PACKAGE))
            if packaged
            else buckets.copied(buckets.as_path(name))
        )
        described = Description(
            gguf_config(file),
            of(gguf_tokenizer, file),
            of(gguf_decoder, file),
            _ids(file.metadata, _GGUF_ENDS, name),
        )
    elif is_run(source):
        described = Description(
            run_config(source),
            of(_run_tokenizer, tokenizer_directory(source)),
            of(run_decoder, source),
        )
    else:
        directory = resolve(source)
        path = directory / "config.json"
        generation = directory / "generation_config.json"
        whole = read_json(path)
        fields = text_fields(whole, str(path))
        ends = ("eos_token_id",)
        config_ends = _ids(fields, ends, str(path))
        described = Description(
            decoder_config(fields, where=str(path)),
            of(load_tokenizer, directory),
            of(hub_decoder, family_of(fields["model_type"], name), directory),
            _ids(read_json(generation), ends, str(generation))
            if require_regular(generation)
            else config_ends,
            config_ends,
            str(whole["model_type"]),
            fields.get("max_position_embeddings") or 0,
        )
    config = described.config.replace(**options).for_rows(length)
    return dataclasses.replace(described, config=config)


def _is_gguf(source: str) -> bool:
    return source.startswith(_PACKAGE) or source.endswith(".gguf")


def _largest_id(tokenizer: "Tokenizer | None") -> int:
    """Return a tokenizer's largest id; -1 for none. Ids may have gaps."""
    if hasattr(tokenizer, "get_vocab"):
        return max(tokenizer.get_vocab().values(), default=-1)
    return -1 if tokenizer is None else len(tokenizer) - 1


def _run_tokenizer(directory: Path) -> "Tokenizer | None":
    """Read what a run's tokenizer saved of itself."""
    directory = buckets.copied(directory)
    path = directory / _SENTENCEPIECE
    if path.exists() and not (directory / "tokenizer_config.json").exists():
        from sentencepiece import SentencePieceProcessor

        return SentencePieceProcessor(model_file=str(path))
    return load_tokenizer(directory)


def _ids(
    fields: Mapping, names: tuple[str, ...], where: str
) -> tuple[int, ...]:
    ids: list[int] = []
    for name in names:
        value = fields.get(name)
        given = value if isinstance(value, list) else [value]
        for i in (i for i in given if i is not None):
            if not isinstance(i, int | np.integer) or not 0 <= i <= _LARGEST_ID:
                raise ValueError(
                    f"{where}: {name}={value!r} must be a token's id, or a "
                    "list of them; correct the file"
                )
            ids.append(int(i))
    return tuple(dict.fromkeys(ids))


def _qwen3(
    layers: int, width: int, heads: int, mlp_width: int, **fields: Any
) -> dict[str, Any]:
    return {
        "model_type": "qwen3",
        "vocab_size": 151936,
        "num_hidden_layers": layers,
        "hidden_size": width,
        "num_attention_heads": heads,
        "num_key_value_heads": 8,
        "intermediate_size": mlp_width,
        "tie_word_embeddings": False,
        "rope_theta": 1_000_000,
    } | fields


# Hub name -> the fields of its published config.json that shape the network
# and differ from its family's defaults.
PUBLISHED: dict[str, dict[str, Any]] = {
    "Qwen/Qwen3-1.7B": _qwen3(28, 2048, 16, 6144, tie_word_embeddings=True),
    "Qwen/Qwen3-8B": _qwen3(36, 4096, 32, 12288),
    "Qwen/Qwen3-4B-Instruct-2507": _qwen3(
        36, 2560, 32, 9728, tie_word_embeddings=True, rope_theta=5_000_000
    ),
    "Qwen/Qwen3-30B-A3B-Instruct-2507": _qwen3(
        48, 2048, 32, 6144,
        model_type="qwen3_moe", rope_theta=10_000_000, num_key_value_heads=4,
        moe_intermediate_size=768, num_experts=128, num_experts_per_tok=8,
        head_dim=128, norm_topk_prob=True,
    ),
}  # fmt: skip


def shape_of(source: str, **options: Any) -> DecoderConfig:
    """Return a model's shape without its weights.

    A plan, and a compilation ahead of time, need no more.

    Args:
      source: what :func:`load` takes; of a hub name the local cache is read,
        or :data:`PUBLISHED`, or config.json alone is downloaded.
      **options: dtype, param_dtype, remat, unroll; see
        :class:`~topd_jax.models.config.DecoderConfig`.

    Returns:
      The decoder's shape.

    Raises:
      ValueError: where neither a file nor the table tells it.
    """
    if _is_gguf(source) or is_run(source):
        return describe(source, **options).config
    file = _config_file(source)
    fields = PUBLISHED.get(source) if file is None else read_json(file)
    if fields is None:
        raise ValueError(
            f"no shape for {source!r}: it is no directory with a config.json, "
            "the hub did not give one, and it is not one of "
            f"{', '.join(PUBLISHED)}; give a directory that holds its "
            "config.json, weights are not needed"
        )
    return decoder_config(fields, where=str(file or source)).replace(**options)


def _config_file(source: str) -> Path | None:
    path = buckets.as_path(source) / "config.json"
    if path.is_file():
        return path
    if path.parent.exists() or source.count("/") != 1:
        return None
    import huggingface_hub  # slow to import, and needed here only

    cached = huggingface_hub.try_to_load_from_cache(source, "config.json")
    if isinstance(cached, str):
        return Path(cached)
    if source in PUBLISHED:
        return None
    try:  # a run's mesh follows from shapes, before its models are loaded
        return Path(huggingface_hub.hf_hub_download(source, "config.json"))
    except Exception:  # the client raises a dozen unrelated types
        return None

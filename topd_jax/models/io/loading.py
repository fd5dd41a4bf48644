"""One door to every model: a directory, a hub name, a file, a package."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from jax.sharding import Mesh

from topd_jax.data.tokenizers import SentencePieceTokenizer
from topd_jax.models.decoder import Decoder
from topd_jax.models.io.gguf import load_gguf, open_gguf, packaged_gguf
from topd_jax.models.io.gguf_tokenizer import gguf_tokenizer
from topd_jax.models.io.huggingface import load_model, load_tokenizer, resolve
from topd_jax.models.io.runs import is_run, load_run, tokenizer_directory
from topd_jax.models.io.streaming import Finish
from topd_jax.parallel.sharding import Rules

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PACKAGE = "package:"


def load(
    source: str | os.PathLike,
    *,
    dtype: str = "float32",
    param_dtype: str = "float32",
    remat: str = "none",
    unroll: int = 1,
    mesh: Mesh | None = None,
    rules: Rules | None = None,
    ignore: Sequence[str] = (),
    finish: Finish | None = None,
) -> tuple[Decoder, "PreTrainedTokenizerBase | SentencePieceTokenizer | None"]:
    """Loads a model and its tokenizer from wherever they are.

    Args:
      source: a Hugging Face directory, a hub name (``owner/name``), a path
        that ends in ``.gguf``, ``package:NAME[==VERSION]`` for the GGUF file
        inside an installed Python package, or the work directory of a run of
        ours (its student's latest checkpoint; ``WORKDIR/best`` for the best,
        ``WORKDIR/checkpoints/STEP`` for one).
      dtype: compute dtype, "float32" or "bfloat16".
      param_dtype: dtype in which parameters are kept.
      remat: see :class:`~topd_jax.models.config.DecoderConfig`.
      unroll: see the same.
      mesh: where to spread the parameters; None is one device.
      rules: logical axis -> mesh axis; None takes the default rules.
      ignore: unknown fields of a config.json to pass over.
      finish: (parameter, array) -> what the model holds instead; called as
        soon as each is placed, before the next one is read.

    Returns:
      (model, tokenizer); the tokenizer is None where a directory has none,
      and ours where it is that of a run in the tiny world.

    Raises:
      ValueError: for whatever is missing, broken or not supported, and for a
        tokenizer with more ids than the model has rows.
    """
    options = {
        "dtype": dtype,
        "param_dtype": param_dtype,
        "remat": remat,
        "unroll": unroll,
        "mesh": mesh,
        "rules": rules,
        "finish": finish,
    }
    name = str(source)
    if name.startswith(PACKAGE) or name.endswith(".gguf"):
        packaged = name.startswith(PACKAGE)
        path = packaged_gguf(name.removeprefix(PACKAGE)) if packaged else name
        file = open_gguf(path)
        model, tokenizer = load_gguf(file, **options), gguf_tokenizer(file)
    elif is_run(source):
        model = load_run(source, **options)
        tokenizer = run_tokenizer(tokenizer_directory(source))
    else:
        directory = resolve(source)
        model = load_model(
            directory, ignore=ignore, label=Path(name).name, **options
        )
        tokenizer = load_tokenizer(directory)
    if tokenizer is not None:
        ours = isinstance(tokenizer, SentencePieceTokenizer)
        size = tokenizer.vocab_size if ours else len(tokenizer)
        if size > model.config.vocab_size:
            raise ValueError(
                f"{source}: the tokenizer has {size} ids and the model "
                f"{model.config.vocab_size} rows; they do not belong together"
            )
    return model, tokenizer


def run_tokenizer(
    directory: Path,
) -> "PreTrainedTokenizerBase | SentencePieceTokenizer | None":
    """What ``save_pretrained`` of the run's tokenizer wrote."""
    ours = directory / SentencePieceTokenizer.FILE
    if ours.exists() and not (directory / "tokenizer_config.json").exists():
        return SentencePieceTokenizer.load(ours)
    return load_tokenizer(directory)

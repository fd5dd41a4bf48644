"""One door to every model: a directory, a hub name, a file, a package."""

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

from jax.sharding import Mesh

from topd_jax.models.decoder import Decoder
from topd_jax.models.gguf import load_gguf, open_gguf, packaged_gguf
from topd_jax.models.gguf_tokenizer import gguf_tokenizer
from topd_jax.models.huggingface import load_model, load_tokenizer, resolve
from topd_jax.sharding import Rules

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
) -> "tuple[Decoder, PreTrainedTokenizerBase | None]":
    """Loads a model and its tokenizer from wherever they are.

    Args:
      source: a Hugging Face directory, a hub name (``owner/name``), a path
        that ends in ``.gguf``, or ``package:NAME[==VERSION]`` for the GGUF
        file inside an installed Python package.
      dtype: compute dtype, "float32" or "bfloat16".
      param_dtype: dtype in which parameters are kept.
      remat: see :class:`~topd_jax.models.config.DecoderConfig`.
      unroll: see the same.
      mesh: where to spread the parameters; None is one device.
      rules: logical axis -> mesh axis; None takes the default rules.
      ignore: unknown fields of a config.json to pass over.

    Returns:
      (model, tokenizer); the tokenizer is None where a directory has none.

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
    }
    name = str(source)
    if name.startswith(PACKAGE) or name.endswith(".gguf"):
        packaged = name.startswith(PACKAGE)
        path = packaged_gguf(name.removeprefix(PACKAGE)) if packaged else name
        file = open_gguf(path)
        model, tokenizer = load_gguf(file, **options), gguf_tokenizer(file)
    else:
        directory = resolve(source)
        model = load_model(directory, ignore=ignore, **options)
        tokenizer = load_tokenizer(directory)
    if tokenizer is not None and len(tokenizer) > model.config.vocab_size:
        raise ValueError(
            f"{source}: the tokenizer has {len(tokenizer)} ids and the model "
            f"{model.config.vocab_size} rows; they do not belong together"
        )
    return model, tokenizer

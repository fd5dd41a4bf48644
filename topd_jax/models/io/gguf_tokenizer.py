"""The tokenizer that a GGUF file describes, without torch.

transformers reads a GGUF tokenizer only with torch installed, and drops the
file's ``tokenizer.ggml.pre``; here the byte-level BPE tokenizer is built from
the metadata with ``tokenizers``, split as the named pre-tokenizer splits
(``smollm``: digits one by one, then GPT-2's pattern). So is Gemma's, whose
files keep pieces without their merges.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
)

from topd_jax.models.io.gguf import GGUFFile

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_CONTROL, _USER_DEFINED = 3, 4
# How pieces spell a blank.
_BLANK = "\u2581"

# Patterns of llama.cpp's llama-vocab.cpp, written with \p classes.
_QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN35 = _QWEN2.replace(r"]?\p{L}+", r"]?[\p{L}\p{M}]+").replace(
    r"[^\s\p{L}\p{N}]", r"[^\s\p{L}\p{M}\p{N}]"
)
_LLAMA3 = _QWEN2.replace(r"|\p{N}|", r"|\p{N}{1,3}|")

_IDS = {
    "bos_token": "tokenizer.ggml.bos_token_id",
    "eos_token": "tokenizer.ggml.eos_token_id",
    "unk_token": "tokenizer.ggml.unknown_token_id",
    "pad_token": "tokenizer.ggml.padding_token_id",
}


def gguf_tokenizer(
    file: GGUFFile,
) -> "PreTrainedTokenizerFast":
    """Build the tokenizer of a GGUF file.

    Args:
      file: from :func:`~topd_jax.models.io.gguf.open_gguf`.

    Returns:
      The tokenizer, with special tokens, chat template and length limit; it
      pads on the left.

    Raises:
      ValueError: for a tokenizer that is neither byte-level BPE nor Gemma's,
        or a pre-tokenizer that is not known.
    """
    metadata = file.metadata
    where = str(file.path)
    kind = metadata.get("tokenizer.ggml.model")
    architecture = metadata.get("general.architecture")
    pieces = kind == "llama" and architecture == "gemma3"
    if kind != "gpt2" and not pieces:
        raise ValueError(
            f"{where}: tokenizer.ggml.model={kind!r} is not supported, only "
            "'gpt2' (byte-level BPE) and Gemma 3's 'llama'; load the tokenizer "
            "from the model's Hugging Face directory"
        )
    tokens = metadata["tokenizer.ggml.tokens"]
    special = {
        name: tokens[metadata[key]]
        for name, key in _IDS.items()
        if key in metadata
    }
    from transformers import PreTrainedTokenizerFast  # slow to import

    limit = metadata.get(f"{architecture}.context_length")
    # As llama.cpp does where files do not say: those of Llama 3 leave it out.
    begins = pieces or (
        metadata.get("tokenizer.ggml.pre") == "llama-bpe"
        and "bos_token" in special
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=_backend(metadata, where),
        **special,
        **({} if limit is None else {"model_max_length": limit}),
        add_bos_token=metadata.get("tokenizer.ggml.add_bos_token", begins),
        add_eos_token=metadata.get("tokenizer.ggml.add_eos_token", False),
        chat_template=metadata.get("tokenizer.chat_template"),
        clean_up_tokenization_spaces=False,
        padding_side="left",
    )


def _backend(metadata: Mapping[str, Any], where: str) -> Tokenizer:
    tokens = metadata["tokenizer.ggml.tokens"]
    # A model may have more rows than its tokenizer ids; the converter names
    # each of these so, and the tokenizer of the directory has none of them.
    vocabulary = {t: i for i, t in enumerate(tokens) if t != f"[PAD{i}]"}
    if metadata["tokenizer.ggml.model"] == "llama":
        backend = _of_pieces(vocabulary)
    else:
        backend = _of_bytes(vocabulary, metadata, where)
    kinds = metadata.get("tokenizer.ggml.token_type", ())
    known = backend.get_vocab()  # Gemma's blanks are spelled otherwise
    typed = [x for x in zip(tokens, kinds, strict=False) if x[0] in known]
    for wanted, add in (
        (_CONTROL, backend.add_special_tokens),
        (_USER_DEFINED, backend.add_tokens),
    ):
        special = wanted == _CONTROL
        add(
            [
                AddedToken(token, special=special, normalized=False)
                for token, kind in typed
                if kind == wanted
            ]
        )
    return backend


def _of_bytes(
    vocabulary: dict[str, int], metadata: Mapping[str, Any], where: str
) -> Tokenizer:
    """Build byte-level BPE."""
    merges = metadata["tokenizer.ggml.merges"]
    pre = metadata.get("tokenizer.ggml.pre", "default")
    backend = Tokenizer(
        models.BPE(
            vocab=vocabulary,
            merges=[tuple(merge.split(" ", 1)) for merge in merges],
            ignore_merges=pre == "llama-bpe",
        )
    )
    backend.pre_tokenizer = _pre_tokenizer(pre, where)
    if pre in ("qwen2", "qwen35"):
        backend.normalizer = normalizers.NFC()
    backend.decoder = decoders.ByteLevel()
    return backend


def _of_pieces(vocabulary: dict[str, int]) -> Tokenizer:
    """Build Gemma's BPE of characters, with bytes for unknown ones.

    Pieces are merged in the order of their ids; those of blanks alone are
    spelled with blanks in files.
    """
    pieces = {
        _BLANK * len(piece) if not piece.strip(" ") else piece: index
        for piece, index in vocabulary.items()
    }
    merges = [
        (piece[:cut], piece[cut:])
        for piece in pieces
        for cut in range(len(piece) - 1, 0, -1)
        if piece[:cut] in pieces and piece[cut:] in pieces
    ]
    backend = Tokenizer(
        models.BPE(
            vocab=pieces,
            merges=merges,
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    backend.normalizer = normalizers.Replace(" ", _BLANK)
    backend.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace(_BLANK, " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
        ]
    )
    return backend


def _pre_tokenizer(name: str, where: str) -> pre_tokenizers.PreTokenizer:
    gpt2 = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    if name in ("default", "gpt-2"):
        return gpt2
    if name == "smollm":
        digits = pre_tokenizers.Digits(individual_digits=True)
        return pre_tokenizers.Sequence([digits, gpt2])
    patterns = {"qwen2": _QWEN2, "qwen35": _QWEN35, "llama-bpe": _LLAMA3}
    if name not in patterns:
        raise ValueError(
            f"{where}: tokenizer.ggml.pre={name!r} is not supported; "
            "supported: default, gpt-2, smollm, "
            f"{', '.join(patterns)}; load the tokenizer from the model's "
            "Hugging Face directory"
        )
    split = pre_tokenizers.Split(Regex(patterns[name]), behavior="isolated")
    plain = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([split, plain])

"""Tokenizers behind one small protocol, and the checks they must pass (ours).

Two implementations: :class:`SentencePieceTokenizer`, trained on the tiny
world's own text, and :class:`HuggingFaceTokenizer` around any ``transformers``
tokenizer, read from a directory, a hub name, or handed in ready-made.
"""

import io
import json
import os
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

import sentencepiece

Messages = Sequence[Mapping[str, str]]


class Tokenizer(Protocol):
    """What this project asks of a tokenizer.

    Attributes:
      vocab_size: one more than the largest id.
      pad_id: id that fills batches; may equal an end-of-sequence id, so
        never look for it: masks say what exists.
      bos_id: id that a text begins with, or None.
      eos_ids: every id that ends a completion; the first is the one to
        append to training text.
    """

    vocab_size: int
    pad_id: int
    bos_id: int | None
    eos_ids: tuple[int, ...]

    def encode(self, text: str) -> list[int]:
        """The ids of a text, no special ids added."""

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids, special ids left out."""

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """The text each token contributes; joined, they are ``decode``."""

    def chat(self, question: str | Messages) -> list[int]:
        """The prompt that asks a question (or goes on with a dialogue)."""

    def vocabulary(self) -> list[str]:
        """The name of every id, "" where an id has none."""


class SentencePieceTokenizer:
    """A SentencePiece model with explicit pad, bos, eos and unk ids 0..3."""

    FILE = "tokenizer.model"
    # What :meth:`chat` does, for those who read a directory.
    _TEMPLATE = (
        "{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}"
    )

    def __init__(self, model: bytes) -> None:
        """Wraps a serialised model; see :meth:`train` and :meth:`load`."""
        self.model = model
        self._processor = sentencepiece.SentencePieceProcessor(
            model_proto=model
        )
        self.vocab_size: int = self._processor.vocab_size()
        self.pad_id: int = self._processor.pad_id()
        self.bos_id: int | None = self._processor.bos_id()
        self.eos_ids: tuple[int, ...] = (self._processor.eos_id(),)

    @classmethod
    def train(
        cls, texts: Iterable[str], vocab_size: int = 64
    ) -> "SentencePieceTokenizer":
        """Trains on texts, deterministically.

        Byte-pair merges within words; digits stay single and the space goes
        with the word before it, so that a number never shares a token with a
        phrase. Text comes back from ids exactly as it went in.

        Args:
          texts: the corpus; prompts and completions as texts of their own,
            or a token could straddle the two.
          vocab_size: ids, the four special ones included.

        Raises:
          ValueError: if the corpus is too small for ``vocab_size`` (or the
            other way round), with the trainer's own bound.
        """
        model = io.BytesIO()
        try:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=iter(texts),
                model_writer=model,
                vocab_size=vocab_size,
                model_type="bpe",
                character_coverage=1.0,
                split_digits=True,
                treat_whitespace_as_suffix=True,
                normalization_rule_name="identity",
                add_dummy_prefix=False,
                remove_extra_whitespaces=False,
                pad_id=0,
                bos_id=1,
                eos_id=2,
                unk_id=3,
                num_threads=1,
                minloglevel=2,
            )
        except RuntimeError as error:
            raise ValueError(
                f"no tokenizer of vocab_size={vocab_size} can be trained on "
                f"this corpus; choose another size ({error})"
            ) from error
        return cls(model.getvalue())

    @classmethod
    def load(cls, path: str | os.PathLike) -> "SentencePieceTokenizer":
        """Reads a model file; a missing one is a ValueError."""
        path = pathlib.Path(path)
        if not path.is_file():
            raise ValueError(
                f"no tokenizer at {path}; give the path of a SentencePiece "
                "model, or delete the cached world so that it is made again"
            )
        return cls(path.read_bytes())

    def save(self, path: str | os.PathLike) -> None:
        """Writes the model file; :meth:`load` reads it back."""
        pathlib.Path(path).write_bytes(self.model)

    def save_pretrained(self, directory: str | os.PathLike) -> None:
        """Writes the model file and the chat template into a directory."""
        directory = pathlib.Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        self.save(directory / self.FILE)
        (directory / "chat_template.jinja").write_text(self._TEMPLATE)

    def encode(self, text: str) -> list[int]:
        """The ids of a text, no special ids added."""
        return self._processor.encode(text)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of many texts: much faster than one by one."""
        return self._processor.encode(list(texts))

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids, special ids left out."""
        return "".join(self.pieces(ids))

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """The text each token contributes; special ids contribute none."""
        # Not the processor's decode: it strips spaces at the edges.
        return [self._text(int(i)) for i in ids]

    def _text(self, i: int) -> str:
        if self._processor.is_control(i):
            return ""
        if self._processor.is_unknown(i):
            return "\N{REPLACEMENT CHARACTER}"
        return self._processor.id_to_piece(i).replace("▁", " ")

    def chat(self, question: str | Messages) -> list[int]:
        """bos, then the question (or the messages' contents, joined)."""
        if not isinstance(question, str):
            question = "".join(m["content"] for m in question)
        return [self.bos_id, *self.encode(question)]

    def vocabulary(self) -> list[str]:
        """The name of every id."""
        return [self._processor.id_to_piece(i) for i in range(self.vocab_size)]


class HuggingFaceTokenizer:
    """Any ``transformers`` tokenizer, with its chat template.

    Code that comes with a tokenizer is never run (``trust_remote_code``).
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        eos_ids: Sequence[int] = (),
        chat_template: str | None = None,
        template_options: Mapping[str, Any] | None = None,
    ) -> None:
        """Wraps a ready ``PreTrainedTokenizerBase``.

        Args:
          tokenizer: the object, e.g. a ``PreTrainedTokenizerFast``.
          eos_ids: ids that end a completion, besides the tokenizer's own.
          chat_template: replaces the tokenizer's template.
          template_options: given to the template, e.g.
            ``{"enable_thinking": False}``.

        Raises:
          ValueError: if nothing says which id ends a completion.
        """
        self._tokenizer = tokenizer
        self._template = chat_template
        self._options = dict(template_options or {})
        ends = [*eos_ids, tokenizer.eos_token_id]
        self.eos_ids = tuple(dict.fromkeys(i for i in ends if i is not None))
        if not self.eos_ids:
            raise ValueError(
                "the tokenizer has no end-of-sequence id; pass eos_ids"
            )
        self.vocab_size: int = max(tokenizer.get_vocab().values()) + 1
        pad = tokenizer.pad_token_id
        self.pad_id: int = self.eos_ids[0] if pad is None else pad
        self.bos_id: int | None = tokenizer.bos_token_id

    @classmethod
    def load(
        cls, source: str | os.PathLike, **options: Any
    ) -> "HuggingFaceTokenizer":
        """Reads a tokenizer from a directory or, by name, from the hub.

        ``generation_config.json``, where there is one beside it, adds its
        end-of-sequence ids.

        Args:
          source: directory, or a name ``owner/model``.
          **options: of the constructor.

        Raises:
          ValueError: if there is no tokenizer there.
        """
        # Here, not above: transformers takes a second to import.
        from transformers import AutoTokenizer

        try:
            tokenizer = AutoTokenizer.from_pretrained(
                source, trust_remote_code=False
            )
        except (OSError, ValueError) as error:
            raise ValueError(
                f"no tokenizer at {source!s}: give a directory that holds "
                "tokenizer.json, or the name of a model on the hub "
                f"({str(error).splitlines()[0]})"
            ) from error
        found = _generation_eos_ids(pathlib.Path(source))
        options["eos_ids"] = (*options.get("eos_ids", ()), *found)
        return cls(tokenizer, **options)

    def encode(self, text: str) -> list[int]:
        """The ids of a text, no special ids added."""
        return self._tokenizer.encode(text, add_special_tokens=False)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids, special ids left out."""
        return self._tokenizer.decode(
            [int(i) for i in ids],
            skip_special_tokens=True,
            clean_up_tokenization_spaces=False,
        )

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """The text each token contributes; joined, they are ``decode``.

        A token that ends inside a character contributes nothing: the one
        that completes the character has it all.
        """
        pieces, begin, seen = [], 0, ""
        for end in range(1, len(ids) + 1):
            text = self.decode(ids[begin:end])
            if text.endswith("\N{REPLACEMENT CHARACTER}") and end < len(ids):
                pieces.append("")
                continue
            pieces.append(text[len(seen) :])
            # Decoding goes on from the previous token, not from the start,
            # and not from this one: the first of a text may lose its space.
            begin = end - 1 if pieces[-1] else begin
            seen = self.decode(ids[begin:end])
        return pieces

    def chat(self, question: str | Messages) -> list[int]:
        """The chat template's prompt for a question or a dialogue.

        Raises:
          ValueError: if there is no chat template.
        """
        return self.render(question)

    def render(
        self, question: str | Messages, *, ask: bool = True, **options: Any
    ) -> list[int]:
        """What the chat template makes of a question or a dialogue.

        Args:
          question: the user's, or all messages.
          ask: open the assistant's turn.
          **options: for the template, over those of the constructor.

        Raises:
          ValueError: if there is no chat template.
        """
        if isinstance(question, str):
            question = [{"role": "user", "content": question}]
        template = self._template or self._tokenizer.chat_template
        if template is None:
            raise ValueError(
                "the tokenizer has no chat template; pass chat_template"
            )
        return self._tokenizer.apply_chat_template(
            list(question),
            chat_template=template,
            tokenize=True,
            add_generation_prompt=ask,
            return_dict=False,
            **self._options | options,
        )

    @property
    def special_ids(self) -> frozenset[int]:
        """Ids that stand for no text: ends, turns, padding."""
        added = self._tokenizer.added_tokens_decoder
        special = [i for i, token in added.items() if token.special]
        return frozenset([*special, *self._tokenizer.all_special_ids])

    @property
    def begins_texts(self) -> bool:
        """Whether a text, no template around it, begins with bos."""
        ids = self._tokenizer("a")["input_ids"]
        return self.bos_id is not None and ids[:1] == [self.bos_id]

    def vocabulary(self) -> list[str]:
        """The name of every id, "" where an id has none."""
        names = [""] * self.vocab_size
        for name, i in self._tokenizer.get_vocab().items():
            names[i] = name
        return names


def _generation_eos_ids(directory: pathlib.Path) -> tuple[int, ...]:
    path = directory / "generation_config.json"
    if not path.is_file():
        return ()
    ids = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id")
    if ids is None:
        return ()
    return tuple(ids) if isinstance(ids, list) else (ids,)

"""Tokenizers behind one small protocol.

Two implementations: :class:`SentencePieceTokenizer`, trained on the text of
the tiny world, and :class:`HuggingFaceTokenizer` around any ``transformers``
tokenizer.
"""

import copy
import datetime
import io
import os
import pathlib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

import sentencepiece

Messages = Sequence[Mapping[str, str]]
# A character for private use: no template and no vocabulary has it.
_MARK = "\ue000"
# What templates are told is today (Llama's own default): with the real day a
# run that resumes, or another process, would have other prompts.
_TODAY = datetime.datetime(2024, 7, 26)
_DAY = re.compile(r"""strftime_now\((?:\s*format\s*=)?\s*(["'])(.*?)\1\s*\)""")


class Tokenizer(Protocol):
    """What the project needs of a tokenizer.

    Attributes:
      vocab_size: one more than the largest id.
      pad_id: id of padding; may equal an end-of-sequence id, so never search
        for it: use masks.
      bos_id: id that a text begins with, or None.
      eos_ids: every id that ends a completion; the first is appended to
        training text.
    """

    vocab_size: int
    pad_id: int
    bos_id: int | None
    eos_ids: tuple[int, ...]

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text, without special ids."""

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ids, without special ids."""

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """Return the text of each token; joined, they are ``decode``."""

    def chat(self, question: str | Messages) -> list[int]:
        """Return the prompt of a question, or of a dialogue to continue."""

    def vocabulary(self) -> list[str]:
        """Return the name of every id, "" where it has none."""

    def save_pretrained(self, directory: str | os.PathLike) -> None:
        """Write its files into a directory."""


class SentencePieceTokenizer:
    """A SentencePiece model with explicit pad, bos, eos and unk ids 0..3."""

    # What :meth:`chat` does, for readers of a saved directory.
    _TEMPLATE = (
        "{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}"
    )

    def __init__(self, model: bytes) -> None:
        """Wrap a serialized model; see :meth:`train`."""
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
        """Train on texts, deterministically.

        Merges byte pairs within words. Digits stay single, and a space goes
        with the word before it, so a number never shares a token with a
        phrase. Decoding gives back every text exactly.

        Args:
          texts: the corpus; prompts and completions as separate texts, or a
            token could span both.
          vocab_size: ids, the four special ones included.

        Raises:
          ValueError: for a ``vocab_size`` that does not suit the corpus, with
            the trainer's bound.
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

    def save_pretrained(self, directory: str | os.PathLike) -> None:
        """Write the model file and the chat template into a directory."""
        directory = pathlib.Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "tokenizer.model").write_bytes(self.model)
        (directory / "chat_template.jinja").write_text(self._TEMPLATE)

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text, without special ids."""
        return self._processor.encode(text)

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ids, without special ids."""
        return "".join(self.pieces(ids))

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """Return the text of each token; special ids have none."""
        # The processor's decode strips spaces at the edges.
        return [self._text(int(i)) for i in ids]

    def _text(self, i: int) -> str:
        if self._processor.is_control(i):
            return ""
        if self._processor.is_unknown(i):
            return "\N{REPLACEMENT CHARACTER}"
        return self._processor.id_to_piece(i).replace("▁", " ")

    def chat(self, question: str | Messages) -> list[int]:
        """Return bos and the question, or the joined messages."""
        if not isinstance(question, str):
            question = "".join(m["content"] for m in question)
        return [self.bos_id, *self.encode(question)]

    def vocabulary(self) -> list[str]:
        """Return the name of every id."""
        return [self._processor.id_to_piece(i) for i in range(self.vocab_size)]


class HuggingFaceTokenizer:
    """A ``transformers`` tokenizer with its chat template.

    Code that comes with a tokenizer is never run (``trust_remote_code``). A
    special token, or a mark of the template's turns, that a message spells out
    stays text: it ends no turn and opens none.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        eos_ids: Sequence[int] = (),
        template_options: Mapping[str, Any] | None = None,
    ) -> None:
        """Wrap a ``PreTrainedTokenizerBase``.

        Args:
          tokenizer: the object, e.g. a ``PreTrainedTokenizerFast``.
          eos_ids: ids that end a completion, besides the tokenizer's own.
          template_options: given to the template, e.g.
            ``{"enable_thinking": False}``.

        Raises:
          ValueError: if no id is known to end a completion.
        """
        self._tokenizer = tokenizer
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
        self._reader, self._reserved = self._reserve()

    def _reserve(self) -> tuple[Any, list[str]]:
        """Return what reads messages, and the tokens that it takes for text.

        Some templates mark turns by added tokens that are not special (those
        of the models distilled from DeepSeek-R1). What a template may write
        within a turn, such as <think>, a message may write too.
        """
        roles = ("user", "assistant", "user")
        turns = [{"role": role, "content": _MARK} for role in roles]
        try:
            whole = self._apply(turns, ask=False, tokenize=False)
        except ValueError:  # told where a prompt needs the template
            whole = ""
        added = self._tokenizer.added_tokens_decoder.values()
        special = [token.content for token in added if token.special]
        marks = [
            token.content
            for token in added
            if not token.special and token.content in whole
        ]
        reader = self._tokenizer
        if marks:
            reader = copy.deepcopy(reader)
            reader.add_tokens(marks, special_tokens=True)
        return reader, special + marks

    @property
    def wrapped(self) -> Any:
        """The object of ``transformers``."""
        return self._tokenizer

    def save_pretrained(self, directory: str | os.PathLike) -> None:
        """Write the tokenizer's files into a directory."""
        self._tokenizer.save_pretrained(str(directory))

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text, without special ids."""
        return self._tokenizer.encode(text, add_special_tokens=False)

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ids, without special ids."""
        return self._tokenizer.decode(
            [int(i) for i in ids],
            skip_special_tokens=True,
            clean_up_tokenization_spaces=False,
        )

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """Return the text of each token; joined, they are ``decode``.

        A token that ends inside a character has none: the token that completes
        the character has all of it.
        """
        pieces, begin, before = [], 0, ""
        for end in range(1, len(ids) + 1):
            text = self.decode(ids[begin:end])
            if text.endswith("\N{REPLACEMENT CHARACTER}") and end < len(ids):
                pieces.append("")
                continue
            pieces.append(text[len(before) :])
            # Decode from the previous token on: from the start takes quadratic
            # time, and the first token of a text may lose its space.
            begin = end - 1 if pieces[-1] else begin
            before = self.decode(ids[begin:end])
        return pieces

    def chat(self, question: str | Messages, *, ask: bool = True) -> list[int]:
        """Apply the chat template to a question or a dialogue.

        Args:
          question: the user's, or all messages.
          ask: open the assistant's turn.

        Raises:
          ValueError: if there is no chat template, or it fails.
        """
        if isinstance(question, str):
            question = [{"role": "user", "content": question}]
        texts = [message["content"] for message in question]
        if not any(name in text for text in texts for name in self._reserved):
            return self._apply(question, ask, tokenize=True)
        # The template gets marks in the place of the texts, which are then
        # tokenized apart: only what the template writes becomes special ids.
        marked = [
            {**message, "content": f"{_MARK}{i}{_MARK}"}
            for i, message in enumerate(question)
        ]
        whole = self._apply(marked, ask, tokenize=False)
        ids = []
        for i, part in enumerate(re.split(f"{_MARK}([0-9]+){_MARK}", whole)):
            if i % 2:
                ids += self._reader.encode(
                    texts[int(part)],
                    add_special_tokens=False,
                    split_special_tokens=True,
                )
            else:
                ids += self.encode(part)
        return ids

    def _apply(self, messages: Messages, ask: bool, *, tokenize: bool) -> Any:
        if self._tokenizer.chat_template is None:
            raise ValueError(
                "the tokenizer has no chat template; put chat_template.jinja "
                "beside its files"
            )
        try:
            return self._tokenizer.apply_chat_template(
                list(messages),
                chat_template=_DAY.sub(
                    lambda day: repr(_TODAY.strftime(day[2])),
                    self._tokenizer.get_chat_template(),
                ),
                tokenize=tokenize,
                add_generation_prompt=ask,
                return_dict=False,
                **self._options,
            )
        except Exception as error:  # templates raise whatever they like
            raise ValueError(
                f"the tokenizer's chat template fails: "
                f"{type(error).__name__}: {error}; correct chat_template.jinja"
            ) from error

    @property
    def special_ids(self) -> frozenset[int]:
        """Ids without text: ends, turns, padding."""
        added = self._tokenizer.added_tokens_decoder
        special = [i for i, token in added.items() if token.special]
        return frozenset([*special, *self._tokenizer.all_special_ids])

    @property
    def begins_texts(self) -> bool:
        """Whether a text without a template begins with bos."""
        ids = self._tokenizer("a")["input_ids"]
        return self.bos_id is not None and ids[:1] == [self.bos_id]

    def vocabulary(self) -> list[str]:
        """Return the name of every id, "" where it has none."""
        names = [""] * self.vocab_size
        for name, i in self._tokenizer.get_vocab().items():
            names[i] = name
        return names


def wrap_tokenizer(
    tokenizer: Any, **options: Any
) -> SentencePieceTokenizer | HuggingFaceTokenizer:
    """Wrap the tokenizer that :func:`topd_jax.models.load` returns.

    Args:
      tokenizer: of transformers or of sentencepiece.
      **options: of :class:`HuggingFaceTokenizer`, for one of transformers.
    """
    if isinstance(tokenizer, sentencepiece.SentencePieceProcessor):
        return SentencePieceTokenizer(tokenizer.serialized_model_proto())
    return HuggingFaceTokenizer(tokenizer, **options)

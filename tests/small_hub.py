"""Hugging Face directories of tiny models, to be doctored by tests."""

import dataclasses
import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from small_files import LLAMA, make
from small_run import settings_with
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from topd_jax.models import Decoder, save_model
from topd_jax.training.config import Settings

START, END, STOP = "<|im_start|>", "<|im_end|>", "<|endoftext|>"
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
IDS = 259
CONFIG = dataclasses.replace(
    LLAMA, vocab_size=IDS, layers=1, width=64, tied=False
)


def small_tokenizer(
    template: str | None = TEMPLATE,
    swapped: tuple[str, str] | None = None,
    eos: str = END,
) -> PreTrainedTokenizerFast:
    """Bytes and three special tokens; ``swapped`` pieces change places."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {t: i for i, t in enumerate([START, END, STOP, *letters])}
    if swapped:
        a, b = swapped
        vocabulary[a], vocabulary[b] = vocabulary[b], vocabulary[a]
    raw = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(
        add_prefix_space=False, use_regex=False
    )
    raw.decoder = decoders.ByteLevel()
    raw.add_special_tokens([START, END, STOP])
    return PreTrainedTokenizerFast(
        tokenizer_object=raw, eos_token=eos, chat_template=template
    )


def copier(
    certainty: float, rows: int = IDS, shuffled: bool = False
) -> Decoder:
    """A model that expects every token again: it knows "aaaa" by heart.

    Args:
      certainty: the logit of the token itself; others have about 0.
      rows: of the vocabulary.
      shuffled: the output's rows are those of other tokens.
    """
    config = dataclasses.replace(CONFIG, vocab_size=rows)
    arrays = dict(make(config).arrays)
    for name in ("o", "down"):  # the layer adds nothing
        arrays[name] = jnp.zeros_like(arrays[name])
    rng = np.random.default_rng(0)
    embedding = rng.choice([-1.0, 1.0], (rows, config.width))
    output = embedding * certainty / config.width
    if shuffled:
        output = np.roll(output, 7, axis=0)
    arrays["final_norm"] = jnp.ones_like(arrays["final_norm"])
    arrays["embedding"] = jnp.asarray(embedding, jnp.float32)
    arrays["output"] = jnp.asarray(output, jnp.float32)
    return Decoder(config, arrays)


def hub_directory(
    path: Path,
    *,
    model: Decoder | None = None,
    ends: list[int] | int | None = None,
    **tokenizer: object,
) -> str:
    """Writes a model with its tokenizer.

    Args:
      path: of the new directory.
      model: None takes a :func:`copier`.
      ends: "eos_token_id" of generation_config.json; None writes no file.
      **tokenizer: of :func:`small_tokenizer`.

    Returns:
      The path.
    """
    made = small_tokenizer(**tokenizer)
    save_model(model or copier(8.0), path, tokenizer=made)
    file = path / "generation_config.json"
    file.unlink(missing_ok=True)
    if ends is not None:
        file.write_text(json.dumps({"eos_token_id": ends}))
    return str(path)


def questions(path: Path, count: int = 12) -> str:
    """A JSONL file of questions with answers."""
    rows = [
        {"question": f"{i} " + "a" * 60, "answer": "a" * 9}
        for i in range(count)
    ]
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return str(path)


def settings(
    folder: Path, student: str, teacher: str, **changes: object
) -> Settings:
    """The small settings with these two models and twelve questions."""
    return settings_with(
        student__source=student,
        teacher__source=teacher,
        data__source="jsonl",
        data__path=questions(folder / "questions.jsonl"),
        **{"data__held_out": 3, "data__max_prompt_length": 120} | changes,
    )

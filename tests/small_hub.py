"""Hugging Face directories of tiny random models, to be doctored by tests."""

import dataclasses
import json
from pathlib import Path

from small_files import LLAMA, make
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from topd_jax.models import DecoderConfig, save_model

START, END, STOP = "<|im_start|>", "<|im_end|>", "<|endoftext|>"
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
THINKING = TEMPLATE.replace(
    "assistant\n{% endif %}",
    "assistant\n{% if enable_thinking is defined and enable_thinking is false "
    "%}<think></think>{% endif %}{% endif %}",
)
IDS = 259
CONFIG = dataclasses.replace(LLAMA, vocab_size=IDS, layers=2, width=16)


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


def hub_directory(
    path: Path,
    *,
    config: DecoderConfig = CONFIG,
    seed: int = 0,
    ends: list[int] | int | None = None,
    **tokenizer: object,
) -> str:
    """Writes a model with its tokenizer.

    Args:
      path: of the new directory.
      config: of the model.
      seed: of its weights.
      ends: "eos_token_id" of generation_config.json; None writes no file.
      **tokenizer: of :func:`small_tokenizer`.

    Returns:
      The path.
    """
    made = small_tokenizer(**tokenizer)
    save_model(make(config, seed), path, tokenizer=made)
    file = path / "generation_config.json"
    file.unlink(missing_ok=True)
    if ends is not None:
        file.write_text(json.dumps({"eos_token_id": ends}))
    return str(path)


def questions(path: Path, count: int = 12) -> str:
    """A JSONL file of questions with answers."""
    rows = [
        {"question": f"what is {i}?", "answer": f"#### {i}"}
        for i in range(count)
    ]
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return str(path)

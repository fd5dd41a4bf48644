"""The tiny world's teacher and student, trained from scratch and cached.

Ours. The teacher learns correct solutions in its style; the student, smaller,
learns another style with the errors of its habit
(:mod:`topd_jax.data.toy_world.problems`).
Both are kept as Hugging Face directories beside the tokenizer; what they were
made from is in their names, so that other settings never meet them.
"""

import dataclasses
import hashlib
import json
import pathlib

import jax
import numpy as np
from absl import logging

from topd_jax.data.tokenizers import SentencePieceTokenizer
from topd_jax.data.toy_world import corpus, problems
from topd_jax.data.toy_world.pretraining import fit
from topd_jax.models import (
    Decoder,
    DecoderConfig,
    init_decoder,
    save_model,
)
from topd_jax.parallel import hosts
from topd_jax.training.config import WorldSettings


def world_models(
    settings: WorldSettings, cache: pathlib.Path
) -> tuple[pathlib.Path, pathlib.Path, SentencePieceTokenizer]:
    """Finds the world's models in the cache, or trains them.

    Args:
      settings: sizes, steps and habits.
      cache: directory they are kept in.

    Returns:
      (teacher's directory, student's directory, tokenizer).
    """
    cache.mkdir(parents=True, exist_ok=True)
    makers = {"teacher": teacher_config, "student": student_config}
    paths = {
        name: cache / f"{name}-{_name_of(settings, name)}" for name in makers
    }
    file = cache / f"tokenizer-{_name_of(settings, 'tokenizer')}.model"
    missing = [name for name in makers if not paths[name].exists()]
    if not hosts.is_first():
        hosts.wait_for([*paths.values(), file])
    elif missing or not file.exists():
        logging.info("the tiny world is made in %s", cache)
        pairs = _corpora(settings)
        tokenizer = corpus.train_tokenizer(
            *pairs.values(), vocab_size=settings.vocab_size
        )
        fresh = file.with_suffix(".new")
        tokenizer.save(fresh)
        fresh.replace(file)  # whole, or not at all
        for name in missing:
            model = _train(settings, name, makers[name], pairs, tokenizer)
            save_model(model, paths[name], model_type="llama")
    return (
        paths["teacher"],
        paths["student"],
        SentencePieceTokenizer.load(file),
    )


def _name_of(settings: WorldSettings, part: str) -> str:
    """Eight hex digits of what a part is made from: settings and code."""
    fields = dataclasses.asdict(settings)
    for name in ("cache", "prompts"):
        fields.pop(name)
    other = {"teacher": "student_", "student": "teacher_"}.get(part)
    kept = {
        key: value
        for key, value in fields.items()
        # The corpora of both make the tokenizer, and so enter all names.
        if other is None
        or not key.startswith(other)
        or key in ("student_left_to_right", "student_drops_carry")
    }
    # A sample of both corpora stands for the code that writes them.
    text = json.dumps([part, kept, _sample(settings)], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def _sample(settings: WorldSettings) -> dict[str, list[tuple[str, str]]]:
    """The beginning of what :func:`_corpora` gives."""
    return _corpora(dataclasses.replace(settings, solutions=50))


def _corpora(settings: WorldSettings) -> dict[str, list[tuple[str, str]]]:
    habit = problems.Habit(
        left_to_right=settings.student_left_to_right,
        drop_carry=settings.student_drops_carry,
    )
    sample = problems.problems("train", settings.solutions, settings.seed)
    return {
        "teacher": corpus.world_pairs(
            sample, problems.TEACHER_STYLE, seed=settings.seed
        ),
        "student": corpus.world_pairs(
            sample, problems.STUDENT_STYLE, habit, seed=settings.seed + 1
        ),
    }


def teacher_config(settings: WorldSettings) -> DecoderConfig:
    """The shape of the world's teacher."""
    return _config(
        settings.teacher_layers,
        settings.teacher_width,
        settings.teacher_heads,
        settings.vocab_size,
    )


def student_config(settings: WorldSettings) -> DecoderConfig:
    """The shape of the world's student, the smaller one."""
    return _config(
        settings.student_layers,
        settings.student_width,
        settings.student_heads,
        settings.vocab_size,
    )


def _config(layers: int, width: int, heads: int, vocab: int) -> DecoderConfig:
    return DecoderConfig(
        vocab_size=vocab,
        layers=layers,
        width=width,
        heads=heads,
        kv_heads=heads,
        head_dim=width // heads,
        mlp_width=2 * width,
        # Small stacks are faster unrolled than scanned on a CPU.
        unroll=layers,
    )


def _train(
    settings: WorldSettings,
    name: str,
    config_of,
    pairs: dict[str, list[tuple[str, str]]],
    tokenizer: SentencePieceTokenizer,
) -> Decoder:
    groups = _by_length(corpus.encode_pairs(pairs[name], tokenizer))
    steps = {
        "teacher": settings.teacher_steps,
        "student": settings.student_steps,
    }[name]
    key = jax.random.fold_in(
        jax.random.key(settings.seed), ["teacher", "student"].index(name)
    )
    return fit(
        init_decoder(config_of(settings), key),
        lambda step: corpus.supervised_batch(
            groups[step % len(groups)],
            batch_size=settings.batch_size,
            seed=settings.seed,
            step=step // len(groups),
        ),
        steps=steps,
        learning_rate=settings.learning_rate,
        name=f"{name} from scratch",
    )


def _by_length(rows: corpus.Corpus, groups: int = 4) -> list[corpus.Corpus]:
    """Equal parts of like lengths: half of a mixed batch is padding."""
    order = np.argsort(rows.length, kind="stable")
    size = len(order) // groups
    parts = [order[i * size : (i + 1) * size] for i in range(groups)]
    return [
        corpus.Corpus(
            rows.tokens[part, : rows.length[part].max()],
            rows.prompt_length[part],
            rows.length[part],
            rows.pad_id,
        )
        for part in parts
    ]

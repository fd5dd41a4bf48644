"""The tiny world's teacher and student, trained from scratch and cached.

The teacher learns correct solutions in its style; the student, smaller, learns
another style with the errors of its habit
(:mod:`topd_jax.data.toy_world.problems`). Both are kept as Hugging Face
directories beside the tokenizer; their names hash what they were made from, so
that other settings make other files. Those of the default settings come with
the package, rounded to bfloat16; some ten minutes on two cores made them:

    python -m topd_jax.data.toy_world.models topd_jax/data/toy_world/trained

The paper has no such world.
"""

import dataclasses
import hashlib
import json
import pathlib
import sys
from collections.abc import Sequence

import jax
from absl import logging

from topd_jax.data.settings import WorldSettings
from topd_jax.data.tokenizers import SentencePieceTokenizer
from topd_jax.data.toy_world import problems
from topd_jax.data.toy_world.pretraining import encode_pairs, fit
from topd_jax.models import Decoder, DecoderConfig, init_decoder, save_model
from topd_jax.models.decoder import cast
from topd_jax.parallel import buckets, hosts, lock

# Models that come with the package.
TRAINED = pathlib.Path(__file__).parent / "trained"
# Part of the tiny world -> its PRNG stream.
_STREAMS = {"teacher": 0, "student": 1}
# Groups of rows of similar lengths that training takes in turn.
_GROUPS = 4


def world_models(
    settings: WorldSettings, cache: pathlib.Path
) -> tuple[pathlib.Path, pathlib.Path, SentencePieceTokenizer]:
    """Find the world's models in the package or the cache, or train them.

    Args:
      settings: sizes, steps and habits.
      cache: directory they are kept in.

    Returns:
      (teacher's directory, student's directory, tokenizer).
    """
    teacher, student, tokenizer = names = _names(settings)
    where = {
        name: TRAINED if _comes(settings, name) else cache for name in names
    }

    def complete() -> None:
        # The tokenizer may be another world's; these come last of a model.
        last = ("model.safetensors",) * 2 + ("",)
        if all(
            (where[name] / name / file).exists()
            for name, file in zip(names, last, strict=True)
        ):
            return
        with (
            lock.held(cache, wait=True),
            buckets.uploaded(cache, last=tokenizer) as folder,
        ):
            _make(settings, folder)

    if cache in where.values():
        where[tokenizer] = cache  # its last file: where it is, all others are
        hosts.from_first(complete)
    spm = SentencePieceTokenizer((where[tokenizer] / tokenizer).read_bytes())
    return where[teacher] / teacher, where[student] / student, spm


def comes_trained(settings: WorldSettings) -> bool:
    """Tell whether the package has the models that settings ask for."""
    return all(_comes(settings, name) for name in _names(settings))


def _comes(settings: WorldSettings, name: str) -> bool:
    return not settings.from_scratch and (TRAINED / name).exists()


def _make(
    settings: WorldSettings, cache: pathlib.Path, dtype: str = "float32"
) -> None:
    """Train what package and cache lack, and the tokenizer."""
    logging.info("training the models of the tiny world in %s", cache)
    cache.mkdir(parents=True, exist_ok=True)
    *models, name = _names(settings)
    tokenizer = train_tokenizer(
        *_corpora(_usual(settings)).values(), vocab_size=settings.vocab_size
    )
    partial = (cache / name).with_suffix(".new")
    partial.write_bytes(tokenizer.model)
    partial.replace(cache / name)  # atomic: the file is whole or absent
    corpora = _corpora(settings)
    for part, folder in zip(_STREAMS, models, strict=True):
        if not _comes(settings, folder) and not (cache / folder).exists():
            model = _train(settings, part, corpora[part], tokenizer)
            save_model(cast(model, dtype), cache / folder, model_type="llama")


def _usual(settings: WorldSettings) -> WorldSettings:
    """Return the same world with the usual student.

    The tokenizer is trained on its corpus, whatever the student's is: worlds
    that differ in the student alone have one teacher.
    """
    usual = dataclasses.asdict(WorldSettings())
    student = {k: v for k, v in usual.items() if k.startswith("student_")}
    return dataclasses.replace(settings, **student)


def train_tokenizer(
    *corpora: Sequence[tuple[str, str]],
    vocab_size: int = 64,
    samples: int = 5000,
) -> SentencePieceTokenizer:
    """Train a tokenizer of the tiny world, the same for the same corpora.

    Args:
      *corpora: pairs in each style that models will meet.
      vocab_size: ids of the tokenizer.
      samples: pairs of each corpus that it is trained on.
    """
    texts = [text for c in corpora for pair in c[:samples] for text in pair]
    return SentencePieceTokenizer.train(texts, vocab_size)


def world_config(settings: WorldSettings, name: str) -> DecoderConfig:
    """Return the shape of a model of the world.

    Args:
      settings: its layers, width and heads.
      name: "teacher", or "student", the smaller one.
    """
    s = settings
    layers, width, heads = {
        "teacher": (s.teacher_layers, s.teacher_width, s.teacher_heads),
        "student": (s.student_layers, s.student_width, s.student_heads),
    }[name]
    return DecoderConfig(
        vocab_size=s.vocab_size,
        layers=layers,
        width=width,
        heads=heads,
        kv_heads=heads,
        head_dim=width // heads,
        mlp_width=2 * width,
        # Small stacks are faster unrolled than scanned on a CPU.
        unroll=layers,
    )


def _names(settings: WorldSettings) -> list[str]:
    """Return the names of teacher, student and tokenizer."""
    return [
        *(f"{part}-{_hash_of(settings, part)}" for part in _STREAMS),
        f"tokenizer-{_hash_of(settings, 'tokenizer')}.model",
    ]


def _hash_of(settings: WorldSettings, part: str) -> str:
    """Return eight hex digits that change with what a part is made from."""
    if part != "student":
        settings = _usual(settings)
    # What makes no model, and what is of other parts.
    others = "cache", "prompts", "from_scratch"
    others += tuple(f"{other}_" for other in _STREAMS if other != part)
    kept = {
        key: value
        for key, value in dataclasses.asdict(settings).items()
        if not key.startswith(others)
    }
    # A sample of both corpora stands for the code that writes them.
    sample = _corpora(dataclasses.replace(settings, solutions=50))
    text = json.dumps([part, kept, sample], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def _corpora(settings: WorldSettings) -> dict[str, list[tuple[str, str]]]:
    """Return (problem, solution) pairs in the style of each model."""
    habit = problems.Habit(
        left_to_right=settings.student_left_to_right,
        drop_carry=settings.student_drops_carry,
    )
    sample = problems.problems("train", settings.solutions, settings.seed)
    return {
        "teacher": problems.world_pairs(
            sample, problems.TEACHER_STYLE, seed=settings.seed
        ),
        "student": problems.world_pairs(
            sample, problems.STUDENT_STYLE, habit, seed=settings.seed + 1
        ),
    }


def _train(
    settings: WorldSettings,
    name: str,
    pairs: Sequence[tuple[str, str]],
    tokenizer: SentencePieceTokenizer,
) -> Decoder:
    groups = encode_pairs(pairs, tokenizer).by_length(_GROUPS)
    steps = {
        "teacher": settings.teacher_steps,
        "student": settings.student_steps,
    }[name]
    key = jax.random.fold_in(jax.random.key(settings.seed), _STREAMS[name])
    model = fit(
        init_decoder(world_config(settings, name), key),
        lambda step: groups[step % _GROUPS].batch(
            step // _GROUPS,
            batch_size=settings.batch_size,
            seed=settings.seed,
        ),
        steps=steps,
        learning_rate=settings.learning_rate,
        name=f"{name} from scratch",
    )
    if name == "student":
        model = sharpened(model, settings.student_sharpness)
    return model


def sharpened(model: Decoder, factor: float) -> Decoder:
    """Return a model whose logits are ``factor`` times as large.

    Args:
      model: whose final states are normalized: their scale is the logits' own.
      factor: above 0; above 1 the model is surer of whatever it says.
    """
    arrays = model.arrays
    arrays["final_norm"] *= factor
    return Decoder(model.config, arrays)


def main(directory: str) -> None:
    """Train the models of the default settings, and round them to bfloat16.

    Args:
      directory: where they are written.
    """
    _make(WorldSettings(), pathlib.Path(directory), dtype="bfloat16")


if __name__ == "__main__":
    main(*sys.argv[1:])

"""Whether vocabularies agree: two tokenizers, or a tokenizer and a model."""

import hashlib
import json

from topd_jax.data.tokenizers import Tokenizer


def fingerprint(tokenizer: Tokenizer) -> str:
    """Sixteen hex digits that change with any id's name."""
    names = json.dumps(tokenizer.vocabulary()).encode()
    return hashlib.sha256(names).hexdigest()[:16]


def require_same_vocabulary(
    student_tokenizer: Tokenizer,
    teacher_tokenizer: Tokenizer,
    *,
    names: tuple[str, str] = ("student", "teacher"),
) -> None:
    """Refuses a teacher and a student whose ids mean different things.

    Args:
      student_tokenizer: of the one.
      teacher_tokenizer: of the other.
      names: what to call them in the error.

    Raises:
      ValueError: naming the first differing ids and what each side calls
        them.
    """
    student = student_tokenizer.vocabulary()
    teacher = teacher_tokenizer.vocabulary()
    differing = [
        f"{i}: {s!r} / {t!r}"
        for i, (s, t) in enumerate(zip(student, teacher, strict=False))
        if s != t
    ]
    if not differing and len(student) == len(teacher):
        return
    if differing:
        what = (
            f"{len(differing)} ids differ, first (id: {' / '.join(names)}) "
            + ", ".join(differing[:3])
        )
    else:
        shorter = min(len(student), len(teacher))
        longer = student if len(student) > len(teacher) else teacher
        what = f"only one has ids from {shorter}: {longer[shorter]!r} on"
    raise ValueError(
        f"{' and '.join(names)} have different vocabularies ({len(student)} "
        f"and {len(teacher)} ids): {what}. Their probabilities cannot be "
        "compared id by id; choose a pair that shares one tokenizer"
    )


def check_model(tokenizer: Tokenizer, model_vocab_size: int) -> None:
    """Refuses a tokenizer with ids that the model does not have.

    A larger model is fine: vocabularies are often padded.

    Raises:
      ValueError: with both sizes.
    """
    if tokenizer.vocab_size > model_vocab_size:
        raise ValueError(
            f"the tokenizer has {tokenizer.vocab_size} ids but the model's "
            f"vocab_size={model_vocab_size} is smaller: use the tokenizer "
            "that came with the model's weights, or resize the model's "
            "embedding"
        )

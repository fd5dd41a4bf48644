"""Check that vocabularies agree: of two tokenizers, or with a model."""

import hashlib
import json

from topd_jax.data.tokenizers import Tokenizer


def fingerprint(tokenizer: Tokenizer) -> str:
    """Return sixteen hex digits that change with any id's name."""
    names = json.dumps(tokenizer.vocabulary()).encode()
    return hashlib.sha256(names).hexdigest()[:16]


def require_same_vocabulary(
    student_tokenizer: Tokenizer,
    teacher_tokenizer: Tokenizer,
    *,
    names: tuple[str, str] = ("student", "teacher"),
) -> None:
    """Refuse a teacher and a student whose ids mean different things.

    Args:
      student_tokenizer: of the student.
      teacher_tokenizer: of the teacher.
      names: of both, for the error.

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
    """Refuse a tokenizer with ids that the model does not have.

    A larger model is fine: vocabularies are often padded.

    Args:
      tokenizer: of the model.
      model_vocab_size: rows of the model's head.

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

"""What the scores of one small batch say of a run (ours)."""

import math

import numpy as np

from topd_jax.cli.doctor.findings import Finding, error, ok, warning
from topd_jax.cli.doctor.scored import Scores
from topd_jax.training.config import Settings
from topd_jax.training.setup import Pair
from topd_jax.types import Trajectories

# Nats that a model may seem to differ from itself by, of its dtypes.
_ROUNDING = {"float32": 1e-3, "bfloat16": 0.1}
# Share of a uniform guess's nats: from here on text is noise to a model.
_NOISE = 0.9
# Nats a token below which there is nothing to learn.
_EQUAL = 1e-4
# Probability on padded rows that changes what a model says.
_PADDED = 1e-3
# Share of rows whose answer must end alike to call it a habit.
_MOST = 0.5


def judge(scores: Scores, settings: Settings, pair: Pair) -> list[Finding]:
    """Turns the scores into findings.

    Args:
      scores: from :func:`topd_jax.cli.doctor.scored.score`.
      settings: of the run.
      pair: of the run.

    Returns:
      The findings, in the order of the report.
    """
    return [
        *itself(scores, pair),
        *sampler(scores, pair),
        *masks(scores.written, pair.tokenizer.eos_ids),
        *batch(scores, pair),
        *padded(scores),
        *endings(scores, pair),
        *lengths(scores.written, settings),
    ]


def itself(scores: Scores, pair: Pair) -> list[Finding]:
    """Student == teacher must cost about nothing, in the run's dtypes."""
    name, found = "student == teacher", scores.itself
    bound = _bound(pair)
    text = f"loss {found:.2g} nats a token (at most {bound:g})"
    if math.isfinite(found) and abs(found) <= bound:
        return [ok(name, text)]
    return [
        error(
            name,
            f"the student scored against itself: {text}",
            "what a run learns would drown in this: use float32 "
            "(student.dtype, teacher.dtype), and look for broken weights",
        )
    ]


def sampler(scores: Scores, pair: Pair) -> list[Finding]:
    """What the sampler noted must be what reading the text again gives."""
    name, bound = "sampler", _bound(pair)
    text = (
        f"log-probabilities within {scores.sampler:.2g} nats of those of "
        f"reading again (at most {bound:g})"
    )
    if scores.sampler <= bound:
        return [ok(name, text)]
    return [
        warning(
            name,
            text,
            "rollouts come from another distribution than the loss sees: use "
            "student.dtype='float32'",
        )
    ]


def masks(written: Trajectories, eos_ids: tuple[int, ...]) -> list[Finding]:
    """First end in, everything after it out; cut off or ended, not both."""
    is_end = np.isin(written.tokens, eos_ids)
    before = np.cumsum(is_end, axis=1) - is_end
    ended = (is_end & written.mask).any(axis=1)
    right = (written.mask == (before == 0)).all()
    if right and (ended != written.truncated).all():
        return [ok("masks", "every completion stops at its first end")]
    return [
        error(
            "masks",
            "a completion's mask does not stop at its first end "
            f"{list(eos_ids)}",
            "this is a defect of the sampler: please report it",
        )
    ]


def batch(scores: Scores, pair: Pair) -> list[Finding]:
    """One real batch, written by the student and scored by the teacher."""
    name = "one batch"
    vocab = min(pair.student.head.shape[0], pair.teacher.head.shape[0])
    guess = math.log(vocab)
    text = (
        f"reverse KL {scores.reverse_kl:.3g}, teacher's NLL "
        f"{scores.teacher_nll:.3g} (prompts {scores.prompt_nll:.3g}; a uniform "
        f"guess {guess:.3g}) nats a token"
    )
    if not (math.isfinite(scores.reverse_kl + scores.teacher_nll)):
        return [
            error(
                name,
                f"not finite: {text}",
                "use float32 (student.dtype, teacher.dtype), and look for "
                "broken weights",
            )
        ]
    if scores.teacher_nll > _NOISE * guess:
        if scores.prompt_nll > _NOISE * guess:
            return [
                warning(
                    name,
                    f"prompts and completions are noise to the teacher: {text}",
                    "tokenizer, chat template and teacher hardly belong "
                    "together: compare the teacher's tokenizer files with "
                    "those that came with its weights",
                )
            ]
        return [
            warning(
                name,
                f"what the student writes is noise to the teacher, prompts are "
                f"not: {text}",
                "begin with the teacher's own texts "
                "(--config.objective.stage=offline), or with a better student",
            )
        ]
    if scores.reverse_kl < _EQUAL:
        return [
            warning(
                name,
                f"the student already says what the teacher says: {text}",
                "there is nothing to distil: is teacher.source the one that "
                "was meant?",
            )
        ]
    return [ok(name, text)]


def padded(scores: Scores) -> list[Finding]:
    """The teacher's probability on the rows that are dropped."""
    if scores.padded_mass <= _PADDED:
        return []
    return [
        warning(
            "vocabulary",
            f"the teacher puts {scores.padded_mass:.2%} of its probability on "
            "rows that the student has not",
            "the rest is renormalised, which changes the teacher: choose a "
            "student with as many rows",
        )
    ]


def endings(scores: Scores, pair: Pair) -> list[Finding]:
    """Which token both expect behind a whole answer: an end of the run?"""
    name, used = "ends in practice", pair.tokenizer.eos_ids
    special = getattr(pair.tokenizer, "special_ids", frozenset()) - set(used)
    for who, ids in scores.next_ids.items():
        other = [int(i) for i in ids if int(i) in special]
        if len(other) > _MOST * len(ids):
            likeliest = max(set(other), key=other.count)
            piece = pair.tokenizer.vocabulary()[likeliest]
            return [
                warning(
                    name,
                    f"behind a whole answer the {who} expects {likeliest} "
                    f"{piece!r}, at which this run does not stop",
                    f"--config.data.end_ids={likeliest}",
                )
            ]
    spelt = ", ".join(f"{who} {p:.2g}" for who, p in scores.ending.items())
    return [ok(name, f"probability of an end behind a whole answer: {spelt}")]


def lengths(written: Trajectories, settings: Settings) -> list[Finding]:
    """How many completions ended, where the batch was as long as the run's."""
    rows, columns = written.tokens.shape
    ended = int((~written.truncated).sum())
    text = f"{ended} of {rows} ended within {columns} tokens"
    if ended or columns < settings.rollout.max_new_tokens:
        return [ok("completions", text)]
    return [
        warning(
            "completions",
            f"{text}, the limit: no end was ever drawn",
            "raise rollout.max_new_tokens, or look at the ends above",
        )
    ]


def _bound(pair: Pair) -> float:
    kinds = [
        getattr(model.config, kind)
        for model in (pair.student, pair.teacher)
        for kind in ("dtype", "param_dtype")
    ]
    return max(_ROUNDING[kind] for kind in kinds)

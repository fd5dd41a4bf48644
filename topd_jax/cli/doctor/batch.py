"""Checks that run the models on one small batch.

The student writes a few tokens for real prompts and is scored against itself,
in the teacher's dtypes: what is not 0 there is rounding, and bounds what a run
can learn. Then each teacher scores what was written, and reads the prompts.
"""

import dataclasses
import functools
import math
from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp

from topd_jax.cli.doctor.findings import Finding, judge
from topd_jax.cli.replay import not_finite
from topd_jax.data.prompts import ordered_batches
from topd_jax.data.routing import places_of
from topd_jax.losses.fused import fused_token_logprobs
from topd_jax.models import Decoder, cast
from topd_jax.models.attention.masks import causal_intervals
from topd_jax.parallel import hosts
from topd_jax.parallel.layouts import loss_layout
from topd_jax.parallel.sharding import row_ways, spread_rows
from topd_jax.sampling import Stream, stream_key
from topd_jax.training.config import Settings
from topd_jax.training.setup import Setup
from topd_jax.types import Prompts, Teacher, positions_of

# Tokens that the student writes, at most, in how many rows at least.
_TOKENS, _ROWS = 32, 4
# Nats that a model may seem to differ from itself by, of its dtypes.
_ROUNDING = {"float32": 1e-3, "bfloat16": 0.1}
# Share of a uniform guess's nats: from here on text is noise to a model.
_NOISE = 0.9
# Nats a token below which there is nothing to learn.
_EQUAL = 1e-4


class Scores(NamedTuple):
    """One small batch, as both models see it: means in nats a token.

    Attributes:
      itself: reverse KL of the student to itself, in the teacher's dtypes.
      reverse_kl: of the student to the teacher.
      teacher_nll: of the teacher on what the student wrote.
      prompt_nll: of the teacher on the prompts.
      uniform: of a uniform guess.
      rounding: that the dtypes of the models may cost.
      not_finite: parameters that have numbers which are not finite; looked
        for where a loss is not.
    """

    itself: float
    reverse_kl: float
    teacher_nll: float
    prompt_nll: float
    uniform: float
    rounding: float
    not_finite: tuple[str, ...] = ()


def score(settings: Settings, setup: Setup, teacher: Teacher) -> Scores:
    """Write, score and read one small batch of a teacher's prompts.

    Args:
      settings: of the run.
      setup: of the run; call with its mesh set, in every process.
      teacher: one of the setup's.

    Returns:
      The scores.
    """
    encoded, ways = setup.encoded, row_ways(setup.mesh)
    places = places_of(encoded.records).get(teacher.name)
    rows = ways * math.ceil(_ROWS / ways)
    batch = next(ordered_batches(
        encoded.take(places or range(len(encoded.ids))), batch_size=rows
    ))  # fmt: skip
    limit = min(settings.rollout.max_new_tokens, _TOKENS)
    options = dataclasses.replace(settings.rollout, max_new_tokens=limit)
    # Not the settings: what the objective looks at may be longer.
    evaluator = dataclasses.replace(setup.evaluator(settings), rollout=options)
    student, model = setup.student, teacher.beside(setup.student)
    key = stream_key(jax.random.key(settings.seed), Stream.DOCTOR)
    prompts = spread_rows(batch.prompts, setup.mesh)
    trajectories = evaluator.writer(student, prompts, key)
    kinds = (model.config.dtype, model.config.param_dtype)
    twin = cast(student, min(kinds))  # "bfloat16" before "float32"
    same = trajectories.replace(teacher_prompt=None)
    itself = evaluator.comparer(student, twin, same)["reverse_kl"]
    seen = evaluator.comparer(student, model, trajectories)
    read = jax.jit(functools.partial(_prompt_nll, vocab=setup.vocab_size))
    asked = read(model, prompts.teacher or prompts)
    sums = itself, seen["reverse_kl"], seen["teacher_nll"], asked
    means = [float(total / count) for total, count in hosts.on_host(sums)]
    dtypes = {*kinds, student.config.dtype, student.config.param_dtype}
    broken = () if all(map(math.isfinite, means)) else tuple(
        f"{who}'s {name}"
        for who, one in (("student", student), ("teacher", model))
        for name in not_finite(one)
    )  # fmt: skip
    rounding = max(_ROUNDING[dtype] for dtype in dtypes)
    return Scores(*means, math.log(setup.vocab_size), rounding, broken)


def _prompt_nll(
    model: Decoder, prompts: Prompts, *, vocab: int
) -> tuple[jax.Array, jax.Array]:
    """Compute the (sum, count) of a model's NLL on prompts."""
    tokens, mask = prompts.tokens, prompts.mask
    hidden = model(tokens, positions_of(mask), causal_intervals(mask))[0]
    logp = fused_token_logprobs(
        hidden[:, :-1], model.head, tokens[:, 1:],
        vocab_size=vocab, layout=loss_layout(),
    )  # fmt: skip
    real = mask[:, :-1] & mask[:, 1:]
    return -jnp.sum(jnp.where(real, logp, 0.0)), jnp.sum(real)


def judged(
    scores: Scores, where: str = "", *, offline: bool = False
) -> Iterator[Finding]:
    """Judge the losses of one batch.

    Args:
      scores: of the batch.
      where: behind the names of the findings.
      offline: whether the run learns from the teacher's texts, so that those
        of the student may be noise.
    """
    loss, bound = scores.itself, scores.rounding
    yield judge(
        f"student == teacher{where}",
        abs(loss) <= bound,
        f"loss {loss:.2g} nats a token (at most {bound:g})",
        "what a run learns would drown in this: use float32 (student.dtype, "
        "teacher.dtype), and look for broken weights",
        "error",
    )
    level, problem, way_out = "warning", "", ""
    if not math.isfinite(scores.reverse_kl + scores.teacher_nll):
        level, problem = "error", "not finite: "
        way_out = (
            "use float32; if that does not help, the weights are broken: "
            f"{', '.join(scores.not_finite) or 'all are finite'}"
        )
    elif scores.teacher_nll > (noise := _NOISE * scores.uniform):
        if scores.prompt_nll > noise:
            problem = "prompts and completions are noise to the teacher: "
            way_out = (
                "compare the teacher's tokenizer files with those that came "
                "with its weights"
            )
        elif not offline:
            problem = "what the student writes is noise to the teacher: "
            way_out = (
                "begin with the teacher's own texts "
                "(--config.train.stage=offline), or with a better student"
            )
    elif scores.reverse_kl < _EQUAL:
        problem = "the student already says what the teacher says: "
        way_out = "is teacher.source the one that was meant?"
    text = (
        f"{problem}reverse KL {scores.reverse_kl:.3g}, teacher's NLL "
        f"{scores.teacher_nll:.3g} (prompts {scores.prompt_nll:.3g}; a uniform "
        f"guess {scores.uniform:.3g}) nats a token"
    )
    yield judge(f"one batch{where}", not problem, text, way_out, level)

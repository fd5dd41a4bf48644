"""Checks that run the models on one small batch.

The student writes a few tokens for real prompts and is scored against itself,
in the teacher's dtypes: what is not 0 there is rounding, and bounds what a run
can learn. Then each teacher scores what was written, and reads the prompts.
"""

import dataclasses
import functools
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from topd_jax.cli.doctor.findings import Finding, judge
from topd_jax.data.prompts import ordered_batches
from topd_jax.data.routing import places_of
from topd_jax.evaluation.evaluator import write
from topd_jax.losses.fused import fused_divergence, fused_token_logprobs
from topd_jax.models import Decoder, cast
from topd_jax.models.attention.masks import causal_intervals
from topd_jax.parallel import hosts
from topd_jax.parallel.batches import spread_rows
from topd_jax.parallel.layouts import loss_layout
from topd_jax.parallel.sharding import row_ways
from topd_jax.sampling import Stream, stream_key
from topd_jax.training.config import Settings
from topd_jax.training.setup import Setup
from topd_jax.types import Teacher, Trajectories, completion_states

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
    vocab = setup.vocab_size
    trajectories = write(
        setup.student,
        spread_rows(batch.prompts, setup.mesh),
        stream_key(jax.random.key(settings.seed), Stream.DOCTOR),
        options=dataclasses.replace(settings.rollout, max_new_tokens=limit),
        vocab_size=vocab,
        eos_ids=setup.tokenizer.eos_ids,
        pad_id=setup.tokenizer.pad_id,
    )
    measure = jax.jit(functools.partial(_measure, vocab=vocab))
    models = (setup.student, teacher.model)
    means = hosts.on_host(measure(*models, trajectories))
    dtypes = {t for m in models for t in (m.config.dtype, m.config.param_dtype)}
    broken = () if all(map(math.isfinite, means)) else tuple(
        f"{who}'s {name}"
        for who, model in zip(("student", "teacher"), models, strict=True)
        for name in _not_finite(model)
    )  # fmt: skip
    rounding = max(_ROUNDING[dtype] for dtype in dtypes)
    uniform = math.log(vocab)
    return Scores(*map(float, means), uniform, rounding, broken)


def _measure(
    student: Decoder,
    teacher: Decoder,
    trajectories: Trajectories,
    *,
    vocab: int,
) -> tuple[jax.Array, ...]:
    """Compute the first four fields of :class:`Scores`."""
    sequence, mask = trajectories.sequence, trajectories.mask
    causal = causal_intervals(trajectories.sequence_mask)
    prompt, layout = trajectories.prompt.shape[1], loss_layout()

    def states(model: Decoder) -> jax.Array:
        return model(sequence, trajectories.positions, causal)[0]

    def mean(values: jax.Array, where: jax.Array) -> jax.Array:
        total = jnp.sum(jnp.where(where, values, 0.0), dtype=jnp.float32)
        return total / jnp.maximum(jnp.sum(where), 1)

    def loss(hidden: jax.Array, head: Any) -> jax.Array:
        divergence = fused_divergence(
            completion_states(states(student), prompt), student.head,
            completion_states(hidden, prompt), head,
            vocab_size=vocab, layout=layout,
        )  # fmt: skip
        return mean(divergence, mask)

    kinds = (teacher.config.dtype, teacher.config.param_dtype)
    twin = cast(student, min(kinds))  # "bfloat16" before "float32"
    read = states(teacher)
    nll = -fused_token_logprobs(
        read[:, :-1], teacher.head, sequence[:, 1:],
        vocab_size=vocab, layout=layout,
    )  # fmt: skip
    asked = trajectories.prompt_mask
    return (
        loss(states(twin), twin.head),
        loss(read, teacher.head),
        mean(nll[:, prompt - 1 :], mask),
        mean(nll[:, : prompt - 1], asked[:, :-1] & asked[:, 1:]),
    )


def _not_finite(model: Decoder) -> list[str]:
    """Name the parameters that have numbers which are not finite."""
    return [
        name
        for name, array in model.arrays.items()
        for x in jax.tree.leaves(array)  # of quantized weights the scales
        if jnp.issubdtype(x.dtype, jnp.floating)
        and not hosts.on_host(jax.jit(jnp.isfinite)(x).all())
    ]


def judged(scores: Scores, where: str = "") -> Iterator[Finding]:
    """Judge the losses of one batch.

    Args:
      scores: of the batch.
      where: behind the names of the findings.
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
        else:
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

"""Checks that run both models on one small batch (ours).

The student writes a few tokens for real prompts and is scored against itself,
in the teacher's dtypes, through the run's own annotation and loss: what is not
0 there is rounding, and bounds what a run can learn. Then the teacher scores
it, reads the prompts, and both say what they expect behind a whole answer.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from topd_jax.cli.doctor.findings import Finding, error, ok
from topd_jax.data.prompts import pad_prompts
from topd_jax.losses import fused
from topd_jax.models import Decoder, cast, causal_mask, unembed
from topd_jax.models.quantization import is_quantized
from topd_jax.objectives.objective import Objective
from topd_jax.parallel import hosts
from topd_jax.sampling import rollout
from topd_jax.sampling.prompts import bucket
from topd_jax.training.config import Settings
from topd_jax.training.loss import batch_loss
from topd_jax.training.score import annotate
from topd_jax.training.setup import Pair
from topd_jax.types import Prompts, Trajectories, positions_of

# Tokens that the student writes, at most, in how many rows at least.
_TOKENS, _ROWS = 32, 4
# Apart from every step's key, which are folded from 1 up, and evaluation's.
_STREAM = 2**31 - 2


@dataclasses.dataclass(frozen=True)
class Scores:
    """One small batch, as both models see it; plain numbers and NumPy.

    Attributes:
      written: the trajectories, whole.
      itself: nats a token, reverse KL of the student to itself.
      reverse_kl: nats a token, of the student to the teacher.
      teacher_nll: nats a token, of the teacher on what the student wrote.
      prompt_nll: the same on the prompts.
      sampler: nats, mean difference between the log-probabilities that the
        sampler noted and those of reading the text again.
      padded_mass: probability that the teacher puts on rows that are dropped.
      next_ids: who -> i32[B], the likeliest token behind each whole answer.
      ending: who -> mean probability of an end there.
    """

    written: Trajectories
    itself: float
    reverse_kl: float
    teacher_nll: float
    prompt_nll: float
    sampler: float
    padded_mass: float
    next_ids: Mapping[str, np.ndarray]
    ending: Mapping[str, float]


def weights(models: Mapping[str, Any]) -> list[Finding]:
    """Whether every weight is a finite number."""
    found = []
    for who, model in models.items():
        counts = hosts.on_host(_not_finite(model))
        bad = {name: int(n) for name, n in counts.items() if n}
        if bad:
            spelt = ", ".join(f"{n} in {name}" for name, n in bad.items())
            found.append(
                error(
                    "weights",
                    f"the {who}'s are not all finite: {spelt}",
                    "the file is broken, or its training had diverged: "
                    "download it again, or take an earlier checkpoint",
                )
            )
    return found or [ok("weights", "all finite")]


@jax.jit
def _not_finite(model: Any) -> dict[str, jax.Array]:
    def wrong(array: Any) -> jax.Array:
        # Of quantised weights the scales alone can be no numbers.
        parts = [
            jnp.sum(~jnp.isfinite(x), dtype=jnp.int32)
            for x in jax.tree.leaves(array)
            if jnp.issubdtype(x.dtype, jnp.floating)
        ]
        return sum(parts, jnp.zeros((), jnp.int32))

    return {name: wrong(array) for name, array in model.arrays.items()}


def score(settings: Settings, pair: Pair) -> Scores:
    """Writes, scores and reads one small batch.

    Args:
      settings: of the run.
      pair: of the run; call with its mesh set.

    Returns:
      The scores.
    """
    student, teacher, ends = pair.student, pair.teacher, pair.tokenizer.eos_ids
    asked, answered = _batches(pair)
    ids = dict(eos_ids=ends, pad_id=pair.tokenizer.pad_id)
    key = jax.random.fold_in(jax.random.key(settings.seed), _STREAM)
    written = jax.jit(
        lambda model, prompts, key: rollout(
            cast(model, model.config.dtype),
            prompts,
            key,
            max_new_tokens=min(settings.rollout.max_new_tokens, _TOKENS),
            vocab_size=_shared(student, teacher),
            buckets=(),
            **ids,
        )
    )(student, pair.spread(asked), key)
    measure = jax.jit(
        functools.partial(
            _measure,
            objective=_plain(settings.objective),
            prompt=asked.tokens.shape[1],
            **ids,
        )
    )
    numbers, following, whole = hosts.on_host(
        (*measure(student, teacher, written, pair.spread(answered), key),
         written)
    )  # fmt: skip
    means = {n: float(total / count) for n, (total, count) in numbers.items()}
    return Scores(
        written=whole,
        next_ids={who: np.asarray(top) for who, (top, _) in following.items()},
        ending={who: float(p.mean()) for who, (_, p) in following.items()},
        **means,
    )


def _batches(pair: Pair) -> tuple[Prompts, Prompts]:
    """Prompts, and the same prompts with a whole answer behind each.

    As many rows as the mesh has to share, four at least.
    """
    ways = math.prod(
        pair.mesh.shape[a] for a in pair.mesh.shape if a != "tensor"
    )
    rows = ways * math.ceil(_ROWS / ways)
    chosen = [i % len(pair.encoded.ids) for i in range(rows)]
    asked = [pair.encoded.ids[i] for i in chosen]
    limit = max(map(len, asked)) + _TOKENS
    answered = []
    for i, prompt in zip(chosen, asked, strict=True):
        answer = pair.tokenizer.encode(pair.encoded.records[i]["answer"])
        if not answer or len(prompt) + len(answer) > limit:
            answer = pair.tokenizer.encode("Yes.")
        answered.append(np.asarray([*prompt, *answer], np.int32))
    pad_id = pair.tokenizer.pad_id

    def batch(ids: list[np.ndarray]) -> Prompts:
        width = bucket(max(map(len, ids)))
        return pad_prompts(ids, pad_id=pad_id, width=width)

    return batch(asked), batch(answered)


def _plain(objective: Objective) -> Objective:
    """The reverse KL of every token and nothing beside it."""
    return dataclasses.replace(
        objective, stage="on_policy", variant="opd", divergence="reverse_kl",
        score="teacher_loss", temperature=1.0,
    )  # fmt: skip


def _shared(student: Any, teacher: Any) -> int:
    return min(student.head.shape[0], teacher.head.shape[0])


def _measure(
    student: Any,
    teacher: Any,
    written: Trajectories,
    answered: Prompts,
    key: jax.Array,
    *,
    objective: Objective,
    prompt: int,
    eos_ids: tuple[int, ...],
    pad_id: int,
) -> tuple[dict, dict]:
    mask = written.mask
    tokens = jnp.sum(mask, dtype=jnp.float32)
    totals = (tokens, jnp.zeros(()))
    vocab = _shared(student, teacher)

    def divergence(other: Any) -> tuple[jax.Array, Any]:
        notes = annotate(
            student, other, written, key, objective=objective,
            eos_ids=eos_ids, pad_id=pad_id,
        )  # fmt: skip
        _, sums = batch_loss(
            student, other.head, written, notes, totals, objective
        )
        return sums["divergence"], notes

    itself, _ = divergence(_twin(student, teacher))
    apart, notes = divergence(teacher)
    again = _logprobs(cast(student, student.config.dtype), written, vocab)
    drift = jnp.where(mask, jnp.abs(again[:, prompt - 1 :] - written.logp), 0.0)
    read = written.prompt_mask[:, :-1] & written.prompt_mask[:, 1:]
    known = _logprobs(teacher, written, vocab)[:, : prompt - 1]
    beyond = jnp.zeros(())
    if teacher.head.shape[0] > vocab:
        mass = fused.dropped_mass(notes.teacher_hidden, teacher.head, vocab)
        beyond = jnp.sum(jnp.where(mask, mass, 0.0))
    numbers = {
        "itself": (itself, tokens),
        "reverse_kl": (apart, tokens),
        "teacher_nll": (jnp.sum(notes.teacher_token_loss), tokens),
        "prompt_nll": (
            -jnp.sum(jnp.where(read, known, 0.0)),
            jnp.maximum(jnp.sum(read, dtype=jnp.float32), 1.0),
        ),
        "sampler": (jnp.sum(drift), tokens),
        "padded_mass": (beyond, tokens),
    }
    following = {
        "student": _following(student, answered, vocab, eos_ids),
        "teacher": _following(teacher, answered, vocab, eos_ids),
    }
    return numbers, following


def _twin(student: Any, teacher: Any) -> Any:
    """The student as a teacher of these dtypes would hold it."""
    kinds = {n: getattr(teacher.config, n) for n in ("dtype", "param_dtype")}
    config = dataclasses.replace(student.config, **kinds)
    arrays = {
        n: x if is_quantized(x) else x.astype(config.param_dtype)
        for n, x in student.arrays.items()
    }
    return Decoder(config, arrays)


def _logprobs(model: Any, written: Trajectories, vocab: int) -> jax.Array:
    """f32[B, P + T - 1]: of every token but the first."""
    sequence = written.sequence
    hidden, _ = model(
        sequence, written.positions, causal_mask(written.sequence_mask)
    )
    return fused.fused_token_logprobs(
        hidden[:, :-1], model.head, sequence[:, 1:], vocab_size=vocab
    )


def _following(
    model: Any, prompts: Prompts, vocab: int, eos_ids: tuple[int, ...]
) -> tuple[jax.Array, jax.Array]:
    """(i32[B] likeliest next token, f32[B] probability of an end)."""
    hidden, _ = model(
        prompts.tokens, positions_of(prompts.mask), causal_mask(prompts.mask)
    )
    logits = unembed(model.head[:vocab], hidden[:, -1])
    p = jax.nn.softmax(logits, axis=-1)
    return jnp.argmax(logits, -1), jnp.sum(p[:, list(eos_ids)], -1)

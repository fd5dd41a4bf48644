"""Statistics of a student against its teacher, on what the student wrote.

Exact divergences beside the sampled estimators, entropies, and how far the
student's favourites are the teacher's: what on-policy distillation is watched
by. All as (sum, count) over generated tokens, never a [B, T, V] tensor.
"""

import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from scipy.stats import binomtest

from topd_jax.losses import divergences, estimators, fused, log_probs
from topd_jax.parallel.collectives import top_k as top_k_of
from topd_jax.types import Head, Layout


def statistics(
    student_hidden: jax.Array,
    student_head: Head,
    teacher_hidden: jax.Array,
    teacher_head: Head,
    tokens: jax.Array,
    mask: jax.Array,
    *,
    layout: Layout,
    top_k: int = 16,
) -> dict[str, tuple[jax.Array, jax.Array]]:
    """Compare both models token by token.

    Args:
      student_hidden: [B, T, D] in the tokens' coordinates.
      student_head: [V, D].
      teacher_hidden: [B, T, D_teacher].
      teacher_head: [V, D_teacher].
      tokens: i32[B, T] any tokens; the student's own for an on-policy view.
      mask: bool[B, T] which of them count.
      layout: of the fused pass.
      top_k: size of the student's and teacher's top sets.

    Returns:
      name -> (sum, count) over the tokens: reverse_kl, forward_kl,
      reverse_kl_k1 and reverse_kl_k3 (estimates from the sampled tokens),
      student_entropy, teacher_entropy, student_nll, teacher_nll (of the
      tokens), in nats; top_k_mass (teacher's mass on the student's top k),
      top_k_overlap (shared part of the two top sets), 0..1; dropped_mass,
      what the teacher's full softmax puts beyond the shared vocabulary, 0..1.
    """
    vocab = min(student_head.shape[0], teacher_head.shape[0])
    per_token = fused.fused_map(
        functools.partial(_compare, top_k=top_k),
        student_hidden,
        student_head,
        teacher_hidden,
        teacher_head,
        tokens,
        layout=layout,
    )
    if teacher_head.shape[0] > vocab:
        per_token["dropped_mass"] = fused.dropped_mass(
            teacher_hidden, teacher_head, vocab, layout=layout
        )
    count = jnp.sum(mask, dtype=jnp.float32)
    return {
        name: (jnp.sum(jnp.where(mask, values, 0.0)), count)
        for name, values in per_token.items()
    }


def _compare(
    student_logp: jax.Array,
    teacher_logp: jax.Array,
    tokens: jax.Array,
    *,
    top_k: int,
) -> dict[str, jax.Array]:
    """Compare both distributions f32[..., V] of each token."""
    student = log_probs.token_logprobs(student_logp, tokens)
    teacher = jnp.maximum(
        log_probs.token_logprobs(teacher_logp, tokens), log_probs.LOG_FLOOR
    )
    k = min(top_k, student_logp.shape[-1])
    _, student_ids = top_k_of(student_logp, k)
    _, teacher_ids = top_k_of(teacher_logp, k)
    mass = jnp.exp(jnp.take_along_axis(teacher_logp, student_ids, axis=-1))
    shared = student_ids[..., :, None] == teacher_ids[..., None, :]
    return {
        "reverse_kl": divergences.reverse_kl(student_logp, teacher_logp),
        "forward_kl": divergences.forward_kl(student_logp, teacher_logp),
        "reverse_kl_k1": estimators.k1(student, teacher),
        "reverse_kl_k3": estimators.k3(student, teacher),
        "student_entropy": log_probs.entropy(student_logp),
        "teacher_entropy": log_probs.entropy(teacher_logp),
        "student_nll": -student,
        "teacher_nll": -teacher,
        "top_k_mass": jnp.sum(mass, axis=-1),
        "top_k_overlap": jnp.sum(shared, axis=(-2, -1)) / k,
    }


def distinct_ngrams(rows: list[list[int]], n: int = 3) -> float:
    """Compute the share of n-grams that are distinct (arXiv:1510.03055).

    Args:
      rows: token ids of each completion.
      n: size of the n-grams.

    Returns:
      0..1; near 0 where completions repeat themselves or each other, 0 where
      none is long enough.
    """
    grams = [tuple(r[i : i + n]) for r in rows for i in range(len(r) - n + 1)]
    return len(set(grams)) / len(grams) if grams else 0.0


def repeated_tokens(
    tokens: jax.Array, mask: jax.Array, longest: int = 32
) -> jax.Array:
    """Count tokens that continue a loop of their completion.

    A token counts where it and the one before it are those of a period
    earlier; a row's period is the one with the most of them.

    Args:
      tokens: i32[B, T].
      mask: bool[B, T] tokens that exist, from the first of each row on.
      longest: period, tokens.

    Returns:
      f32[] their number.

    Example:
      >>> import jax.numpy as jnp
      >>> loop = jnp.array([[7, 1, 2, 1, 2, 1, 2]])
      >>> float(repeated_tokens(loop, loop > 0))
      3.0
    """
    places = jnp.arange(tokens.shape[1])

    def count(period: jax.Array) -> jax.Array:
        same = tokens == jnp.roll(tokens, period, axis=1)
        same &= mask & (places >= period)
        pairs = same & jnp.roll(same, 1, axis=1) & (places > 0)
        return jnp.sum(pairs, axis=1, dtype=jnp.float32)

    counts = jax.lax.map(count, jnp.arange(1, longest + 1))
    return jnp.sum(jnp.max(counts, axis=0))


def read_metrics(metrics: Mapping[str, Any]) -> dict[str, float | None]:
    """Wait for metrics and divide each sum by its count.

    Args:
      metrics: name -> (sum, count), scalars on any device.

    Returns:
      name -> number; None where nothing was counted or it is not finite
      (JSON has no NaN).
    """
    out = {}
    for name, (total, count) in jax.device_get(dict(metrics)).items():
        value = float(np.float32(total) / np.float32(count)) if count else None
        finite = value is not None and math.isfinite(value)
        out[name] = value if finite else None
    return out


def merge(parts: list[Mapping[str, Any]]) -> dict[str, tuple[float, float]]:
    """Add up (sum, count) metrics of several batches, on the host.

    Args:
      parts: name -> (sum, count), one mapping a batch.

    Returns:
      name -> (sum, count) over all of them, float64.
    """
    out: dict[str, tuple[float, float]] = {}
    for part in jax.device_get([dict(p) for p in parts]):
        for name, (total, count) in part.items():
            before = out.get(name, (0.0, 0.0))
            out[name] = (before[0] + float(total), before[1] + float(count))
    return out


def accuracy(grades: list[bool] | None) -> dict[str, Any]:
    """Summarize grades: the share that is right, with its 95 % interval.

    Args:
      grades: which answers are right; None where they are not known.

    Returns:
      exact_match, and where it is known correct, exact_match_low and _high,
      and grades, one bit a problem in hexadecimal.
    """
    if grades is None:
        return {"exact_match": None}
    correct = sum(grades)
    bits = "".join("1" if g else "0" for g in grades)
    # Wilson's interval (1927).
    low, high = binomtest(correct, len(grades)).proportion_ci(method="wilson")
    return {
        "exact_match": correct / len(grades),
        "correct": correct,
        "exact_match_low": float(low),
        "exact_match_high": float(high),
        # One bit a problem, in order: paired comparisons need them.
        "grades": f"{int(bits, 2):0{-(-len(bits) // 4)}x}",
    }


def better(row: dict[str, Any], than: dict[str, Any]) -> bool:
    """Return whether an evaluation beats another: accuracy, else reverse KL.

    Args:
      row: an evaluation.
      than: another one.
    """
    if row.get("exact_match") is not None:
        return row["exact_match"] > than["exact_match"]
    # None is one that was not finite.
    found, before = (
        math.inf if r["reverse_kl"] is None else r["reverse_kl"]
        for r in (row, than)
    )
    return found < before

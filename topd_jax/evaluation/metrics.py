"""Statistics of a student against its teacher, on what the student wrote.

Exact divergences beside the sampled estimators, entropies, and how far the
student's favourites are the teacher's: what on-policy distillation is watched
by. All as (sum, count) over generated tokens, never a [B, T, V] tensor.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from topd_jax.data.packing import PackedRows
from topd_jax.losses import divergences, fused
from topd_jax.parallel.collectives import top_k as top_k_of
from topd_jax.training.score import read
from topd_jax.training.sft import packed_states
from topd_jax.types import Trajectories


def statistics(
    student: Any,
    teacher: Any,
    trajectories: Trajectories | PackedRows,
    *,
    top_k: int = 16,
    log_floor: float = -100.0,
    teacher_states: jax.Array | None = None,
) -> dict[str, tuple[jax.Array, jax.Array]]:
    """Runs both models over trajectories and compares them token by token.

    Args:
      student: the model.
      teacher: the frozen model.
      trajectories: any tokens; the student's own for an on-policy view.
      top_k: size of the student's and teacher's top sets.
      log_floor: floor of the teacher's log-probabilities in the KLs, nats.
      teacher_states: [B, T, D_teacher] what the teacher has read already; of
        it only the head is needed then. None: it reads here.

    Returns:
      name -> (sum, count) over generated tokens: reverse_kl, forward_kl,
      reverse_kl_k1 and reverse_kl_k3 (estimates from the sampled tokens,
      Schulman, "Approximating KL divergence", 2020), student_entropy,
      teacher_entropy, student_nll, teacher_nll (of the tokens), in nats;
      top_k_mass (teacher's mass on the student's top k), top_k_overlap
      (shared part of the two top sets), 0..1; dropped_mass, what the
      teacher's full softmax puts beyond the shared vocabulary, 0..1.
    """
    if teacher_states is None:
        teacher_states = _states(teacher, trajectories)
    states = (_states(student, trajectories), teacher_states)
    mask = trajectories.mask
    vocab = min(student.head.shape[0], teacher.head.shape[0])

    per_token = fused.fused_map(
        functools.partial(_compare, top_k=top_k, log_floor=log_floor),
        states[0],
        student.head,
        states[1],
        teacher.head,
        trajectories.tokens,
    )
    if teacher.head.shape[0] > vocab:
        per_token["dropped_mass"] = fused.dropped_mass(
            states[1], teacher.head, vocab
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
    log_floor: float,
) -> dict[str, jax.Array]:
    """What is said of each token, from both distributions, f32[..., V]."""
    ours = divergences.token_logprobs(student_logp, tokens)
    theirs = divergences.token_logprobs(teacher_logp, tokens)
    floored = jnp.maximum(theirs, log_floor)
    k = min(top_k, student_logp.shape[-1])
    _, our_ids = top_k_of(student_logp, k)
    _, their_ids = top_k_of(teacher_logp, k)
    on_ours = jnp.take_along_axis(teacher_logp, our_ids, axis=-1)
    shared = our_ids[..., :, None] == their_ids[..., None, :]
    return {
        "reverse_kl": divergences.reverse_kl(
            student_logp, teacher_logp, log_floor=log_floor
        ),
        "forward_kl": divergences.forward_kl(
            student_logp, teacher_logp, log_floor=log_floor
        ),
        "reverse_kl_k1": divergences.sampled_kl(ours, floored, "k1"),
        "reverse_kl_k3": divergences.sampled_kl(ours, floored, "k3"),
        "student_entropy": divergences.entropy(student_logp),
        "teacher_entropy": divergences.entropy(teacher_logp),
        "student_nll": -ours,
        "teacher_nll": -floored,
        "top_k_mass": jnp.sum(jnp.exp(on_ours), axis=-1),
        "top_k_overlap": jnp.sum(shared, axis=(-2, -1)) / k,
    }


def distinct_ngrams(rows: list[list[int]], n: int = 3) -> float:
    """Share of n-grams that are distinct (Li et al., 1510.03055).

    Args:
      rows: token ids of each completion.
      n: size of the n-grams.

    Returns:
      0..1; near 0 where completions repeat themselves or each other, 0 where
      none is long enough.
    """
    grams = [tuple(r[i : i + n]) for r in rows for i in range(len(r) - n + 1)]
    return len(set(grams)) / len(grams) if grams else 0.0


def _states(model: Any, trajectories: Trajectories | PackedRows) -> jax.Array:
    if isinstance(trajectories, PackedRows):
        return packed_states(model, trajectories)
    return read(model, trajectories)

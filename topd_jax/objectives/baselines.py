"""The sibling methods as objectives: what each needs, and how it enters.

:mod:`topd_jax.losses.siblings` has their formulas. Here they become variants of
:class:`~topd_jax.objectives.objective.Objective`: most are weights of the
token loss,
made once a batch with the other annotations; two are token losses of their
own. All see the same rollouts, teacher and optimizer as the variants they are
compared with (ours).
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from topd_jax.losses import divergences, fused, siblings
from topd_jax.objectives.objective import Objective
from topd_jax.types import Annotations, Head, Trajectories


def token_statistics(
    student_hidden: jax.Array,
    student_head: Head,
    teacher_hidden: jax.Array,
    teacher_head: Head,
    tokens: jax.Array,
    objective: Objective,
) -> dict[str, jax.Array]:
    """What the weights of the sibling methods are made of.

    Args:
      student_hidden: [B, T, D], in completion coordinates.
      student_head: [V, D].
      teacher_hidden: [B, T, D_teacher].
      teacher_head: [V, D_teacher].
      tokens: i32[B, T] the completions.
      objective: for ``log_floor``, ``chunk_size`` and ``siblings``.

    Returns:
      name -> f32[B, T]: reverse_kl, student_entropy, teacher_entropy,
      student_logp and teacher_logp (of the tokens), in nats; coverage, the
      teacher's mass on the student's top k, 0..1.
    """
    top_k = objective.siblings.top_k

    def compare(
        student_logp: jax.Array, teacher_logp: jax.Array, tokens: jax.Array
    ) -> dict[str, jax.Array]:
        return {
            "reverse_kl": divergences.reverse_kl(
                student_logp, teacher_logp, log_floor=objective.log_floor
            ),
            "student_entropy": divergences.entropy(student_logp),
            "teacher_entropy": divergences.entropy(teacher_logp),
            "student_logp": divergences.token_logprobs(student_logp, tokens),
            "teacher_logp": divergences.token_logprobs(teacher_logp, tokens),
            "coverage": siblings.top_k_coverage(
                student_logp, teacher_logp, top_k
            ),
        }

    return fused.fused_map(
        compare, student_hidden, student_head, teacher_hidden, teacher_head,
        tokens, chunk_size=objective.chunk_size,
    )  # fmt: skip


def sibling_weights(
    found: Mapping[str, jax.Array], mask: jax.Array, objective: Objective
) -> jax.Array:
    """Weights of the token loss that a sibling method gives.

    Where a method keeps some tokens only, the mean is over those it keeps:
    weights are scaled so that they add up to the number of tokens.

    Args:
      found: of :func:`token_statistics`.
      mask: bool[B, T] which tokens exist.
      objective: whose variant is one of the methods, and their settings.

    Returns:
      f32[B, T], stopped, 0 outside the mask.
    """
    name, options = objective.pieces.weighs, objective.siblings
    if name == "prefix":
        return siblings.prefix_weights(
            found["student_logp"], found["teacher_logp"], mask,
            gamma=options.gamma, log_floor=objective.log_floor,
        )  # fmt: skip
    if name == "fire":
        return siblings.fire_weights(
            jnp.maximum(found["teacher_logp"], objective.log_floor),
            found["student_entropy"], found["teacher_entropy"], mask,
            drop=options.drop,
        )  # fmt: skip
    loss = found["reverse_kl"]
    if name == "agreement":
        weights = siblings.agreement_weights(
            loss,
            mask,
            siblings.agreement_threshold(
                loss, mask, quantile=options.quantile, window=options.window
            ),
            window=options.window,
        )
    elif name == "tip":
        weights = siblings.tip_weights(
            found["student_entropy"], loss, mask, fraction=options.fraction
        )
    else:
        weights = siblings.teachability_weights(
            loss, found["coverage"], mask, fraction=options.fraction
        )
    kept = jnp.sum(weights)
    return weights * jnp.sum(mask) / jnp.maximum(kept, 1.0)


def entropy_aware(objective: Objective) -> fused.Divergence:
    """The token loss of entropy-aware distillation, for the fused losses.

    Args:
      objective: for ``siblings`` and ``log_floor``.

    Returns:
      (student_logp [R, V], teacher_logp [R, V]) -> [R].
    """
    options, floor = objective.siblings, objective.log_floor

    def divergence(
        student_logp: jax.Array, teacher_logp: jax.Array
    ) -> jax.Array:
        return siblings.entropy_aware_loss(
            divergences.reverse_kl(student_logp, teacher_logp, log_floor=floor),
            siblings.top_k_forward_kl(
                student_logp, teacher_logp, options.top_k, log_floor=floor
            ),
            divergences.entropy(teacher_logp),
            alpha=options.alpha,
            entropy_threshold=options.entropy_threshold,
        )

    return divergence


def trust_region(
    heads: Mapping[str, Any],
    trajectories: Trajectories,
    notes: Annotations,
    objective: Objective,
) -> tuple[jax.Array, jax.Array]:
    """The trust-region loss summed over tokens, differentiable.

    Args:
      heads: student_hidden, student_head, teacher_hidden, teacher_head.
      trajectories: what the student wrote.
      notes: with ``lots``, the draws of the region.
      objective: for ``siblings``, ``log_floor`` and ``chunk_size``.

    Returns:
      (f32[] sum over tokens, f32[B, T] token losses, stopped).
    """
    top_k, floor = objective.siblings.top_k, objective.log_floor
    vocab = min(heads["student_head"].shape[0], heads["teacher_head"].shape[0])

    def outside(student_logp: jax.Array, teacher_logp: jax.Array) -> jax.Array:
        return siblings.top_k_forward_kl(
            student_logp, teacher_logp, top_k, log_floor=floor
        )

    token_loss = siblings.trust_region_loss(
        notes.lots,
        fused.fused_token_logprobs(
            heads["student_hidden"], heads["student_head"],
            trajectories.tokens, vocab_size=vocab,
            chunk_size=objective.chunk_size,
        ),
        -notes.teacher_token_loss,
        fused.fused_divergence(
            **heads, divergence=outside, chunk_size=objective.chunk_size
        ),
        log_floor=floor,
    )  # fmt: skip
    token_loss = jnp.where(trajectories.mask, token_loss, 0.0)
    return jnp.sum(token_loss), jax.lax.stop_gradient(token_loss)

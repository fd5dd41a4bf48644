"""Teaching the student the teacher's near future, at the points that diverge.

arXiv:2606.00305, §3: at a divergent point t the transport plan ``g`` between
the student's window and the teacher's window ``T_t`` gives targets,

    target_{t+i} = sum_j g_ij onehot(T_t[j]),
    L_traj = sum_i KL(target_{t+i} || p_S(. | c_{t+i})).

Where the paper is silent or inconsistent: rows of a plan sum to 1/K, so they
are normalized; the mean is taken over i; and the context c, about which the
paper says two things, is a choice.

* ``"student"`` (§3): c_{t+i} = y_{<t+i}, the rollout's own contexts.
  :func:`student_context_logprobs` -> :func:`trajectory_targets` ->
  :func:`trajectory_loss`. Taken literally, it can reinforce the very error it
  is to repair: where the student writes the teacher's later token too early,
  transport aligns the two and the target is the error. ``anchor_first`` makes
  the first target the teacher's first token; there both contexts are y_{<t}.
* ``"teacher"`` (§5.2): c_{t+i} = y_{<t} + T_t[:i] and the target is T_t[i].
  Any loss per token along the teacher's window -> :func:`window_mean`.

Both give one number a candidate, f32[..., M]; the mean over the divergent ones
of the global batch is the caller's: ``weighted_mean(loss, mask=divergent)``.
"""

import chex
import jax
import jax.numpy as jnp

from topd_jax.losses.fused import fused_log_normalizer
from topd_jax.losses.log_probs import LOG_FLOOR, floored
from topd_jax.losses.near_future import slice_windows
from topd_jax.types import (
    ONE_DEVICE,
    Candidates,
    Head,
    Layout,
    Windows,
    head_cap,
    head_rows,
    soft_cap,
)


def trajectory_targets(
    plan: jax.Array,
    teacher_windows: Windows,
    student_windows: Windows | None = None,
    *,
    anchor_first: bool = True,
) -> jax.Array:
    """Compute targets along the student's window from the transport plan.

    ``target_i = sum_j g_ij / (sum_j g_ij) onehot(T[j])`` (arXiv:2606.00305,
    §3, which does not normalize). Entry [i, j] is the probability that row i
    puts on the token ``T[j]``; a token that occurs twice in the window has the
    sum of both. No V-sized target exists.

    Args:
      plan: f32[..., K, J] transport plan, student by teacher tokens.
      teacher_windows: tokens and mask [..., J].
      student_windows: mask [..., K]: rows to keep. Unless given, those that
        carry mass in the plan.
      anchor_first: row 0 is all on ``T[0]``. The literal target may be the
        student's own error.

    Returns:
      f32[..., K, J], stopped; rows sum to 1, or to 0 where the student has no
      token or the teacher no window.

    Example:
      >>> import jax.numpy as jnp
      >>> plan = jnp.array([[0.5, 0.5], [0.0, 0.25]])
      >>> teacher = Windows(jnp.array([5, 7]), jnp.array([True, True]))
      >>> trajectory_targets(plan, teacher).tolist()
      [[1.0, 0.0], [0.0, 1.0]]
    """
    chex.assert_type([teacher_windows.mask], bool)
    plan = jax.lax.stop_gradient(plan)
    plan = jnp.where(teacher_windows.mask[..., None, :], plan, 0.0)
    mass = plan.sum(axis=-1, keepdims=True)
    exists = mass > 0
    if student_windows is not None:
        exists &= student_windows.mask[..., None]
    targets = jnp.where(exists, plan / jnp.where(mass > 0, mass, 1.0), 0.0)
    if not anchor_first:
        return targets
    first_row = jnp.arange(plan.shape[-2])[:, None] == 0
    first_token = jnp.arange(plan.shape[-1]) == 0
    anchored = exists & teacher_windows.mask[..., None, :] & first_token
    return jnp.where(first_row, anchored.astype(targets.dtype), targets)


def trajectory_loss(
    targets: jax.Array, logp: jax.Array, teacher_windows: Windows
) -> jax.Array:
    """Compute the KL of the targets to the student, mean over the window.

    ``mean_i KL(target_i || p_S(. | c_i))`` (arXiv:2606.00305, §3; the mean,
    where the paper has a sum). A true KL, 0 where the student is the
    target: the mass of a token that occurs twice is merged before its
    logarithm is taken. Only K log-probabilities a row are needed.

    Args:
      targets: f32[..., K, J] of :func:`trajectory_targets`.
      logp: f32[..., K, J] log p_S(T[j] | c_i); -100 stands for smaller ones.
      teacher_windows: tokens [..., J].

    Returns:
      f32[...] one value a window; 0 where no row has a target.

    Example:
      >>> import jax.numpy as jnp
      >>> targets = jnp.array([[1.0, 0.0]])
      >>> logp = jnp.log(jnp.array([[0.25, 0.5]]))
      >>> teacher = Windows(jnp.array([5, 7]), jnp.array([True, True]))
      >>> round(float(trajectory_loss(targets, logp, teacher)), 4)
      1.3863
    """
    tokens = teacher_windows.tokens
    same = tokens[..., :, None] == tokens[..., None, :]
    # sum_v q_v log q_v = sum_j g_j log q(T[j]): the merged mass belongs under
    # the logarithm only.
    merged = jnp.einsum(
        "...ij,...jl->...il",
        targets,
        same.astype(targets.dtype),
        precision=jax.lax.Precision.HIGHEST,
    )
    used = targets > 0
    logp = floored(logp, LOG_FLOOR)
    gap = jnp.log(jnp.where(used, merged, 1.0)) - logp
    values = jnp.sum(jnp.where(used, targets * gap, 0.0), axis=-1)
    return window_mean(values, jnp.any(used, axis=-1))


def window_mean(values: jax.Array, mask: jax.Array) -> jax.Array:
    """Compute the mean over the tokens of each window; 0 for an empty one.

    With context "teacher" this is the whole trajectory loss: ``values[i]`` is
    the loss at c_i = y_{<t} + T[:i], by default ``-log p_S(T[i] | c_i)``, and
    ``mask`` the teacher window's (arXiv:2606.00305, §5.2).

    Args:
      values: f32[..., K] one value a token; ignored outside the mask.
      mask: bool[..., K].

    Returns:
      f32[...].

    Example:
      >>> import jax.numpy as jnp
      >>> mask = jnp.array([True, True, False])
      >>> float(window_mean(jnp.array([1.0, 3.0, 9.0]), mask))
      2.0
    """
    chex.assert_type(mask, bool)
    chex.assert_equal_shape([values, mask])
    total = jnp.where(mask, values, 0.0).sum(axis=-1)
    return total / jnp.maximum(mask.sum(axis=-1), 1)


def student_context_logprobs(
    student_hidden: jax.Array,
    student_head: Head,
    candidates: Candidates,
    teacher_windows: Windows,
    *,
    vocab_size: int | None = None,
    layout: Layout = ONE_DEVICE,
) -> jax.Array:
    """Compute log p_S(T[j] | y_{<t+i}): teacher tokens in rollout contexts.

    ``<h_{t+i}, W[T[j]]> - log sum_v exp <h_{t+i}, W[v]>``: K inner products a
    position, and the log-normaliser once a rollout position, shared by all
    windows. No [..., M, K, V] array. Differentiable in states and head.

    Args:
      student_hidden: [..., T, D] in completion coordinates: entry t predicts
        y_t.
      student_head: [V, D].
      candidates: [..., M].
      teacher_windows: tokens [..., M, K].
      vocab_size: ids that exist, the first of the head's rows; all unless
        given.
      layout: of :func:`~topd_jax.losses.fused.fused_log_normalizer`.

    Returns:
      f32[..., M, K, K]: row i is the rollout's position t + i, column j the
      token T[j]. Rows past the rollout's end mean nothing, but are finite.
    """
    log_normalizer = fused_log_normalizer(
        student_hidden, student_head, vocab_size=vocab_size, layout=layout
    )
    chex.assert_type(teacher_windows.tokens, int)
    length = teacher_windows.tokens.shape[-1]
    starts = candidates.positions
    states = slice_windows(student_hidden, starts, length)
    rows = head_rows(student_head)[teacher_windows.tokens]
    # As the normalizer's products: rounded, a row could be likelier than 1.
    dtype = jnp.promote_types(states.dtype, rows.dtype)
    logits = jnp.einsum(
        "...id,...jd->...ij", states.astype(dtype), rows.astype(dtype),
        preferred_element_type=jnp.float32,
    )  # fmt: skip
    logits = soft_cap(logits, head_cap(student_head))
    return logits - slice_windows(log_normalizer, starts, length)[..., None]

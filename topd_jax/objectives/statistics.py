"""Per-token statistics of both models, computed in one pass over the heads."""

import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax

from topd_jax.losses import divergences, log_probs
from topd_jax.losses.fused import fused_divergence, fused_map
from topd_jax.losses.token_losses import TokenLoss
from topd_jax.types import Head, Layout

# What a piece may name that both models' distributions say: f32[B, T], nats.
STATISTICS: Mapping[str, Callable[..., jax.Array]] = {
    "reverse_kl": divergences.reverse_kl,
    "forward_kl": divergences.forward_kl,
    "student_entropy": lambda student, teacher: log_probs.entropy(student),
    "teacher_entropy": lambda student, teacher: log_probs.entropy(teacher),
    "student_token_logp": lambda student, teacher, tokens: (
        log_probs.token_logprobs(student, tokens)
    ),
    "teacher_token_logp": lambda student, teacher, tokens: (
        log_probs.token_logprobs(teacher, tokens)
    ),
}


def token_statistics(
    names: Iterable[str],
    student_hidden: jax.Array,
    student_head: Head,
    teacher_hidden: jax.Array,
    teacher_head: Head,
    rows: Mapping[str, jax.Array],
    *,
    layout: Layout,
    extra: Mapping[str, Callable[..., jax.Array]],
    token_loss: TokenLoss,
    temperature: float,
) -> dict[str, jax.Array]:
    """Compute what token weights are made of, without gradient.

    Args:
      names: of :data:`STATISTICS`, of ``extra``, or "token_loss".
      student_hidden: [B, T, D], in completion coordinates.
      student_head: [V, D].
      teacher_hidden: [B, T, D_teacher].
      teacher_head: [V, D_teacher].
      rows: "tokens" i32[B, T], and "uniforms" where ``token_loss`` names it.
      layout: size of the chunks, and where they lie on a mesh.
      extra: further statistics, name -> function of both log-probabilities.
      token_loss: the objective's own.
      temperature: of ``token_loss`` alone.

    Returns:
      name -> f32[B, T], stopped.
    """
    arrays = jax.lax.stop_gradient(
        (student_hidden, student_head, teacher_hidden, teacher_head)
    )
    table = {**STATISTICS, **extra}
    asked = {name: table[name] for name in sorted(names) if name in table}

    def compare(
        student_logp: jax.Array, teacher_logp: jax.Array, tokens: jax.Array
    ) -> dict[str, jax.Array]:
        return {
            name: statistic(
                student_logp,
                teacher_logp,
                **pick(statistic, {"tokens": tokens}),
            )
            for name, statistic in asked.items()
        }

    out = {}
    if asked:
        out = fused_map(compare, *arrays, rows["tokens"], layout=layout)
    if "token_loss" in names:
        out["token_loss"] = fused_divergence(
            *arrays,
            token_loss,
            rows=pick(token_loss, rows),
            temperature=temperature,
            layout=layout,
        )
    return jax.lax.stop_gradient(out)


def pick(
    function: Callable[..., Any], offered: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the arguments that a function names after its first two.

    Args:
      function: of both models' log-probabilities.
      offered: name -> value.
    """
    named = list(inspect.signature(function).parameters)[2:]
    return {name: offered[name] for name in named if name in offered}

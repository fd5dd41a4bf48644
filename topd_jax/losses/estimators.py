"""Estimates of KL(student || teacher) from tokens that the student sampled.

With r = log p_T(y) - log p_S(y) (Schulman, "Approximating KL divergence",
2020): k1 = -r, k2 = r^2 / 2, k3 = exp(r) - 1 - r. They differ in bias, in
sign, and in what their gradient trains. The paper uses none of them.
"""

import jax
import jax.numpy as jnp

from topd_jax.losses.log_probs import LOG_FLOOR, check_pair, floored

# exp of this is still finite in float32, and so are sums of it.
_MAX_LOG_RATIO = 80.0


def _log_ratio(
    student_token_logp: jax.Array, teacher_token_logp: jax.Array
) -> jax.Array:
    """Compute log p_T(y) - log p_S(y), both floored."""
    check_pair(student_token_logp, teacher_token_logp)
    student = floored(student_token_logp, LOG_FLOOR)
    return floored(teacher_token_logp, LOG_FLOOR) - student


def k1(
    student_token_logp: jax.Array, teacher_token_logp: jax.Array
) -> jax.Array:
    """Estimate KL(student || teacher) by log p_S(y) - log p_T(y), stopped.

    Unbiased, for metrics and as a policy-gradient reward (Schulman,
    "Approximating KL divergence", 2020). The expected gradient of k1 as a
    direct loss is zero, so none flows.

    Args:
      student_token_logp: [...] log p_S of tokens that the student sampled;
        -100 stands for smaller ones, of the teacher's too.
      teacher_token_logp: [...] log p_T of the same tokens.

    Returns:
      f32[...] (f64 for f64), nats, stopped.

    Example:
      >>> import jax.numpy as jnp
      >>> round(float(k1(jnp.log(0.5), jnp.log(0.25))), 4)
      0.6931

    See also:
      :func:`k2`, :func:`k3`, and :func:`reverse_kl`, which is exact.
    """
    log_ratio = _log_ratio(student_token_logp, teacher_token_logp)
    return jax.lax.stop_gradient(-log_ratio)


def k2(
    student_token_logp: jax.Array, teacher_token_logp: jax.Array
) -> jax.Array:
    """Estimate KL(student || teacher) by r^2 / 2, r = log p_T(y) - log p_S(y).

    Biased; its direct gradient is in expectation that of reverse KL.

    Args:
      student_token_logp: [...] as in :func:`k1`.
      teacher_token_logp: [...] log p_T of the same tokens.

    Returns:
      f32[...] (f64 for f64), nats.

    Example:
      >>> import jax.numpy as jnp
      >>> round(float(k2(jnp.log(0.5), jnp.log(0.25))), 4)
      0.2402
    """
    return _log_ratio(student_token_logp, teacher_token_logp) ** 2 / 2


def k3(
    student_token_logp: jax.Array, teacher_token_logp: jax.Array
) -> jax.Array:
    """Estimate KL(student || teacher) by exp(r) - 1 - r, as in :func:`k2`.

    Unbiased and never negative. Its *direct* gradient is in expectation that
    of **forward** KL, not of the reverse KL that it estimates.

    Args:
      student_token_logp: [...] as in :func:`k1`; r is capped at 80 in the
        exponential, where float32 ends.
      teacher_token_logp: [...] log p_T of the same tokens.

    Returns:
      f32[...] (f64 for f64), nats.

    Example:
      >>> import jax.numpy as jnp
      >>> round(float(k3(jnp.log(0.5), jnp.log(0.25))), 4)
      0.1931
    """
    log_ratio = _log_ratio(student_token_logp, teacher_token_logp)
    return jnp.expm1(jnp.minimum(log_ratio, _MAX_LOG_RATIO)) - log_ratio

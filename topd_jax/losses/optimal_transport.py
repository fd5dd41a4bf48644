"""How far apart two futures are: optimal transport between their tokens.

Two windows of K tokens start at the same prefix, one written by the student,
one by the teacher. Each is a cloud of token embeddings; the distance is what
it costs to carry one cloud onto the other (arXiv:2606.00305, §3),

    D = min_{g in Pi(a, b)} sum_ij g_ij C_ij,

and the plan ``g`` says which teacher token answers which student token. The
paper leaves open the embedding, the marginals and the solver. Here: cosine
cost, uniform marginals over the tokens that exist, entropic transport
(Sinkhorn, log domain, float32), a small price for moving a token far from its
place, which shapes the plan and is left out of the reported distance.

The plan is data, never differentiated: implicit gradients through Sinkhorn are
NaN where a window is padded. The distance is differentiable in the cost with
the plan held fixed.
"""

import math

import chex
import jax
import jax.numpy as jnp

from topd_jax.types import Windows

_LARGEST_COSINE = 2.0
# Up to here exp(-cost / epsilon), and what iterations multiply it by, are far
# from the ends of float32, 1e-38 and 1e38.
_LARGEST_EXPONENT = 60.0


def cosine_cost(x: jax.Array, y: jax.Array) -> jax.Array:
    """Compute the cosine distance between every pair of vectors.

    ``C_ij = 1 - <x_i, y_j> / (|x_i| |y_j|)``; a zero vector has no direction
    and is at distance 1 from everything. The paper names no cost.

    Args:
      x: float[..., K, D] vectors.
      y: float[..., J, D] vectors.

    Returns:
      f32[..., K, J], 0..2.

    Example:
      >>> import jax.numpy as jnp
      >>> x, y = jnp.array([[1.0, 0.0]]), jnp.array([[0.0, 2.0], [-1.0, 0.0]])
      >>> cosine_cost(x, y).tolist()
      [[1.0, 2.0]]
    """
    # The cost of near-equal vectors is a difference of near-equal numbers:
    # the fast low-precision matmul of accelerators would drown it.
    similarity = jnp.einsum(
        "...kd,...jd->...kj",
        _normalize(x),
        _normalize(y),
        precision=jax.lax.Precision.HIGHEST,
    )
    return jnp.clip(1.0 - similarity, 0.0, 2.0)


def _normalize(x: jax.Array) -> jax.Array:
    """Scale vectors to length one; zero stays zero, with zero gradient."""
    x = x.astype(jnp.float32)
    square = jnp.sum(x * x, axis=-1, keepdims=True)
    exists = square > 1e-30
    scale = jax.lax.rsqrt(jnp.where(exists, square, 1.0))
    return jnp.where(exists, x * scale, 0.0)


def uniform_marginals(mask: jax.Array) -> jax.Array:
    """Put equal mass on each token that exists, 1 in all.

    Args:
      mask: bool[..., K] which tokens exist.

    Returns:
      f32[..., K], each row summing to 1, or to 0 where the mask is empty.

    Example:
      >>> import jax.numpy as jnp
      >>> uniform_marginals(jnp.array([True, True, False])).tolist()
      [0.5, 0.5, 0.0]
    """
    chex.assert_type(mask, bool)
    weight = mask.astype(jnp.float32)
    return weight / jnp.maximum(weight.sum(axis=-1, keepdims=True), 1.0)


def transport(
    cost: jax.Array,
    a: jax.Array,
    b: jax.Array,
    *,
    epsilon: float = 0.05,
    position_weight: float = 0.5,
    max_iterations: int = 200,
    threshold: float = 1e-3,
) -> tuple[jax.Array, jax.Array]:
    """Solve entropic optimal transport: the distance and the plan.

    The plan minimises ``sum_ij g_ij (C_ij + position_weight |i - j| / K) -
    epsilon H(g)`` over plans with marginals ``a`` and ``b``; the distance is
    ``sum_ij g_ij C_ij``, without the position term and without the entropy
    (arXiv:2606.00305, §3, which has neither regularization nor position term).
    Rows of the plan sum to ``a`` exactly, columns to ``b`` within
    ``threshold``. Each problem stops by itself, so a distance does not depend
    on the rest of the batch.

    Args:
      cost: float[..., K, J] ground cost; what it says of padding is ignored.
      a: float[..., K] mass of the rows, 0 on padding, 1 in all.
      b: float[..., J] mass of the columns, 0 on padding, 1 in all.
      epsilon: strength of the entropy, in units of the cost, 0.005..10. Below
        0.01 more iterations are needed.
      position_weight: price of moving a token by a whole window, 0..10;
        beyond, float32 loses the cost beside it.
      max_iterations: of Sinkhorn, rounded up to a multiple of 20. The default
        holds distances of 50-token windows within 0.003 of the converged
        ones, 0.0002 on average.
      threshold: L1 error of the column marginals at which to stop.

    Returns:
      distance f32[...], in the cost's units; plan f32[..., K, J], stopped,
      exactly 0 on padding. A problem with an empty side has distance 0 and an
      empty plan.

    Raises:
      ValueError: shapes that do not fit, or an option out of bounds.

    Example:
      >>> import jax.numpy as jnp
      >>> cost, half = jnp.array([[0.0, 1.0], [1.0, 0.0]]), jnp.full(2, 0.5)
      >>> round(float(transport(cost, half, half)[0]), 4)
      0.0
    """
    return _solve(
        cost, a, b, largest=math.inf, epsilon=epsilon,
        position_weight=position_weight, max_iterations=max_iterations,
        threshold=threshold,
    )  # fmt: skip


def window_distance(
    embedding: jax.Array,
    student_windows: Windows,
    teacher_windows: Windows,
    *,
    epsilon: float = 0.05,
    position_weight: float = 0.5,
    max_iterations: int = 200,
    threshold: float = 1e-3,
) -> tuple[jax.Array, jax.Array]:
    """Compute transport distance and plan between pairs of token windows.

    Tokens are compared by their rows in one embedding table: the student's
    input embeddings, or any other.

    Args:
      embedding: float[V, D] one vector per token id.
      student_windows: tokens and mask [..., M, K].
      teacher_windows: tokens and mask [..., M, J].
      epsilon: of :func:`transport`, like the rest.
      position_weight: price of moving a token by a whole window.
      max_iterations: of Sinkhorn.
      threshold: error at which to stop.

    Returns:
      distance f32[..., M], 0..2; plan f32[..., M, K, J], student tokens by
      teacher tokens.
    """
    cost = cosine_cost(
        embedding[student_windows.tokens], embedding[teacher_windows.tokens]
    )
    return _solve(
        cost,
        uniform_marginals(student_windows.mask),
        uniform_marginals(teacher_windows.mask),
        largest=_LARGEST_COSINE,
        epsilon=epsilon,
        position_weight=position_weight,
        max_iterations=max_iterations,
        threshold=threshold,
    )


def _solve(
    cost: jax.Array,
    a: jax.Array,
    b: jax.Array,
    *,
    largest: float,
    epsilon: float,
    position_weight: float,
    max_iterations: int,
    threshold: float,
) -> tuple[jax.Array, jax.Array]:
    """Compute :func:`transport` of costs that have a bound, or inf."""
    from topd_jax.losses import sinkhorn  # imports ott

    chex.assert_type([cost, a, b], float)
    _check(cost, a, b, epsilon, position_weight, max_iterations)
    cost, a, b = (jnp.asarray(v, jnp.float32) for v in (cost, a, b))
    exists = (a > 0)[..., :, None] & (b > 0)[..., None, :]
    cost = jnp.where(exists, cost, 0.0)
    rows, columns = cost.shape[-2:]
    offset = jnp.abs(jnp.arange(rows)[:, None] - jnp.arange(columns))
    priced = cost + position_weight * offset / rows
    # Columns may be more than rows, and further apart.
    largest += position_weight * max(columns / rows, 1.0)
    plan = sinkhorn.plan(
        jax.lax.stop_gradient(priced),
        jax.lax.stop_gradient(a),
        jax.lax.stop_gradient(b),
        epsilon=epsilon,
        in_logs=largest / epsilon > _LARGEST_EXPONENT,
        max_iterations=max_iterations,
        threshold=threshold,
    )
    plan = jnp.where(exists, plan, 0.0)
    return jnp.sum(plan * cost, axis=(-2, -1)), plan


def _check(
    cost: jax.Array,
    a: jax.Array,
    b: jax.Array,
    epsilon: float,
    position_weight: float,
    max_iterations: int,
) -> None:
    """Raise ValueError for arguments that make no transport problem."""
    if cost.shape[:-1] != a.shape or cost[..., 0, :].shape != b.shape:
        raise ValueError(
            f"cost {cost.shape} needs marginals of shape {cost.shape[:-1]} "
            f"and {cost.shape[:-2] + cost.shape[-1:]}; "
            f"got a {a.shape} and b {b.shape}"
        )
    if not 0.005 <= epsilon <= 10:
        raise ValueError(
            f"epsilon={epsilon} must lie in 0.005..10, in units of the cost; "
            "try 0.05"
        )
    if not 0 <= position_weight <= 10:
        raise ValueError(
            f"position_weight={position_weight} must lie in 0..10; "
            "0 switches the position term off"
        )
    if max_iterations < 1:
        raise ValueError(
            f"max_iterations={max_iterations} must be at least 1; try 200"
        )

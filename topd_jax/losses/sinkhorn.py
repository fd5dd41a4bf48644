"""Sinkhorn's iterations for a batch of small transport problems, by ott.

Apart from :mod:`~topd_jax.losses.optimal_transport` because importing ott takes
a second, and most of the package does without it.
"""

import functools

import jax
import jax.numpy as jnp
from ott.geometry import geometry
from ott.problems.linear import linear_problem
from ott.solvers.linear import sinkhorn

# Mass that stands for none. log(0) would breed inf - inf in the potentials;
# 1e-30 is invisible beside any real mass and is cut from the plan at the end.
_NO_MASS = 1e-30
# Iterations between two looks at the error.
_BLOCK = 20


@jax.tree_util.register_pytree_node_class
class _Kernel(geometry.Geometry):
    """A geometry whose kernel is computed once, not at every iteration."""

    def apply_kernel(
        self, vec: jax.Array, eps: float | None = None, axis: int = 0
    ) -> jax.Array:
        """Return kernel or, for axis 0, its transpose times vec: f32[n]."""
        kernel = self.kernel_matrix.T if axis == 0 else self.kernel_matrix
        return jnp.matmul(kernel, vec, precision=jax.lax.Precision.HIGHEST)


# One compilation a shape, also for callers outside of any jit.
@functools.partial(jax.jit, static_argnames="in_logs")
def plan(
    cost: jax.Array,
    a: jax.Array,
    b: jax.Array,
    *,
    epsilon: float,
    in_logs: bool,
    max_iterations: int,
    threshold: float,
) -> jax.Array:
    """Compute the entropic plan of every problem.

    ott's own stopping rule, once batched, computes the error at every
    iteration (four times slower here): blocks of a fixed number of its
    iterations are run on the whole batch, and finished problems are held.

    Args:
      cost: f32[..., K, J].
      a: f32[..., K] mass of the rows, 0 on padding.
      b: f32[..., J] mass of the columns, 0 on padding.
      epsilon: strength of the entropy, in units of the cost.
      in_logs: needed where exp(-cost / epsilon) is near the ends of float32;
        eight times slower (64 problems of 9 x 9 on a CPU), the same plan to
        1e-6.
      max_iterations: rounded up to a multiple of 20.
      threshold: L1 error of the column marginals at which to stop.

    Returns:
      f32[..., K, J]; what it says of padding means nothing.
    """
    block = jnp.vectorize(
        functools.partial(_block, epsilon=epsilon, in_logs=in_logs),
        signature="(k,j),(k),(j),(k),(j)->(k),(j),()",
    )
    solvable = (a.sum(axis=-1) > 0) & (b.sum(axis=-1) > 0)
    a, b = jnp.maximum(a, _NO_MASS), jnp.maximum(b, _NO_MASS)
    blocks = -(-max_iterations // _BLOCK)

    def unfinished(state: tuple) -> jax.Array:
        done, _, _, error = state
        return (done < blocks) & jnp.any(error > threshold)

    def advance(state: tuple) -> tuple:
        done, f, g, error = state
        new_f, new_g, new_error = block(cost, a, b, f, g)
        live = error > threshold
        return (
            done + 1,
            jnp.where(live[..., None], new_f, f),
            jnp.where(live[..., None], new_g, g),
            jnp.where(live, new_error, error),
        )

    # Half-empty problems never converge: they count as finished.
    error = jnp.where(solvable, jnp.inf, 0.0).astype(cost.dtype)
    error = jnp.broadcast_to(error, cost.shape[:-2])
    start = (0, jnp.zeros_like(cost[..., 0]), jnp.zeros_like(cost[..., 0, :]))
    _, f, g, _ = jax.lax.while_loop(unfinished, advance, (*start, error))
    return jnp.exp((f[..., :, None] + g[..., None, :] - cost) / epsilon)


def _block(
    cost: jax.Array,
    a: jax.Array,
    b: jax.Array,
    f: jax.Array,
    g: jax.Array,
    *,
    epsilon: float,
    in_logs: bool,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Run a fixed number of iterations of one problem from potentials."""
    solver = sinkhorn.Sinkhorn(
        lse_mode=in_logs,
        min_iterations=_BLOCK,
        max_iterations=_BLOCK,
        inner_iterations=_BLOCK,
        threshold=0.0,
        implicit_diff=None,
    )
    if in_logs:
        geom = geometry.Geometry(cost_matrix=cost, epsilon=epsilon)
        start = (f, g)
    else:  # from the potentials on, so that the factors begin at 1
        kernel = jnp.exp((f[:, None] + g - cost) / epsilon)
        geom = _Kernel(kernel_matrix=kernel, epsilon=epsilon)
        start = (jnp.ones_like(f), jnp.ones_like(g))
    out = solver(linear_problem.LinearProblem(geom, a, b), init=start)
    new_f, new_g = out.potentials
    if not in_logs:
        new_f, new_g = f + new_f, g + new_g
    # Under jax_enable_x64 the errors are wider than the problem.
    return new_f, new_g, out.errors[-1].astype(cost.dtype)

"""Stage 1's step, against the dense losses."""

import jax
import jax.numpy as jnp
import numpy as np
from conftest import make_model
from small_step import SGD, assert_trees_close, gradient, logp_of

from topd_jax.data.packing import rows_of
from topd_jax.losses import divergences, log_probs
from topd_jax.training.sft import read_rows, sft_step
from topd_jax.training.step import init_state
from topd_jax.types import Teacher


def test_it_is_dense_forward_kl_and_cross_entropy(trajectories):
    """Of two teachers, each on its own rows; one mean over all tokens."""
    student, *models = (make_model(seed, layers=1) for seed in range(3))
    teachers = Teacher(models[0], "a", 1), Teacher(models[1], "b", 3)

    @jax.jit
    @jax.value_and_grad
    def dense(model):
        total = 0.0
        for (begin, end), own in zip(((0, 2), (2, 8)), teachers, strict=True):
            rows = jax.tree.map(lambda x, s=slice(begin, end): x[s],
                                trajectories)  # fmt: skip
            logp = logp_of(model, rows)
            kl = divergences.forward_kl(logp, logp_of(own.model, rows))
            nll = -log_probs.token_logprobs(logp, rows.tokens)
            total += jnp.sum((0.25 * kl + 0.75 * nll) * rows.mask)
        return total / trajectories.mask.sum()

    @jax.jit
    def learn(student, teachers, rows):
        return sft_step(
            init_state(student, SGD), rows,
            read_rows(student, teachers, rows, slices=2), kd_ratio=0.25,
            optimizer=SGD, accumulate=2,
        )  # fmt: skip

    loss, grads = dense(student)
    state, metrics = learn(student, teachers, rows_of(trajectories))
    np.testing.assert_allclose(metrics["loss"][0], loss, rtol=1e-5)
    assert_trees_close(gradient(student, state), grads, atol=1e-5)
    assert metrics["divergence"][1] == trajectories.mask.sum()

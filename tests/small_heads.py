"""Small states and heads, and the dense losses that fused ones must equal."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from topd_jax.losses import divergences, fused

B, T, V, D, E = 2, 7, 33, 8, 12
SHAPE = (B, T)

DENSE = {
    "reverse_kl": divergences.reverse_kl,
    "forward_kl": divergences.forward_kl,
    "jsd": functools.partial(divergences.generalized_jsd, beta=0.25),
}


def heads(shape=SHAPE, vocab=(V, V), dtype=jnp.float32, seed=0):
    rng = np.random.default_rng(seed)
    shapes = [(*shape, D), (vocab[0], D), (*shape, E), (vocab[1], E)]
    return tuple(jnp.asarray(rng.normal(size=s), dtype) for s in shapes)


def weights_of(shape=SHAPE, seed=5):
    weights = np.random.default_rng(seed).uniform(0, 2, shape)
    return jnp.asarray(np.where(weights < 0.4, 0, weights), jnp.float32)


def logp(hidden, head, temperature=1.0):
    logits = jnp.matmul(hidden, head.T, precision="highest")
    return divergences.log_softmax(logits / temperature)


def dense(name, arrays, temperature=1.0):
    student, teacher = (
        logp(*arrays[:2], temperature),
        logp(*arrays[2:], temperature),
    )
    return DENSE[name](student, teacher)


def gradients(loss, arrays):
    """Value, auxiliary and gradients to the student's states and head."""
    return jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(*arrays)


def assert_close(got, want, tolerance=2e-5):
    for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert g.shape == w.shape
        assert g.dtype == w.dtype
        w = np.asarray(w, np.float64)
        scale = max(np.abs(w).max(), 1e-3)
        np.testing.assert_allclose(
            np.asarray(g, np.float64), w, tolerance, tolerance * scale
        )


def both_faces(arrays, weights, **options):
    """The weighted sum, token losses and gradients, each way."""

    def recomputed(*arrays):
        per_token = fused.fused_divergence(*arrays, **options)
        return jnp.sum(weights * per_token), per_token

    def in_forward(*arrays):
        return fused.fused_weighted_sum(*arrays, weights=weights, **options)

    return gradients(recomputed, arrays), gradients(in_forward, arrays)

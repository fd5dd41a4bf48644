"""Small states and heads, and the dense losses that fused ones must equal."""

import functools

import jax
import jax.extend.core as jex
import jax.numpy as jnp
import numpy as np
from numpy.testing import assert_allclose

from topd_jax.losses import divergences, fused, log_probs
from topd_jax.types import head_cap, head_rows, soft_cap

B, T, V, D, E = 2, 7, 33, 8, 12
SHAPE = (B, T)

jsd = functools.partial(divergences.generalized_jsd, beta=0.25)


def heads(shape=SHAPE, vocab=(V, V), dtype=jnp.float32, seed=0):
    rng = np.random.default_rng(seed)
    shapes = [(*shape, D), (vocab[0], D), (*shape, E), (vocab[1], E)]
    return tuple(jnp.asarray(rng.normal(size=s), dtype) for s in shapes)


def weights_of(shape=SHAPE, seed=5):
    weights = np.random.default_rng(seed).uniform(0, 2, shape)
    return jnp.asarray(np.where(weights < 0.4, 0, weights), jnp.float32)


def logp(hidden, head, temperature=1.0):
    logits = jnp.matmul(hidden, head_rows(head).T, precision="highest")
    return log_probs.log_softmax(soft_cap(logits, head_cap(head)) / temperature)


def dense(loss, arrays, temperature=1.0):
    return loss(*(logp(*arrays[i : i + 2], temperature) for i in (0, 2)))


def gradients(loss, arrays):
    """Value, auxiliary and gradients to the student's states and head."""
    return jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(*arrays)


def dense_gradients(loss, arrays, weights, temperature=1.0):
    """What :func:`both_faces` must give."""

    def total(*arrays):
        per_token = dense(loss, arrays, temperature)
        return jnp.sum(weights * per_token), per_token

    return gradients(total, arrays)


def both_faces(arrays, weights, token_loss=divergences.reverse_kl, **options):
    """The weighted sum, token losses and gradients, each way."""

    def recomputed(*arrays):
        per_token = fused.fused_divergence(*arrays, token_loss, **options)
        # Selected as the weighted sum does: 0 * NaN would be NaN.
        counted = jnp.where(weights != 0, weights * per_token, 0)
        return jnp.sum(counted), per_token

    def in_forward(*arrays):
        return fused.fused_weighted_sum(*arrays, weights, token_loss, **options)

    return gradients(recomputed, arrays), gradients(in_forward, arrays)


def equations(jaxpr):
    for eqn in jaxpr.eqns:
        yield eqn
        for sub in jex.jaxprs_in_params(eqn.params):
            yield from equations(sub)


def traced(fn, *args):
    """All equations of a function, those inside others too."""
    return list(equations(jax.make_jaxpr(fn)(*args).jaxpr))


def assert_close(got, want, tolerance=2e-5):
    for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert g.shape == w.shape
        assert g.dtype == w.dtype
        w = np.asarray(w, np.float64)
        scale = max(np.abs(w).max(initial=0), 1e-3)
        assert_allclose(
            np.asarray(g, np.float64), w, tolerance, tolerance * scale
        )

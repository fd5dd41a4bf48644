"""Rollouts, branches and gradients where jax_enable_x64 is set."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import EOS, PAD, VOCAB, make_model, make_trajectories
from jax.test_util import check_grads
from test_branch import look_ahead

from topd_jax.models import causal_mask, from_function
from topd_jax.sampling import rollout
from topd_jax.types import Candidates, Prompts


def mean_of_visible(params, tokens, positions, mask, cache):
    weights = mask / mask.sum(-1, keepdims=True)
    return jnp.tanh(weights.astype(params.dtype) @ params[tokens]), None


def models():
    rows = np.random.default_rng(0).normal(size=(VOCAB, 6))
    rows = jnp.asarray(rows, jnp.float32)
    return {
        "decoder": make_model(0, layers=1),
        "function": from_function(mean_of_visible, rows, head=lambda p: p),
    }


def written_by(model, length):
    """A rollout, and branches that leave it."""
    prompts = make_trajectories(rows=3)
    rows = rollout(
        model, Prompts(prompts.prompt, prompts.prompt_mask),
        jax.random.key(1), max_new_tokens=length, eos_ids=(EOS,), pad_id=PAD,
        top_p=0.9,
    )  # fmt: skip
    candidates = Candidates(
        jnp.array([[0, 1], [2, 0], [1, 2]]), jnp.ones((3, 2), bool)
    )
    windows, _ = look_ahead(
        model, rows, candidates, length=4, eos_ids=(EOS,), temperature=1.0,
        key=jax.random.key(2),
    )  # fmt: skip
    return rows, windows


# 128 tokens are the fewest for which the cache grows.
@pytest.mark.parametrize(
    ("name", "length"), [("decoder", 8), ("function", 128)]
)
def test_rollouts_and_branches_are_the_same(name, length):
    want = written_by(models()[name], length)
    with jax.enable_x64(True):
        got = written_by(models()[name], length)
    for a, b in zip(*map(jax.tree.leaves, (got, want)), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


def test_a_model_in_float64_has_exact_gradients():
    with jax.enable_x64(True):
        rows = np.random.default_rng(0).normal(size=(VOCAB, 6))
        model = from_function(
            mean_of_visible, jnp.asarray(rows), head=lambda p: p
        )
        written = make_trajectories(rows=3)

        def loss(params):
            hidden, _ = model.replace(params=params)(
                written.sequence, written.positions,
                causal_mask(written.sequence_mask),
            )  # fmt: skip
            return jnp.sum(jnp.sin(hidden))

        check_grads(loss, (model.params,), order=1, modes=["rev"], rtol=1e-7)

"""Any function (params, tokens, positions, mask, cache) learns and teaches."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import VOCAB, make_trajectories
from flax import nnx
from foreign_model import apply, init_params, make_foreign, words
from small_step import IDS, gradient, scores, step

from topd_jax.losses import divergences
from topd_jax.models import (
    causal_mask,
    fingerprint,
    from_function,
    in_compute_dtype,
    unembed,
)
from topd_jax.models.passes import trajectory_states
from topd_jax.sampling import rollout
from topd_jax.types import Prompts, completion_states

TOPD = "topd(candidates=2, window=4)"


@pytest.fixture(scope="module")
def foreign():
    return make_foreign()


states = jax.jit(trajectory_states)


def prompts_of(rows):
    return Prompts(rows.prompt, rows.prompt_mask)


def greedy(model, prompts, length, **options):
    return rollout(
        model, prompts, jax.random.key(0), max_new_tokens=length,
        temperature=0.0, **(IDS | options),
    )  # fmt: skip


def test_gradient_is_that_of_the_dense_loss(foreign, student):
    rows = make_trajectories(rows=3)
    state, _ = step(foreign, student, rows)

    def dense(params):
        mask = causal_mask(rows.sequence_mask)
        hidden, _ = apply(params, rows.sequence, rows.positions, mask, None)
        hidden = completion_states(hidden, rows.prompt.shape[1])
        kl = divergences.reverse_kl(
            jax.nn.log_softmax(unembed(words(params), hidden)),
            jax.nn.log_softmax(unembed(student.head, states(student, rows))),
        )
        return divergences.weighted_mean(kl, mask=rows.mask)

    expected = jax.jit(jax.grad(dense))(foreign.params)
    assert float(optax.tree.norm(expected)) > 0.05
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5),
        gradient(foreign, state).params,
        expected,
    )


def test_a_cache_of_ones_own_is_used():
    """Keys of one layer, mean-pooled: written in place, never read again.

    Two heads of each row are rows of the cache.
    """
    rng = np.random.default_rng(0)
    params = {
        "rows": jnp.asarray(rng.normal(size=(VOCAB, 6)), jnp.float32),
        "head": jnp.asarray(rng.normal(size=(6, VOCAB)), jnp.float32),
    }

    def pooled(params, tokens, positions, mask, cache):
        x = params["rows"][tokens] * (1.0 + 0.1 * positions[..., None])
        if cache is not None:
            at, kept = cache
            heads = x.reshape(*x.shape[:2], 2, 3).swapaxes(1, 2)
            heads = heads.reshape(-1, x.shape[1], 3)
            kept = jax.lax.dynamic_update_slice_in_dim(kept, heads, at, 1)
            cache = at + tokens.shape[1], kept
            x = kept.reshape(len(x), 2, -1, 3).swapaxes(1, 2)
            x = x.reshape(len(x), -1, 6)
        seen = mask.astype(x.dtype)
        total = jnp.maximum(seen.sum(-1, keepdims=True), 1.0)
        return jnp.tanh(seen @ x / total), cache

    def empty(batch, columns):
        return jnp.zeros((), jnp.int32), jnp.zeros((2 * batch, columns, 3))

    options = dict(head=lambda p: p["head"].T, embedding=lambda p: p["rows"])
    kept = from_function(pooled, params, init_cache=empty, **options)
    again = from_function(pooled, params, **options)
    assert kept.embedding.shape == (VOCAB, 6)
    prompts = prompts_of(make_trajectories(rows=3))
    one, two = (greedy(m, prompts, 12, samples=2) for m in (kept, again))
    np.testing.assert_array_equal(one.tokens, two.tokens)
    a, b = (scores(again, m, one, TOPD)[0] for m in (kept, again))
    np.testing.assert_array_equal(
        a.teacher_windows.tokens, b.teacher_windows.tokens
    )


def test_padding_that_attends_to_nothing_stays_finite():
    """A softmax over -inf alone would spread NaN to every later layer."""

    def strict(params, tokens, positions, mask, cache):
        x = params[tokens]
        for _ in range(2):
            logits = jnp.where(mask, x @ x.swapaxes(1, 2), -jnp.inf)
            x = x + jax.nn.softmax(logits, axis=-1) @ x
        return x, None

    rows = jax.random.normal(jax.random.key(0), (VOCAB, 4))
    model = from_function(strict, rows, head=lambda rows: rows)
    state, metrics = step(model, model, make_trajectories(rows=3), TOPD)
    assert float(metrics["skipped"][0]) == 0
    assert np.isfinite(state.student.params).all()


def test_fingerprint_is_of_the_parameters(foreign):
    assert fingerprint(foreign) == fingerprint(make_foreign(0))
    assert fingerprint(foreign) != fingerprint(make_foreign(1))
    assert in_compute_dtype(foreign) is foreign
    # A teacher has leaves of any type; nnx keeps the key of its dropout.
    others = [
        fingerprint({"drop": jax.random.key(0), "flags": jnp.array(flags)})
        for flags in ([True, False], [False, True])
    ] + [fingerprint({"drop": jax.random.key(1), "flags": jnp.array([True])})]
    assert len(set(others)) == 3
    turns = {fingerprint({"turns": jnp.array([1 + s * 1j])}) for s in (1, -1)}
    assert len(turns) == 2
    with jax.enable_x64(True):
        wide = {fingerprint({"w": jnp.array([x])}) for x in (1, 1.0, 1 + 1e-12)}
    assert len(wide) == 3


def test_an_nnx_module_writes_past_its_first_columns():
    """Of 128 tokens: columns grow once. Two samples repeat the rows."""

    class Bag(nnx.Module):
        def __init__(self, rngs):
            self.rows = nnx.Embed(VOCAB, 6, rngs=rngs)
            self.out = nnx.Linear(6, VOCAB, use_bias=False, rngs=rngs)

    def read(bag, tokens, positions, mask, cache):
        words = bag.rows(tokens) * jnp.cos(positions)[..., None]
        return jnp.sin(mask.astype(jnp.float32) @ words), None

    bag = from_function(
        read, Bag(nnx.Rngs(0)), head=lambda bag: bag.out.kernel[...].T
    )
    prompts = prompts_of(make_trajectories(rows=2, prompt=3))
    rows = greedy(bag, prompts, 128, samples=2, eos_ids=())
    likeliest = unembed(bag.head, states(bag, rows)).argmax(-1)
    np.testing.assert_array_equal(rows.tokens, likeliest)
    np.testing.assert_array_equal(rows.tokens[0], rows.tokens[1])
    assert (rows.tokens[0] != rows.tokens[2]).any()
    assert len(np.unique(rows.tokens[0])) > 10


def not_of_rows(params, tokens, positions, mask, cache):
    raise TypeError(f"mask has 2 dimensions, not {mask.ndim}")


def shrunk(params, tokens, positions, mask, cache):
    return apply(params, tokens, positions, mask[..., :2], None)


@pytest.mark.parametrize(
    ("function", "options", "message"),
    [
        (apply, dict(head=lambda p: words(p)[0]), r"head\(.* has shape \(12,"),
        (apply, dict(embedding=lambda p: words(p).reshape(-1)),
         r"embedding\(params\) has shape \(480,\)"),
        (apply, dict(head=lambda p: words(p).T), r"must .*shape=\(1, 2, 40\)"),
        (lambda p, *_: words(p), {}, "must return .hidden, cache. ="),
        (apply, dict(logical_axes={"embedding": ("vocab", "embed")}),
         "'embedding' with 2 axes, which is no parameter"),
        (apply, dict(logical_axes={"words/embedding": ("vocab",)}),
         "'words/embedding' with 1 axes"),
        (not_of_rows, {}, r"a batch of rows \(mask has 2 dimensions"),
        (lambda p, *rest: (apply(p, *rest)[0][0], None), {},
         r"\(2, 12\).* must return .*shape=\(1, 2, 12\)"),
        (shrunk, dict(init_cache=lambda *shape: jnp.zeros(shape, jnp.int32)),
         "the cache that it was given"),
    ],
)  # fmt: skip
def test_a_function_that_does_not_fit_is_refused(function, options, message):
    with pytest.raises(ValueError, match=message):
        from_function(function, init_params(0), **({"head": words} | options))

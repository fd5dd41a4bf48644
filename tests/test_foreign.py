"""Any function (params, tokens, positions, mask, cache) learns and teaches."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import EOS, PAD, VOCAB, make_model, make_trajectories
from foreign_model import apply, init_params, make_foreign, words

from topd_jax.evaluation.metrics import statistics
from topd_jax.losses import divergences
from topd_jax.models import (
    causal_mask,
    fingerprint,
    from_function,
    in_compute_dtype,
    unembed,
)
from topd_jax.objectives.objective import Objective
from topd_jax.sampling import branch, branch_columns, rollout
from topd_jax.sampling.layerwise import add_columns, repeat_rows
from topd_jax.training import checkpointing
from topd_jax.training.step import annotate, init_state, update
from topd_jax.types import Candidates, Prompts, completion_states

IDS = dict(eos_ids=(EOS,), pad_id=PAD)
K = 4


@pytest.fixture(scope="module")
def foreign():
    return make_foreign()


@pytest.fixture(scope="module")
def decoder():
    return make_model(1, layers=2, width=24)


def prompts_of(written):
    return Prompts(written.prompt, written.prompt_mask)


@jax.jit
def states(model, written):
    """[B, T, D] of a plain reading, without a cache."""
    mask = causal_mask(written.sequence_mask)
    hidden, _ = model(written.sequence, written.positions, mask)
    return completion_states(hidden, written.prompt.shape[1])


def annotated(student, teacher, written, objective):
    read = functools.partial(annotate, objective=objective, **IDS)
    return jax.jit(read)(student, teacher, written, jax.random.key(0))


def updating(objective, optimizer):
    return jax.jit(
        functools.partial(update, objective=objective, optimizer=optimizer)
    )


def greedy(model, prompts, length):
    return rollout(
        model, prompts, jax.random.key(0), max_new_tokens=length,
        temperature=0.0, **IDS,
    )  # fmt: skip


def test_greedy_rollout_is_the_argmax_of_a_full_reading(foreign):
    prompts = prompts_of(make_trajectories(rows=5))
    written = greedy(foreign, prompts, 9)
    likeliest = unembed(foreign.head, states(foreign, written)).argmax(-1)
    np.testing.assert_array_equal(
        written.tokens[written.mask], likeliest[written.mask]
    )
    assert len(np.unique(written.tokens)) > 3


def test_positions_and_mask_are_heard(foreign):
    written = make_trajectories()
    plain = states(foreign, written)
    moved = written.replace(prompt_mask=jnp.ones_like(written.prompt_mask))
    assert np.abs(plain - states(foreign, moved)).max() > 1e-2
    other = written.replace(prompt=jnp.where(written.prompt_mask,
                                             written.prompt, 7))  # fmt: skip
    np.testing.assert_array_equal(plain, states(foreign, other))


def test_samples_and_growing_columns_keep_rows_apart(foreign):
    """128 tokens grow the columns once; two samples repeat the rows."""
    ids = dict(eos_ids=(), pad_id=PAD)
    prompts = prompts_of(make_trajectories(rows=2, prompt=3))
    long = from_function(
        lambda p, tokens, positions, mask, cache: apply(
            p, tokens, positions % 64, mask, None
        ),
        init_params(0),
        head=words,
    )
    written = rollout(
        long, prompts, jax.random.key(0), max_new_tokens=128, samples=2,
        temperature=0.0, **ids,
    )  # fmt: skip
    likeliest = unembed(long.head, states(long, written)).argmax(-1)
    np.testing.assert_array_equal(written.tokens, likeliest)
    np.testing.assert_array_equal(written.tokens[0], written.tokens[1])
    assert (written.tokens[0] != written.tokens[2]).any()


@pytest.mark.parametrize("name", ["foreign", "decoder"])
def test_cache_helpers_find_rows_and_columns(name, request):
    model = request.getfixturevalue(name)
    cache = model.init_cache(2, 3)
    wide = jax.tree.leaves(jax.eval_shape(lambda: model.init_cache(2, 5)))
    tall = jax.tree.leaves(jax.eval_shape(lambda: model.init_cache(6, 3)))
    grown = jax.tree.leaves(add_columns(model, cache, 2))
    repeated = jax.tree.leaves(repeat_rows(model, cache, 3))
    assert [x.shape for x in grown] == [x.shape for x in wide]
    assert [x.shape for x in repeated] == [x.shape for x in tall]


def test_branch_equals_re_prefill(foreign):
    written = make_trajectories(rows=4, completion=9)
    candidates = Candidates(
        jnp.array([[0, 2, 3], [1, 2, 3], [0, 1, 3], [2, 0, 0]]),
        jnp.array([[1, 1, 1], [1, 1, 1], [1, 1, 1], [1, 0, 0]], bool),
    )
    extra = branch_columns(3, K)
    rows, columns = written.sequence.shape
    hidden, cache = jax.jit(type(foreign).__call__)(
        foreign,
        written.sequence,
        written.positions,
        jnp.pad(
            causal_mask(written.sequence_mask), ((0, 0), (0, 0), (0, extra))
        ),
        foreign.init_cache(rows, columns + extra),
    )
    hidden = completion_states(hidden, written.prompt.shape[1])
    np.testing.assert_allclose(hidden, states(foreign, written), atol=1e-5)
    windows = branch(
        foreign, cache, hidden, written, candidates, length=K, **IDS
    )
    for b, m in np.argwhere(np.asarray(candidates.mask)):
        end = int(candidates.positions[b, m])
        text = jnp.concatenate(
            [written.prompt[b][written.prompt_mask[b]], written.tokens[b, :end]]
        )[None]
        alone = greedy(foreign, Prompts(text, jnp.ones_like(text, bool)), K)
        np.testing.assert_array_equal(windows.tokens[b, m], alone.tokens[0])
        np.testing.assert_array_equal(windows.mask[b, m], alone.mask[0])


@pytest.mark.parametrize(
    ("roles", "context"),
    [
        ("foreign learns", "teacher"),
        ("foreign teaches", "student"),
    ],
)
def test_a_step_lowers_the_loss(foreign, decoder, roles, context):
    student, teacher = {
        "foreign learns": (foreign, decoder),
        "foreign teaches": (decoder, foreign),
    }[roles]
    objective = Objective(candidates=2, window=K, context=context)
    written = make_trajectories(rows=4)
    notes = jax.jit(functools.partial(annotate, objective=objective, **IDS))(
        student, teacher, written, jax.random.key(0)
    )
    assert notes.teacher_hidden.shape[-1] == teacher.head.shape[1]
    assert bool(notes.divergent.any())
    optimizer = optax.adam(3e-3)
    learn = updating(objective, optimizer)
    state, seen = init_state(student, optimizer), []
    for _ in range(8):
        state, metrics = learn(state, teacher.head, written, notes)
        seen.append(float(metrics["loss"][0]))
    assert int(state.skipped) == 0
    assert seen[-1] < seen[0] - 0.1, seen
    watched = jax.jit(statistics)(state.student, teacher, written)
    total, count = watched["reverse_kl"]
    assert np.isfinite(total / count)


def test_gradient_is_that_of_the_dense_loss(foreign, decoder):
    written = make_trajectories(rows=3)
    objective = Objective(variant="opd")
    notes = annotated(foreign, decoder, written, objective)
    optimizer = optax.sgd(1.0)
    state, _ = updating(objective, optimizer)(
        init_state(foreign, optimizer), decoder.head, written, notes
    )

    def by_hand(params):
        mask = causal_mask(written.sequence_mask)
        hidden, _ = apply(
            params, written.sequence, written.positions, mask, None
        )
        hidden = completion_states(hidden, written.prompt.shape[1])
        kl = divergences.reverse_kl(
            divergences.log_softmax(unembed(words(params), hidden)),
            divergences.log_softmax(
                unembed(decoder.head, states(decoder, written))
            ),
        )
        return divergences.weighted_mean(kl, mask=written.mask)

    wanted = jax.jit(jax.grad(by_hand))(foreign.params)
    moved = jax.tree.map(
        lambda a, b: a - b, foreign.params, state.student.params
    )
    assert float(optax.tree.norm(wanted)) > 0.05
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5),
        moved,
        wanted,
    )


def test_a_cache_of_ones_own_is_used(foreign):
    """Keys of one layer, mean-pooled: written in place, never read again."""
    rng = np.random.default_rng(0)
    params = {
        "rows": jnp.asarray(rng.normal(size=(VOCAB, 6)), jnp.float32),
        "head": jnp.asarray(rng.normal(size=(6, VOCAB)), jnp.float32),
    }

    def pooled(params, tokens, positions, mask, cache):
        x = params["rows"][tokens] * (1.0 + 0.1 * positions[..., None])
        if cache is not None:
            at, kept = cache
            kept = jax.lax.dynamic_update_slice_in_dim(kept, x, at, 1)
            x, cache = kept, (at + tokens.shape[1], kept)
        seen = mask.astype(x.dtype)
        total = jnp.maximum(seen.sum(-1, keepdims=True), 1.0)
        return jnp.tanh(seen @ x / total), cache

    def empty(batch, columns):
        return jnp.zeros((), jnp.int32), jnp.zeros((batch, columns, 6))

    options = dict(head=lambda p: p["head"].T, embedding=lambda p: p["rows"])
    kept = from_function(pooled, params, init_cache=empty, **options)
    again = from_function(pooled, params, **options)
    assert kept.embedding.shape == (VOCAB, 6)
    prompts = prompts_of(make_trajectories(rows=3))
    one, two = (greedy(m, prompts, 12) for m in (kept, again))
    np.testing.assert_array_equal(one.tokens, two.tokens)
    objective = Objective(candidates=2, window=K)
    one, two = (annotated(again, m, one, objective) for m in (kept, again))
    np.testing.assert_array_equal(
        one.teacher_windows.tokens, two.teacher_windows.tokens
    )


def test_padding_that_sees_nothing_stays_finite():
    """A softmax over -inf alone would spread nan to every later layer."""

    def strict(params, tokens, positions, mask, cache):
        x = params[tokens]
        for _ in range(2):
            scores = jnp.where(mask, x @ x.swapaxes(1, 2), -jnp.inf)
            x = x + jax.nn.softmax(scores, axis=-1) @ x
        return x, None

    rows = jax.random.normal(jax.random.key(0), (VOCAB, 4))
    model = from_function(strict, rows, head=lambda rows: rows)
    written = make_trajectories(rows=3)
    objective = Objective(candidates=2, window=K)
    notes = annotated(model, model, written, objective)
    optimizer = optax.sgd(0.1)
    state, metrics = updating(objective, optimizer)(
        init_state(model, optimizer), model.head, written, notes
    )
    assert float(metrics["skipped"][0]) == 0
    assert np.isfinite(state.student.params).all()


def test_state_comes_back_from_a_checkpoint(foreign, tmp_path):
    optimizer = optax.adam(1e-3)
    state = init_state(foreign, optimizer)
    saved = checkpointing.Checkpoints(tmp_path, 1)
    saved.save(3, state, jax.random.key(5), {"data": {}})
    blank = init_state(make_foreign(9), optimizer)
    found, key = saved.restore(3, blank)
    saved.close()
    assert jax.random.key_data(key).tolist() == [0, 5]
    jax.tree.map(np.testing.assert_array_equal, found, state)
    written = make_trajectories(rows=2)
    np.testing.assert_array_equal(
        states(found.student, written), states(foreign, written)
    )


def test_fingerprint_is_of_the_parameters(foreign):
    assert fingerprint(foreign) == fingerprint(make_foreign(0))
    assert fingerprint(foreign) != fingerprint(make_foreign(1))
    assert in_compute_dtype(foreign) is foreign


def test_an_nnx_module_is_its_own_parameters():
    from flax import nnx

    class Bag(nnx.Module):
        def __init__(self, rngs):
            self.rows = nnx.Embed(VOCAB, 6, rngs=rngs)
            self.out = nnx.Linear(6, VOCAB, use_bias=False, rngs=rngs)

    def read(bag, tokens, positions, mask, cache):
        seen = mask.astype(jnp.float32)
        return jnp.tanh(seen @ bag.rows(tokens)), None

    bag = from_function(
        read, Bag(nnx.Rngs(0)), head=lambda bag: bag.out.kernel[...].T
    )
    prompts = prompts_of(make_trajectories(rows=2))
    written = greedy(bag, prompts, 5)
    likeliest = unembed(bag.head, states(bag, written)).argmax(-1)
    np.testing.assert_array_equal(
        written.tokens[written.mask], likeliest[written.mask]
    )

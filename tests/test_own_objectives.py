"""A step on a researcher's own pieces equals dense computations by hand."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import make_trajectories
from numpy.testing import assert_allclose
from small_step import IDS, SGD, logp_of

import topd_jax as topd


@functools.partial(jax.jit, static_argnames="make")
def step(student, teachers, trajectories, make):
    """(scores, metrics, gradient): SGD at rate 1 subtracts the gradient."""
    objective = make()
    scored = topd.score(
        student, teachers, trajectories, jax.random.key(3),
        objective=objective, **IDS,
    )  # fmt: skip
    state, metrics = topd.train_step(
        topd.init_state(student, SGD), trajectories, scored,
        objective=objective, optimizer=SGD,
    )  # fmt: skip
    gradient = jax.tree.map(jnp.subtract, student, state.student)
    return scored, metrics, gradient


def assert_step_is(dense, student, got):
    """A step's loss and gradient are those of a dense function."""
    _, metrics, gradient = got
    value, want = jax.jit(jax.value_and_grad(dense))(student)
    assert_allclose(metrics["loss"][0], value, rtol=1e-4)
    assert max(np.abs(g).max() for g in jax.tree.leaves(want)) > 1e-3
    jax.tree.map(
        lambda a, b: assert_allclose(a, b, 2e-3, 2e-5),
        gradient, want,
    )  # fmt: skip


def signed(student_logp, teacher_logp, tokens, uniforms, power=2.0):
    """A token loss that names what it needs."""
    gap = topd.token_logprobs(student_logp, tokens) - topd.token_logprobs(
        teacher_logp, tokens
    )
    return (1 + uniforms) * jnp.abs(gap) ** power


@topd.row_wise
def late(student_entropy, mask, **unused):
    """A weight of each row by itself."""
    weights = student_entropy * jnp.arange(mask.shape[1])
    return jnp.where(mask, weights, jnp.nan)  # nor does this one


def best(student_logp, teacher_logp):
    """A statistic."""
    return jnp.max(jnp.exp(teacher_logp), axis=-1)


def relative(best, token_loss, mask):
    """A weight that needs the whole batch."""
    weights = best / topd.weighted_mean(token_loss, mask=mask)
    return jnp.where(mask, weights, jnp.nan)  # says nothing of padding


def own():
    return topd.Objective(
        signed, token_weights=(late, relative), statistics={"best": best}
    )


def test_pieces_of_ones_own_train(student, teacher, trajectories):
    run = step(student, (topd.Teacher(teacher),), trajectories, own)
    (scored,), mask = run[0], trajectories.mask
    np.testing.assert_array_equal(scored.weights * ~mask, jnp.zeros(mask.shape))
    t = logp_of(teacher, trajectories)

    def token_loss(s):
        gap = topd.token_logprobs(s, trajectories.tokens)
        gap -= topd.token_logprobs(t, trajectories.tokens)
        return (1 + scored.uniforms) * gap**2

    s = logp_of(student, trajectories)
    each = token_loss(s)
    average = jnp.sum(jnp.where(mask, each, 0)) / mask.sum()
    fixed = topd.entropy(s) * jnp.arange(mask.shape[1])
    fixed *= jnp.exp(t).max(-1) / average

    def dense(model):
        each = token_loss(logp_of(model, trajectories))
        return topd.weighted_mean(each, fixed, mask)

    assert_step_is(dense, student, run)
    total, count = run[1]["divergence"]
    assert_allclose(total / count, average, rtol=1e-4)


def by_position(candidates, mask, student_windows):
    """A detector: futures part where a window is cut short."""
    missing = jnp.sum(~student_windows.mask, axis=-1)
    return topd.Detection(missing.astype(jnp.float32))


def surest(tokens, token_loss, mask):
    """A ranking."""
    return -token_loss


def parting(candidates, divergent):
    """A selection for weights."""
    return candidates.mask & divergent


@topd.row_wise
def doubled(selected, candidates, mask):
    at = topd.scatter_to_tokens(candidates, selected, mask.shape[1])
    return mask * (1.0 + at)


def pull(student_hidden, student_head, candidates, tokens, layout):
    """A guidance: -log p_S(y_t) at each candidate."""
    logp = topd.fused_token_logprobs(
        student_hidden, student_head, tokens, layout=layout
    )
    return -jnp.take_along_axis(logp, candidates.positions, axis=1)


def ahead():
    near_future = topd.NearFuture(
        4, window=5, threshold=0.0, ranking=surest, detector=by_position,
        select=parting,
    )  # fmt: skip
    return topd.Objective(
        token_weights=(doubled,), near_future=near_future,
        guidance=topd.Guidance(pull, weight=0.3),
    )  # fmt: skip


def test_a_near_future_of_ones_own_trains(student, teacher, trajectories):
    bound = topd.Objective(token_weights=(functools.partial(late),))
    assert bound.row_weights  # a mark is seen through a partial
    whole = topd.row_wise(functools.partial(lambda mask, by: by * mask, by=2))
    assert topd.Objective(token_weights=(whole,)).row_weights  # and on one
    assert not ahead().needs_branches  # nobody names the teacher's windows
    run = step(student, (topd.Teacher(teacher),), trajectories, ahead)
    (scored,), mask = run[0], np.asarray(trajectories.mask)
    t = logp_of(teacher, trajectories)
    loss = np.asarray(topd.reverse_kl(logp_of(student, trajectories), t))
    want, points = mask * 1.0, []
    for b, row in enumerate(mask):
        length = row.sum()
        for m, at in enumerate(sorted(np.argsort(loss[b, :length])[:4])):
            assert scored.candidates.positions[b, m] == at
            assert scored.divergent[b, m] == (at + 5 > length)
            if at + 5 > length:
                want[b, at] = 2
                points.append((b, at))
    assert 0 < len(points) < scored.candidates.mask.sum()

    def dense(model):
        s = logp_of(model, trajectories)
        rows, columns = np.transpose(points)
        logp = topd.token_logprobs(s, trajectories.tokens)[rows, columns]
        each = topd.reverse_kl(s, t)
        return topd.weighted_mean(each, want, mask) - 0.3 * logp.mean()

    assert_step_is(dense, student, run)


def bare(candidates):
    """No detector: distances alone."""
    return candidates.mask * 1.0


def planless(candidates):
    """A detector that makes no plan."""
    return topd.Detection(bare(candidates))


def test_what_a_detector_does_not_make_is_refused(student, teacher):
    plan = "detector makes none; take detector="
    with pytest.raises(ValueError, match=plan):
        topd.make_objective("topd(context='student', detector='future_loss')")
    missing = ":bare returned .* must return a topd_jax.Detection"
    for detector, text in ((planless, plan), (bare, missing)):
        ahead = topd.NearFuture(detector=detector)
        make = functools.partial(
            topd.topd, near_future=ahead, context="student"
        )
        with pytest.raises(ValueError, match=text):
            step(student, (topd.Teacher(teacher),), make_trajectories(2), make)

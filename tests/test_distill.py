"""The two pure steps, against dense and naive computations of the same."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import EOS, PAD, make_model, make_trajectories

from topd_jax.losses import divergences, near_future
from topd_jax.models import causal_mask, unembed
from topd_jax.objectives.objective import VARIANTS, Objective
from topd_jax.training.step import annotate, init_state, update
from topd_jax.types import Trajectories, completion_states

IDS = {"eos_ids": (EOS,), "pad_id": PAD}
SGD = optax.sgd(1.0)
BASE = Objective(candidates=3, window=4, guidance_weight=0.3)


def objective(**changes: object) -> Objective:
    return dataclasses.replace(BASE, **changes)


# Compiled once an objective: run op by op, every op compiles on its own.
@functools.partial(jax.jit, static_argnames=("goal", "seed"))
def notes_of(student, teacher, trajectories, goal, seed=3):
    return annotate(
        student, teacher, trajectories, jax.random.key(seed),
        objective=goal, **IDS,
    )  # fmt: skip


@jax.jit
def logp_of(model, trajectories):
    hidden, _ = model(
        trajectories.sequence,
        trajectories.positions,
        causal_mask(trajectories.sequence_mask),
    )
    states = completion_states(hidden, trajectories.prompt.shape[1])
    return jax.nn.log_softmax(unembed(model.head, states))


@functools.partial(jax.jit, static_argnames=("goal", "accumulate"))
def step(student, teacher, trajectories, goal, **options):
    notes = notes_of(student, teacher, trajectories, goal)
    state = init_state(student, SGD)
    return update(
        state, teacher.head, trajectories, notes,
        objective=goal, optimizer=SGD, **options,
    )  # fmt: skip


def gradient(before, after):
    """SGD at rate 1 subtracts the gradient itself."""
    return jax.tree.map(lambda a, b: a - b, before, after.student)


def assert_trees_close(a, b, **tolerance):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, **tolerance)


def test_opd_is_the_dense_reverse_kl(student, teacher, trajectories):
    def dense(model):
        values = divergences.reverse_kl(
            logp_of(model, trajectories), logp_of(teacher, trajectories)
        )
        return divergences.weighted_mean(values, mask=trajectories.mask)

    loss, grads = jax.jit(jax.value_and_grad(dense))(student)
    state, metrics = step(
        student, teacher, trajectories, objective(variant="opd")
    )
    np.testing.assert_allclose(metrics["loss"][0], loss, rtol=1e-5)
    assert_trees_close(gradient(student, state), grads, atol=1e-5)
    total, count = metrics["divergence"]
    np.testing.assert_allclose(total / count, loss, rtol=1e-5)
    assert count == trajectories.mask.sum()


def test_teacher_token_loss_is_naive(student, teacher, trajectories):
    notes = notes_of(student, teacher, trajectories, BASE)
    logp = logp_of(teacher, trajectories)
    expected = -np.take_along_axis(
        np.asarray(logp), np.asarray(trajectories.tokens)[..., None], -1
    )[..., 0]
    np.testing.assert_allclose(
        notes.teacher_token_loss,
        np.where(trajectories.mask, expected, 0.0),
        rtol=1e-4,
        atol=1e-5,
    )


def test_teacher_context_is_the_naive_branch(student, teacher, trajectories):
    """Each branch read on its own, without the other columns."""
    goal = objective()
    notes = notes_of(student, teacher, trajectories, goal)

    rows = []  # (tokens read, tokens followed) of each branch, on its own
    for b, m in np.argwhere(np.asarray(notes.divergent)):
        t = int(notes.candidates.positions[b, m])
        prompt = trajectories.prompt[b][trajectories.prompt_mask[b]]
        valid = np.asarray(notes.teacher_windows.mask[b, m])
        window = np.asarray(notes.teacher_windows.tokens[b, m])[valid]
        read = np.concatenate([prompt, trajectories.tokens[b, :t]])
        rows.append((read, window))
    width = max(len(r) + len(w) for r, w in rows)
    tokens = np.zeros((len(rows), width), np.int32)
    share = np.zeros((len(rows), width))  # of each token in its row's mean
    for i, (read, window) in enumerate(rows):
        end = len(read) + len(window)
        tokens[i, :end] = np.concatenate([read, window])
        share[i, len(read) : end] = 1 / len(window)

    @jax.jit
    def naive(model):
        positions = jnp.broadcast_to(jnp.arange(width), tokens.shape)
        mask = causal_mask(jnp.ones(tokens.shape, bool))
        hidden, _ = model(jnp.asarray(tokens), positions, mask)
        logp = jax.nn.log_softmax(unembed(model.head, hidden))[:, :-1]
        chosen = jnp.take_along_axis(logp, tokens[:, 1:, None], -1)[..., 0]
        return -jnp.sum(chosen * share[:, 1:]) / len(rows)

    value, grads = jax.value_and_grad(naive)(student)
    led, metrics = step(student, teacher, trajectories, goal)
    plain, _ = step(student, teacher, trajectories, objective(variant="opd"))
    total, count = metrics["guidance"]
    np.testing.assert_allclose(total / count, value, rtol=1e-5)
    difference = jax.tree.map(
        lambda a, b: (a - b) / goal.guidance_weight,
        plain.student,
        led.student,
    )
    assert_trees_close(difference, grads, atol=2e-5)


def test_student_context_is_the_naive_target(student, teacher, trajectories):
    """Targets from the plan, spelt out over the whole vocabulary."""
    goal = objective(context="student")
    notes = notes_of(student, teacher, trajectories, goal)
    logp = np.asarray(logp_of(student, trajectories), np.float64)
    per_point = []
    for b, m in np.argwhere(np.asarray(notes.divergent)):
        t = int(notes.candidates.positions[b, m])
        ours = np.asarray(notes.student_windows.mask[b, m])
        theirs = np.asarray(notes.teacher_windows.tokens[b, m])
        plan = np.asarray(notes.plan[b, m], np.float64)
        values = []
        for i in np.flatnonzero(ours):
            target = np.zeros(logp.shape[-1])
            np.add.at(target, theirs, plan[i] / plan[i].sum())
            if i == 0:
                target = np.eye(len(target))[theirs[0]]
            kept = target > 0
            values.append(
                np.sum(
                    target[kept] * (np.log(target[kept]) - logp[b, t + i][kept])
                )
            )
        per_point.append(np.mean(values))
    _, metrics = step(student, teacher, trajectories, goal)
    total, count = metrics["guidance"]
    np.testing.assert_allclose(total / count, np.mean(per_point), rtol=1e-4)


# Of every kind of piece one; the others take as long and are slow.
QUICK = ("topd+suppress", "tip", "offline")


@pytest.mark.parametrize(
    "variant",
    [
        pytest.param(v, marks=() if v in QUICK else pytest.mark.slow)
        for v in (*VARIANTS, "offline")
    ],
)
def test_accumulation_changes_nothing(student, teacher, trajectories, variant):
    goal = objective(
        **({"stage": variant} if variant == "offline" else {"variant": variant})
    )
    whole, metrics = step(student, teacher, trajectories, goal)
    parts, again = step(student, teacher, trajectories, goal, accumulate=4)
    np.testing.assert_allclose(metrics["loss"][0], again["loss"][0], rtol=1e-5)
    assert_trees_close(whole.student, parts.student, atol=1e-5)


def test_rows_must_divide(student, teacher, trajectories):
    with pytest.raises(ValueError, match="8 rows .* accumulate=3"):
        step(student, teacher, trajectories, BASE, accumulate=3)


def test_padding_changes_nothing(student, teacher, trajectories):
    def wider(x, left, right):
        return jnp.pad(x, ((0, 0), (left, right)))

    padded = Trajectories(
        prompt=wider(trajectories.prompt, 3, 0),
        prompt_mask=wider(trajectories.prompt_mask, 3, 0),
        tokens=wider(trajectories.tokens, 0, 4),
        mask=wider(trajectories.mask, 0, 4),
        logp=wider(trajectories.logp, 0, 4),
        truncated=trajectories.truncated,
    )
    narrow, metrics = step(student, teacher, trajectories, BASE)
    wide, again = step(student, teacher, padded, BASE)
    np.testing.assert_allclose(metrics["loss"][0], again["loss"][0], rtol=1e-5)
    assert_trees_close(narrow.student, wide.student, atol=1e-5)


def test_a_student_like_its_teacher_has_nothing_to_learn(student, trajectories):
    _, metrics = step(student, student, trajectories, objective(variant="opd"))
    assert abs(float(metrics["loss"][0])) < 1e-6


def test_offline_is_dense_forward_kl_and_cross_entropy(
    student, teacher, trajectories
):
    goal = objective(stage="offline", kd_ratio=0.25)

    def dense(model):
        ours = logp_of(model, trajectories)
        theirs = logp_of(teacher, trajectories)
        values = 0.25 * divergences.forward_kl(
            ours, theirs
        ) + 0.75 * divergences.cross_entropy(ours, trajectories.tokens)
        return divergences.weighted_mean(values, mask=trajectories.mask)

    loss, grads = jax.jit(jax.value_and_grad(dense))(student)
    state, metrics = step(student, teacher, trajectories, goal)
    np.testing.assert_allclose(metrics["loss"][0], loss, rtol=1e-5)
    assert_trees_close(gradient(student, state), grads, atol=1e-5)


@pytest.mark.parametrize(
    "branch_loss",
    [pytest.param("forward_kl", marks=pytest.mark.slow), "reverse_kl"],
)
def test_branch_divergences_need_the_teachers_states(
    student, teacher, trajectories, branch_loss
):
    goal = objective(branch_loss=branch_loss)
    notes = notes_of(student, teacher, trajectories, goal)
    assert notes.teacher_window_hidden is not None
    _, metrics = step(student, teacher, trajectories, goal)
    assert float(metrics["guidance"][0]) > 0
    _, same = step(student, student, trajectories, goal)
    assert abs(float(same["guidance"][0])) < 1e-4


def test_what_is_not_finite_is_skipped(teacher, trajectories):
    broken = jax.tree.map(lambda x: x, make_model(0))
    broken.final_norm[...] = broken.final_norm[...].at[0].set(jnp.nan)
    state, metrics = step(
        broken, teacher, trajectories, objective(variant="opd")
    )
    assert metrics["skipped"][0] == 1
    assert state.skipped == 1
    assert state.step == 1
    assert_trees_close(state.student, broken)


def test_masks_of_the_variants(student, teacher):
    many = make_trajectories(rows=16)
    notes = notes_of(student, teacher, many, objective(variant="opd+suppress"))
    used = np.asarray(notes.candidates.mask)
    divergent = np.asarray(notes.divergent)
    false_alarm = np.asarray(notes.false_alarm)
    assert divergent.any()
    assert false_alarm.any()
    assert not (divergent & false_alarm).any()
    np.testing.assert_array_equal(divergent | false_alarm, used)
    np.testing.assert_array_equal(notes.capped, false_alarm)
    control = notes_of(
        student, teacher, many, objective(variant="opd+suppress_control")
    )
    capped = np.asarray(control.capped)
    assert capped.sum() == min(false_alarm.sum(), divergent.sum())
    assert not (capped & ~divergent).any()


def test_opd_does_not_look_ahead(student, teacher, trajectories):
    notes = notes_of(student, teacher, trajectories, objective(variant="opd"))
    assert notes.candidates is None
    assert notes.plan is None


def test_an_empty_batch_is_finite(student, teacher, trajectories):
    empty = trajectories.replace(mask=jnp.zeros_like(trajectories.mask))
    for context in ("teacher", "student"):
        state, metrics = step(
            student, teacher, empty, objective(context=context)
        )
        assert metrics["skipped"][0] == 0
        assert float(metrics["loss"][0]) == 0
        assert_trees_close(state.student, student)


def test_bad_objectives_are_refused():
    with pytest.raises(ValueError, match="variant='opdd'.*one of opd"):
        Objective(variant="opdd")
    with pytest.raises(ValueError, match="window=0.*at least 1"):
        Objective(window=0)
    with pytest.raises(ValueError, match="percentile=101"):
        Objective(percentile=101.0)


def test_future_losses_detect_without_branches(student, teacher, trajectories):
    goal = objective(variant="opd+suppress", detector="future_loss")
    notes = notes_of(student, teacher, trajectories, goal)
    assert notes.teacher_windows is None and notes.plan is None
    found = notes.candidates
    want = near_future.future_loss(
        notes.teacher_token_loss, trajectories.mask, found, length=goal.window
    )
    np.testing.assert_allclose(notes.distance, want, rtol=1e-6)
    assert jnp.array_equal(
        notes.divergent, near_future.divergence_mask(want, found)
    )
    assert notes.divergent.any() and notes.capped.any()
    _, metrics = step(student, teacher, trajectories, goal)
    total, count = metrics["distance"]
    assert total == pytest.approx(float(jnp.sum(want)), rel=1e-5)
    assert count == found.mask.sum()


def test_guidance_needs_branches_whatever_detects(
    student, teacher, trajectories
):
    goal = objective(variant="topd", detector="future_loss")
    notes = notes_of(student, teacher, trajectories, goal)
    assert notes.plan is None
    by_transport = notes_of(student, teacher, trajectories, objective())
    assert_trees_close(
        notes.teacher_windows, by_transport.teacher_windows, atol=0
    )
    _, metrics = step(student, teacher, trajectories, goal)
    assert metrics["guidance"][0] > 0
    with pytest.raises(ValueError, match="no transport plan .*'student'"):
        objective(detector="future_loss", context="student")

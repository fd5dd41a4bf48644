"""What teachers say of trajectories: losses, candidates, futures, masks."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import make_trajectories
from small_step import AHEAD, TOPD, assert_trees_equal, logp_of, scores

from topd_jax.losses import near_future

EVERY = f"topd({AHEAD}, branch_fraction=1.0)"
PLAIN = f"suppress({AHEAD}, detector='future_loss')"  # without branches


def test_every_teacher_reads_its_own_rows(student, teachers, trajectories):
    """Its token loss is the naive one, and other rows do not change it."""
    scored = scores(student, teachers, trajectories, PLAIN)
    for notes, teacher, rows in zip(
        scored, teachers, (slice(0, 2), slice(2, 8)), strict=True
    ):
        part = jax.tree.map(lambda x, r=rows: x[r], trajectories)
        logp = logp_of(teacher.model, part)
        naive = -jnp.take_along_axis(logp, part.tokens[..., None], -1)[..., 0]
        np.testing.assert_allclose(
            notes.teacher_token_loss, jnp.where(part.mask, naive, 0.0),
            rtol=1e-4, atol=1e-5,
        )  # fmt: skip
        assert notes.teacher == teacher.name
    mixed = jax.tree.map(
        lambda a, b: jnp.concatenate([a[:2], b[2:]]),
        trajectories, make_trajectories(seed=7),
    )  # fmt: skip
    again = scores(student, teachers, mixed, PLAIN)
    assert_trees_equal(scored[0], again[0])
    assert (scored[1].teacher_token_loss != again[1].teacher_token_loss).any()


def test_rows_must_divide_by_the_teachers_prompts(student, teachers):
    with pytest.raises(ValueError, match=r"6 rows.*code: 1, math: 3"):
        scores(student, teachers, make_trajectories(rows=6))


def test_candidates_are_divergent_or_false_alarms(student, teacher):
    """What is selected without a control, the golden numbers have."""
    many = make_trajectories(rows=16)
    short = many.mask.at[0].set(many.mask[0] & (jnp.arange(12) < 2))
    many = many.replace(mask=short)  # fewer tokens than candidates
    (control,) = scores(student, teacher, many, f"suppress_control({AHEAD})")
    divergent, false_alarm = control.divergent, control.false_alarm
    assert divergent.any() and false_alarm.any()
    assert not (divergent & false_alarm).any()
    np.testing.assert_array_equal(
        divergent | false_alarm, control.candidates.mask
    )
    assert control.selected.sum() == min(false_alarm.sum(), divergent.sum())
    assert not (control.selected & ~control.divergent).any()


def test_guidance_looks_at_the_candidates_of_highest_future_loss(
    student, teacher, trajectories
):
    """Of whom is said what is said among all."""
    (some,) = scores(student, teacher, trajectories, TOPD)
    (every,) = scores(student, teacher, trajectories, EVERY)
    assert some.teacher_windows.tokens.shape == (8, 1, 4)  # a third
    assert some.teacher_window_hidden is None  # nobody asked for them
    future = near_future.future_loss(
        every.teacher_token_loss, trajectories.mask, every.candidates, length=4
    )
    best = jnp.argmax(
        jnp.where(every.candidates.mask, future, -jnp.inf), axis=1
    )[:, None]
    pick = functools.partial(jnp.take_along_axis, indices=best, axis=1)
    np.testing.assert_array_equal(
        some.candidates.positions, pick(every.candidates.positions)
    )
    np.testing.assert_allclose(
        some.distance, pick(every.distance), rtol=1e-4, atol=1e-5
    )


def test_guidance_needs_branches_whatever_detects(
    student, teacher, trajectories
):
    text = EVERY[:-1] + ", detector='future_loss')"
    (notes,) = scores(student, teacher, trajectories, text)
    (usual,) = scores(student, teacher, trajectories, EVERY)
    assert notes.plan is None
    assert_trees_equal(notes.teacher_windows, usual.teacher_windows)
    expected = near_future.future_loss(
        notes.teacher_token_loss, trajectories.mask, notes.candidates, length=4
    )
    np.testing.assert_allclose(notes.distance, expected, rtol=1e-6)
    mask = near_future.divergence_mask(expected, notes.candidates)
    np.testing.assert_array_equal(notes.divergent, mask)
    assert mask.any() and notes.false_alarm.any()

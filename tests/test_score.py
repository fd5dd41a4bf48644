"""What teachers say of trajectories: losses, candidates, futures, masks."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import make_trajectories
from small_step import (
    assert_trees_equal,
    logp_of,
    scores,
    step,
)

from topd_jax.losses import near_future

AHEAD = "candidates=3, window=4"


def test_every_teacher_reads_its_own_rows(student, teachers, trajectories):
    """Its token loss is the naive one, and other rows do not change it."""
    scored = scores(student, teachers, trajectories, f"topd({AHEAD})")
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
    again = scores(student, teachers, mixed, f"topd({AHEAD})")
    assert_trees_equal(scored[0], again[0])
    assert (scored[1].teacher_token_loss != again[1].teacher_token_loss).any()


def test_rows_must_divide_by_the_teachers_prompts(student, teachers):
    with pytest.raises(ValueError, match=r"6 rows.*code: 1, math: 3"):
        scores(student, teachers, make_trajectories(rows=6))


def test_candidates_are_divergent_or_false_alarms(student, teacher):
    many = make_trajectories(rows=16)
    (notes,) = scores(student, teacher, many, f"suppress({AHEAD})")
    divergent, false_alarm = notes.divergent, notes.false_alarm
    assert divergent.any() and false_alarm.any()
    assert not (divergent & false_alarm).any()
    np.testing.assert_array_equal(
        divergent | false_alarm, notes.candidates.mask
    )
    np.testing.assert_array_equal(notes.selected, false_alarm)
    (control,) = scores(student, teacher, many, f"suppress_control({AHEAD})")
    assert control.selected.sum() == min(false_alarm.sum(), divergent.sum())
    assert not (control.selected & ~control.divergent).any()


def test_opd_does_not_look_ahead(student, teacher, trajectories):
    (notes,) = scores(student, teacher, trajectories)
    assert notes.candidates is None and notes.plan is None


def test_future_losses_detect_without_branches(student, teacher, trajectories):
    text = f"suppress({AHEAD}, detector='future_loss')"
    (notes,) = scores(student, teacher, trajectories, text)
    assert notes.teacher_windows is None and notes.plan is None
    expected = near_future.future_loss(
        notes.teacher_token_loss, trajectories.mask, notes.candidates, length=4
    )
    np.testing.assert_allclose(notes.distance, expected, rtol=1e-6)
    mask = near_future.divergence_mask(expected, notes.candidates)
    np.testing.assert_array_equal(notes.divergent, mask)
    assert mask.any() and notes.selected.any()
    _, metrics = step(student, teacher, trajectories, text)
    total, count = metrics["distance"]
    assert total == pytest.approx(float(jnp.sum(expected)), rel=1e-5)
    assert count == notes.candidates.mask.sum()


def test_guidance_looks_at_the_candidates_of_highest_future_loss(
    student, teacher, trajectories
):
    """A third by default, of whom is said what is said among all."""
    (some,) = scores(student, teacher, trajectories, f"topd({AHEAD})")
    for text in ("topd({}, context='student')", "topd_suppress({})"):
        (whole,) = scores(student, teacher, trajectories, text.format(AHEAD))
        assert whole.candidates.mask.shape == (8, 3)
    (every,) = scores(
        student, teacher, trajectories, f"topd({AHEAD}, branch_fraction=1.0)"
    )
    assert some.teacher_windows.tokens.shape == (8, 1, 4)
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
    text = f"topd({AHEAD}, detector='future_loss')"
    (notes,) = scores(student, teacher, trajectories, text)
    (usual,) = scores(student, teacher, trajectories, f"topd({AHEAD})")
    assert notes.plan is None
    assert_trees_equal(notes.teacher_windows, usual.teacher_windows)
    _, metrics = step(student, teacher, trajectories, text)
    assert metrics["guidance"][0] > 0
    with pytest.raises(ValueError, match="plan and its detector makes none"):
        scores(
            student, teacher, trajectories,
            f"topd({AHEAD}, detector='future_loss', context='student')",
        )  # fmt: skip


def test_only_branch_divergences_keep_the_states_along_branches(
    student, teacher, trajectories
):
    for loss, kept in (("cross_entropy", False), ("reverse_kl", True)):
        text = f"topd({AHEAD}, branch_loss='{loss}')"
        (notes,) = scores(student, teacher, trajectories, text)
        assert (notes.teacher_window_hidden is not None) == kept

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


def test_every_teacher_reads_its_own_rows(student, teachers, trajectories):
    """Its token loss is the naive one, and other rows do not change it."""
    scored = scores(student, teachers, trajectories, TOPD)
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
    again = scores(student, teachers, mixed, TOPD)
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


@pytest.mark.parametrize(
    ("text", "looks", "keeps"),
    [
        ("opd", None, False),
        ("topd({})", (8, 1), False),  # a third
        ("topd({}, branch_loss='reverse_kl')", (8, 1), True),
        ("topd({}, context='student')", (8, 3), False),
        ("topd_suppress({})", (8, 3), False),
        ("suppress({}, detector='future_loss')", (8, 3), False),
    ],
)
def test_how_far_an_objective_looks(
    student, teacher, trajectories, text, looks, keeps
):
    """Candidates by default, and the states along branches where needed."""
    (notes,) = jax.eval_shape(
        functools.partial(scores, objective=text.format(AHEAD)),
        student, teacher, trajectories,
    )  # fmt: skip
    assert (notes.candidates and notes.candidates.mask.shape) == looks
    assert (notes.teacher_window_hidden is not None) == keeps
    branches = text != "opd" and "future_loss" not in text
    assert (notes.teacher_windows is not None) == branches


def test_guidance_looks_at_the_candidates_of_highest_future_loss(
    student, teacher, trajectories
):
    """Of whom is said what is said among all."""
    (some,) = scores(student, teacher, trajectories, TOPD)
    (every,) = scores(student, teacher, trajectories, EVERY)
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

"""Alarms: each has its name, and none is raised by a healthy run."""

import json

import jax.numpy as jnp
import pytest

from topd_jax.evaluation.metrics import repeated_tokens
from topd_jax.training.config import GuardSettings
from topd_jax.training.logging import read_jsonl
from topd_jax.training.watch import Watch

GOOD = {
    "loss": 1.0, "grad_norm": 2.0, "skipped": 0.0, "num_tokens": 64.0,
    "length_mean": 8.0, "truncated": 0.25, "teacher_token_loss": 3.0,
    "repetition": 0.1, "student_entropy": 1.5, "teacher_entropy": 2.5,
}  # fmt: skip


def watch(max_skipped=1):
    return Watch(GuardSettings(window=3, factor=5.0), max_skipped)


def names(watching, *rows):
    """The alarms of the last of these rows."""
    for step, changes in enumerate(rows, start=1):
        alarms = watching.look(step, GOOD | changes)
    return [a.name for a in alarms]


@pytest.mark.parametrize(
    ("changes", "alarms"),
    [
        ({}, []),
        ({"loss": 4.9, "grad_norm": 9.9, "truncated": 0.7}, []),
        ({"loss": 5.1}, ["loss_spike"]),
        ({"loss": -5.1}, ["loss_spike"]),
        ({"grad_norm": 10.1}, ["gradient_spike"]),
        ({"loss": None, "skipped": 1.0}, ["non_finite"]),
        ({"truncated": 0.8}, ["truncation"]),
        ({"repetition": 0.7}, ["repetition"]),
        ({"student_entropy": 0.4}, ["entropy_collapse"]),
        ({"student_entropy": 0.4, "teacher_entropy": 1.9}, []),
        ({"length_mean": 1.0}, ["all_eos"]),
        ({"num_tokens": 0.0, "loss": 0.0, "length_mean": 0.0}, ["no_tokens"]),
        ({"teacher_token_loss": None}, ["teacher_impossible"]),
        ({"teacher_token_loss": 1e28}, ["teacher_impossible"]),
    ],
)
def test_every_alarm_has_a_name(changes, alarms):
    assert names(watch(), {}, {}, {}, changes) == alarms


def test_a_loss_is_compared_with_the_last_steps_a_length_with_the_first():
    falling = [{"loss": 2.0**-i, "grad_norm": 2.0**-i} for i in range(12)]
    assert names(watch(), *falling) == []
    assert names(watch(), *falling, {}) == ["loss_spike", "gradient_spike"]
    rising = [{"truncated": i / 10, "loss": 1 + i / 9} for i in range(10)]
    assert names(watch(), *rising) == ["truncation"]
    # With too little behind it nothing is unusual; that is not learned from.
    assert names(watch(), {}, {}, {"loss": 99.0, "repetition": 1.0}) == []
    assert names(watch(), {}, {}, {}, {"loss": None}, {"loss": 6.0}) == [
        "loss_spike"
    ]


@pytest.mark.parametrize(
    ("name", "alarm"), [("loss", "loss_spike"), ("grad_norm", "gradient_spike")]
)
def test_a_few_large_numbers_among_many_small_ones_are_usual(name, alarm):
    rows = [{name: 6.0 if i % 5 == 0 else 1.0} for i in range(20)]
    for value, alarms in ((12.0, []), (31.0, [alarm])):
        watching = Watch(GuardSettings(window=20, factor=5.0), 1)
        assert names(watching, *rows, {name: value}) == alarms


def test_only_the_first_alarm_of_a_name_is_told():
    watching = watch()
    names(watching, {}, {"length_mean": 1.0}, {"length_mean": 1.0})
    (alarm,) = watching.fresh
    assert (alarm.step, alarm.name) == (2, "all_eos")
    assert watching.counts == {"all_eos": 2}


def test_a_watch_goes_on_from_a_checkpoint():
    whole, half = watch(), watch()
    rows = [{"loss": 1.0 + i, "length_mean": 1.0} for i in range(5)]
    assert names(whole, *rows) == names(half, *rows) == ["all_eos"]
    again = watch()
    again.set_state(json.loads(json.dumps(half.state)))
    assert names(again, {"loss": 25.0}) == names(whole, {"loss": 25.0})
    assert again.state == whole.state
    assert [a.name for a in again.fresh] == ["loss_spike"]


@pytest.mark.parametrize(
    ("skipped", "most", "hopeless_at"),
    [((1, 0, 1, 1, 0), 1, 4), ((0, 1), 0, 2), ((1, 0, 1, 0, 1), 1, None)],
)
def test_skipped_updates_are_counted_in_a_row(skipped, most, hopeless_at):
    watching, seen = watch(most), None
    for step, value in enumerate(skipped, start=1):
        watching.look(step, GOOD | {"skipped": float(value)})
        if watching.hopeless and seen is None:
            seen = step
    assert seen == hopeless_at and watching.hopeless == (seen is not None)


def test_tokens_that_go_round_in_a_loop_are_counted():
    rows = jnp.array(
        [
            [1, 2, 3, 4, 5, 6, 7, 8],  # none
            [9, 9, 9, 9, 9, 9, 9, 9],  # all but the first two
            [1, 2, 3, 1, 2, 3, 1, 0],  # the fifth and the two after it
            [1, 2, 1, 3, 1, 4, 1, 5],  # one token that comes again is none
        ]
    )
    counts = [repeated_tokens(r[None], r[None] > 0) for r in rows]
    assert counts == [0, 6, 3, 0]
    assert repeated_tokens(rows, rows > 0) == 9
    assert repeated_tokens(rows, rows < 0) == 0
    assert repeated_tokens(rows, rows > 0, longest=2) == 6


def test_a_healthy_run_raises_no_alarm(trained):
    assert read_jsonl(trained / "alarms.jsonl") == []
    # What alarms are raised from is in every line of a run that looks at it.
    plain, _, timed, *_ = read_jsonl(trained / "metrics.jsonl")
    assert GOOD.keys() <= timed.keys()
    entropies = {"student_entropy", "teacher_entropy"}
    assert GOOD.keys() - plain.keys() == entropies

"""Local corrections: each from the same start, on its own window alone."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import EOS, PAD, make_model, make_trajectories
from matplotlib import image
from small_run import settings_with
from small_step import logp_of

from topd_jax.experiments import local_correction
from topd_jax.experiments.divergent_points import choose
from topd_jax.experiments.local_correction import (
    correct_points,
    methods_of,
    report,
)
from topd_jax.experiments.observe import Observed
from topd_jax.losses.divergences import reverse_kl, weighted_mean
from topd_jax.losses.log_probs import token_logprobs
from topd_jax.losses.optimal_transport import window_distance
from topd_jax.losses.trajectory import trajectory_loss, trajectory_targets
from topd_jax.models.config import Lora
from topd_jax.models.lora import add_lora
from topd_jax.objectives import presets
from topd_jax.objectives.objective import NearFuture
from topd_jax.sampling import rollout
from topd_jax.training.score import score
from topd_jax.training.step import init_state, train_step
from topd_jax.types import Candidates, Scored, Teacher, Trajectories, Windows

K = 4
WEIGHT = 0.7
AHEAD = presets.suppress(near_future=NearFuture(window=K, candidates=3))
RUN = presets.topd(guidance_weight=WEIGHT)
METHODS = methods_of(RUN, AHEAD)
TEACHER, STUDENT = "topd", "topd(context='student')"
IDS = dict(eos_ids=(EOS,), pad_id=PAD)
ADAM = optax.adam(1e-2)
OPTIONS = dict(optimizer=ADAM, **IDS)
UPDATES = 60  # enough to write what the teacher writes


@pytest.fixture(scope="module")
def student():
    return make_model(0, layers=1)


@pytest.fixture(scope="module")
def reader():
    return Teacher(make_model(1, layers=1, width=24))


@pytest.fixture(scope="module")
def points(student, reader):
    def batches():
        written = make_trajectories(rows=6)
        read = jax.jit(functools.partial(score, objective=AHEAD, **IDS))
        scored = read(student, (reader,), written, jax.random.key(1))
        yield Observed([], *jax.device_get((written, list(scored))))
        raise AssertionError("one was enough")

    return choose(batches(), 3, PAD)


@pytest.fixture(scope="module")
def measured(student, reader, points):
    methods = {name: METHODS[name] for name in ("opd", TEACHER)}
    return local_correction.measure(
        student, reader, points, methods, UPDATES, **OPTIONS
    )


@jax.jit
def write(model, prefix):
    """What a model writes greedily after prefixes."""
    written = rollout(
        model, prefix, jax.random.key(3), max_new_tokens=K, temperature=0.0,
        **IDS,
    )  # fmt: skip
    return Windows(written.tokens, written.mask)


@pytest.fixture(scope="module")
def begun(student, points):
    """What the student writes before any correction."""
    return write(student, points.prefix)


def correction(objective, **options):
    """(student, teacher, points, updates) -> what corrections return."""
    options = OPTIONS | options
    return jax.jit(
        functools.partial(correct_points, objective=objective, **options)
    )


def one(points, i):
    """The point at i alone, on the device."""
    return jax.tree.map(lambda x: jnp.asarray(x[i : i + 1]), points)


def window_of(windows, i):
    return windows.tokens[i][windows.mask[i]].tolist()


def slot(positions, distance, divergent):
    """One trajectory's candidates, each position's own window, any plan."""
    count = len(positions)
    shape = (1, count, K)
    tokens = np.broadcast_to(np.array(positions)[:, None], shape)
    own = Windows(tokens, np.ones(shape, bool))
    return Scored(
        None, None, None,
        candidates=Candidates(np.array([positions]), np.ones((1, count), bool)),
        student_windows=own,
        teacher_windows=own,
        distance=np.array([distance], np.float32),
        plan=np.zeros((1, count, K, K), np.float32),
        divergent=np.array([divergent]),
    )  # fmt: skip


@pytest.mark.parametrize(("truncated", "at"), [(False, 7), (True, 3)])
def test_the_farthest_divergent_point_is_chosen(truncated, at):
    written = jax.device_get(make_trajectories(rows=1, completion=12))
    # Nine tokens: K of them follow 3, not 7. 5 is farther, but no fork.
    written = written.replace(
        mask=np.arange(12)[None] < 9, truncated=np.array([truncated])
    )
    scored = slot([1, 3, 5, 7], [0.2, 0.4, 0.9, 0.6], [True, True, False, True])
    points = choose([Observed([], written, [scored])], 5, PAD)
    assert len(points.distance) == 1
    assert points.distance[0] == pytest.approx({3: 0.4, 7: 0.6}[at])
    prompt = written.prompt[0][written.prompt_mask[0]].tolist()
    assert window_of(points.prefix, 0) == (
        prompt + written.tokens[0, :at].tolist()
    )
    for windows in (points.student, points.teacher):
        assert window_of(windows, 0) == [at] * K


def test_where_nothing_diverges_is_said():
    written = jax.device_get(make_trajectories(rows=1))
    scored = slot([1], [0.2], [False])
    with pytest.raises(
        ValueError, match=r"none of 1 traj.*lower the objective's p"
    ):
        choose([Observed([], written, [scored])], 1, PAD)


def test_before_is_what_the_start_writes(student, points, measured, begun):
    mask = points.prefix.mask.astype(int)  # padded on the left
    assert mask[:, -1].all() and (np.diff(mask) >= 0).all()
    assert not mask.all()
    before = measured["before"]
    distance, _ = window_distance(student.embedding, begun, points.teacher)
    np.testing.assert_allclose(before["distance"], distance, atol=1e-5)
    assert before["distance"].max() > 0.1
    for i in range(3):
        ours, theirs = window_of(begun, i), window_of(points.teacher, i)
        assert before["first"][i] == (ours[0] == theirs[0])
        assert before["same"][i] == (ours == theirs)


def by_hand(student, teacher, point, method):
    """The same loss, from plain passes over prefix and window."""

    def logp_along(model, windows):
        rows = Trajectories(
            point.prefix.tokens, point.prefix.mask, windows.tokens,
            windows.mask, logp=jnp.zeros((1, K)), truncated=jnp.zeros(1, bool),
        )  # fmt: skip
        return logp_of(model, rows)

    ours, theirs = point.student, point.teacher
    mine = logp_along(student, ours)
    each = reverse_kl(mine, logp_along(teacher, ours))
    loss = weighted_mean(each, mask=ours.mask)
    if method == TEACHER:
        led = token_logprobs(logp_along(student, theirs), theirs.tokens)
        loss -= WEIGHT * weighted_mean(led, mask=theirs.mask)
    if method == STUDENT:
        targets = trajectory_targets(point.plan, theirs, ours)
        led = jnp.take_along_axis(mine, theirs.tokens[:, None], axis=-1)
        loss += WEIGHT * trajectory_loss(targets, led, theirs)[0]
    return loss


@pytest.mark.parametrize("method", [TEACHER, STUDENT])
def test_a_correction_is_m_updates_on_the_window_alone(
    student, reader, points, method
):
    objective = METHODS[method]
    step = jax.jit(
        functools.partial(train_step, objective=objective, optimizer=ADAM)
    )
    run = functools.partial(
        correction(objective),
        student,
        reader,
        jax.tree.map(jnp.asarray, points),
    )
    point = one(points, 2)
    batch = local_correction.as_batch(reader, point)
    state = init_state(student, ADAM)
    written = []
    for number in range(7):
        windows, skipped = run(jnp.int32(number))
        expected = write(state.student, point.prefix)
        assert window_of(windows, 2) == window_of(expected, 0)
        assert skipped[2] == 0
        written.append(window_of(windows, 2))
        state, metrics = step(state, *batch)
        if number == 0:
            assert float(metrics["loss"][0]) == pytest.approx(
                float(by_hand(student, reader.model, point, method)), rel=2e-4
            )
    assert len(set(map(tuple, written))) > 1  # it did change
    # Enough updates, in any context, begin as the teacher does.
    windows, _ = run(jnp.int32(UPDATES))
    first = points.teacher.tokens[:, 0]
    np.testing.assert_array_equal(windows.tokens[:, 0], first)


def test_every_point_starts_from_the_same_student(
    student, reader, points, measured
):
    backwards = jax.tree.map(lambda x: x[::-1], points)
    again = local_correction.measure(
        student, reader, backwards, {TEACHER: METHODS[TEACHER]}, UPDATES,
        **OPTIONS,
    )  # fmt: skip
    for key, values in measured[TEACHER].items():
        np.testing.assert_array_equal(again[TEACHER][key][::-1], values)


def test_enough_updates_towards_the_teacher_mend_all(measured):
    led = measured[TEACHER]
    assert led["same"].all() and led["first"].all()
    np.testing.assert_allclose(led["distance"], 0, atol=1e-4)
    before = measured["before"]["distance"].mean()
    assert measured["opd"]["distance"].mean() < before


def test_an_update_that_is_not_finite_is_counted(
    student, reader, points, begun
):
    endless = presets.opd(lambda s, t: jnp.sum(s * t * jnp.inf, axis=-1))
    run = correction(endless)
    windows, skipped = run(student, reader, one(points, 0), jnp.int32(2))
    assert skipped == 2
    assert window_of(windows, 0) == window_of(begun, 0)


def test_adapters_alone_are_corrected(student, reader, points, begun):
    adapted = add_lora(student, Lora(2, 4.0, ("q", "v"), False))
    run = correction(METHODS[TEACHER], optimizer=optax.adam(0.1))
    before, after = (
        run(adapted, reader, one(points, 0), jnp.int32(count))[0]
        for count in (0, 20)
    )
    assert window_of(before, 0) == window_of(begun, 0)
    assert window_of(after, 0) != window_of(before, 0)


# What is reported, and refused


def of_method(distance, first=1, same=1):
    count = len(distance)
    return {
        "distance": np.array(distance, np.float32),
        "first": np.arange(count) < first,
        "same": np.arange(count) < same,
        "skipped": np.zeros(count, int),
    }


NUMBERS = {
    "before": of_method([0.4, 0.5, 0.6, 0.9], first=0, same=0),
    "opd": of_method([0.2, 0.3, 0.6, 0.5], first=2),
    "topd": of_method([0.0, 0.3, 0.7, 0.2], first=3, same=2),
}


def test_the_numbers_by_hand():
    numbers = report(NUMBERS)
    led = numbers["topd"]
    assert led["mean"] == pytest.approx(0.3)
    assert (led["first"], led["same"], led["skipped"]) == (0.75, 0.5, 0)
    low, high = led["interval"]
    assert 0.0 <= low < 0.3 < high <= 0.7
    against = led["against_opd"]
    assert against["difference"] == pytest.approx(-0.1)
    # Paired: differences of 0 and 0.1 up, 0.2 and 0.3 down.
    low, high = against["interval"]
    assert -0.3 <= low < -0.1 < high <= 0.1
    assert "against_opd" not in numbers["opd"]
    json.dumps(numbers, allow_nan=False)


def test_runs_that_cannot_be_corrected_are_refused_before_any_model(tmp_path):
    settings = settings_with(objective="trust_region")
    several = dataclasses.replace(
        settings_with(),
        teachers=dict.fromkeys("ab", settings.teacher),
        data=dataclasses.replace(
            settings.data, source="jsonl", path="x", teacher_field="subject"
        ),
    )
    for refused, message in (
        (several, "one teacher .* names a, b; leave"),
        (settings, "objective='trust_region' draws anew"),
    ):
        with pytest.raises(ValueError, match=message):
            local_correction.correct(refused, tmp_path, "start", 1, 1)
    assert not any(tmp_path.iterdir())


def test_correct_from_the_command_line(trained, small_arguments, topd):
    result = json.loads(
        topd(
            "correct", *small_arguments, f"--workdir={trained}", "--count=3",
            "--which=latest", "--updates=2",
            "--config.optimizer.learning_rate=0.01",
        )
    )  # fmt: skip
    assert result["count"] == 3 and result["updates"] == 2
    assert result["step"] == 6 and result["window"] == K
    assert result["config"]["optimizer"]["learning_rate"] == 0.01
    assert list(result["methods"]) == ["before", *METHODS]
    assert image.imread(result["figure"]).std() > 0.01
    folder = trained / "correct-latest"
    prefixes = json.loads((folder / "correct.json").read_text())["prefixes"]
    for name, numbers in result["methods"].items():
        distances = prefixes[name]["distance"]
        assert len(distances) == 3
        assert np.mean(distances) == pytest.approx(numbers["mean"])
        assert numbers["skipped"] == 0

"""Several teachers: each reads its own rows, and the loss is one."""

import dataclasses
import functools
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import EOS, PAD, make_model, make_trajectories
from small_run import small_config

from topd_jax.cli.commands import inspect
from topd_jax.data.toy_world import problems
from topd_jax.losses import divergences
from topd_jax.models import (
    DecoderConfig,
    causal_mask,
    init_decoder,
    save_model,
    unembed,
)
from topd_jax.objectives.objective import Objective
from topd_jax.training import loop as training
from topd_jax.training.checkpointing import require_same_run
from topd_jax.training.config import settings_from
from topd_jax.training.logging import read_jsonl
from topd_jax.training.loss import batch_loss
from topd_jax.training.setup import load_pair
from topd_jax.training.step import annotate, init_state, update
from topd_jax.training.teachers import Teachers, split_rows
from topd_jax.types import completion_states

SGD = optax.sgd(1.0)
GOAL = Objective(candidates=3, window=4, guidance_weight=0.3)
OPD = dataclasses.replace(GOAL, variant="opd")


@pytest.fixture(scope="module")
def teachers(teacher):
    """Of another width and depth each."""
    other = make_model(2, layers=1, width=32)
    return Teachers({"code": teacher, "math": other}, (1, 3))


@functools.partial(jax.jit, static_argnames="goal")
def notes_of(student, teachers, trajectories, goal=GOAL):
    def read(model, rows, key):
        return annotate(
            student, model, rows, key, objective=goal, eos_ids=(EOS,),
            pad_id=PAD,
        )  # fmt: skip

    return teachers.each(read, trajectories, jax.random.key(3))


@functools.partial(jax.jit, static_argnames=("goal", "accumulate"))
def step(student, head, trajectories, notes, goal=GOAL, accumulate=1):
    return update(
        init_state(student, SGD), head, trajectories, notes,
        objective=goal, optimizer=SGD, accumulate=accumulate,
    )  # fmt: skip


def gradient(student, state):
    return jax.tree.map(lambda a, b: a - b, student, state.student)


def assert_trees_close(a, b, **tolerance):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, **tolerance)


def cut(tree, begin, end):
    return jax.tree.map(lambda x: x[begin:end], tree)


@jax.jit
def logp_of(model, rows):
    hidden, _ = model(
        rows.sequence, rows.positions, causal_mask(rows.sequence_mask)
    )
    states = completion_states(hidden, rows.prompt.shape[1])
    return jax.nn.log_softmax(unembed(model.head, states))


def test_the_loss_is_the_dense_one_over_all_tokens(
    student, teachers, trajectories
):
    parts = {"code": cut(trajectories, 0, 2), "math": cut(trajectories, 2, 8)}

    @jax.jit
    @jax.value_and_grad
    def dense(model):
        sums = [
            jnp.sum(
                divergences.reverse_kl(
                    logp_of(model, rows), logp_of(teachers.models[n], rows)
                )
                * rows.mask
            )
            for n, rows in parts.items()
        ]
        return sum(sums) / trajectories.mask.sum()

    value, grads = dense(student)
    notes = notes_of(student, teachers, trajectories, OPD)
    state, metrics = step(student, teachers.head, trajectories, notes, OPD)
    np.testing.assert_allclose(metrics["loss"][0], value, rtol=1e-5)
    assert_trees_close(gradient(student, state), grads, atol=1e-5)
    for name in ("divergence", "teacher_token_loss", "num_tokens"):
        whole, *both = (
            np.asarray(metrics[n])
            for n in (name, f"{name}/code", f"{name}/math")
        )
        np.testing.assert_allclose(whole[0], both[0][0] + both[1][0], rtol=1e-5)
    for n, rows in parts.items():
        assert metrics[f"divergence/{n}"][1] == rows.mask.sum()


def test_the_gradient_is_the_sum_of_the_teachers_own(
    student, teachers, trajectories
):
    notes = notes_of(student, teachers, trajectories)
    tokens = trajectories.mask.sum()
    points = sum(n.divergent.sum() for n in notes.values())

    @jax.jit
    @jax.grad
    def by_hand(model):
        return sum(
            batch_loss(
                model, teachers.models[n].head, cut(trajectories, *ends),
                notes[n], (tokens, points), GOAL,
            )[0]
            for n, ends in (("code", (0, 2)), ("math", (2, 8)))
        )  # fmt: skip

    state, metrics = step(
        student, teachers.head, trajectories, notes, accumulate=2
    )
    assert_trees_close(gradient(student, state), by_hand(student), atol=1e-5)
    assert metrics["guidance"][1] == points
    shortest = trajectories.mask[:2].sum(axis=1).min()
    assert metrics["length_min/code"][0] == shortest


def test_a_teacher_reads_its_own_rows_alone(student, teachers, trajectories):
    other = make_trajectories(seed=7)
    mixed = jax.tree.map(
        lambda a, b: jnp.concatenate([a[:2], b[2:]]), trajectories, other
    )
    before, after = (
        notes_of(student, teachers, rows) for rows in (trajectories, mixed)
    )
    for x, y in zip(
        jax.tree.leaves(before["code"]), jax.tree.leaves(after["code"]),
        strict=True,
    ):  # fmt: skip
        np.testing.assert_array_equal(x, y)
    found = []
    for rows in (trajectories, mixed):
        notes = notes_of(student, teachers, rows, OPD)
        found.append(step(student, teachers.head, rows, notes, OPD)[1])
    assert found[0]["divergence/code"] == found[1]["divergence/code"]
    assert found[0]["divergence/math"] != found[1]["divergence/math"]
    assert found[0]["divergence"] != found[1]["divergence"]


def test_whose_rows_they_are_matters(student, teachers, trajectories):
    """Each teacher's loss of its rows, and not the other's of them."""
    notes = notes_of(student, teachers, trajectories, OPD)
    for name, (begin, end) in (("code", (0, 2)), ("math", (2, 8))):
        rows = cut(trajectories, begin, end)
        for other, model in teachers.models.items():
            logp = logp_of(model, rows)
            loss = -jnp.take_along_axis(logp, rows.tokens[..., None], -1)
            loss = jnp.where(rows.mask, loss[..., 0], 0.0)
            same = np.allclose(notes[name].teacher_token_loss, loss, atol=1e-4)
            assert same == (name == other)


def test_rows_and_teachers_must_fit(student, teachers, trajectories):
    notes = notes_of(student, teachers, trajectories)
    run = functools.partial(
        update, init_state(student, SGD), objective=GOAL, optimizer=SGD
    )
    with pytest.raises(ValueError, match=r"teacher 'code' must be .*=4"):
        run(teachers.head, trajectories, notes, accumulate=4)
    with pytest.raises(ValueError, match=r"must both be mappings"):
        run(teachers.models["code"].head, trajectories, notes)
    with pytest.raises(ValueError, match=r"is of \['math'\] and annotations"):
        run({"math": teachers.models["math"].head}, trajectories, notes)
    with pytest.raises(ValueError, match=r"code: 2, math: 5.* batch's 8"):
        split_rows(trajectories, {"code": 2, "math": 5})


# --- a run ----------------------------------------------


@pytest.fixture(scope="module")
def settings(world_cache, tmp_path_factory):
    """The world's teacher reads sums; a random, narrower one the rest."""
    folder = tmp_path_factory.mktemp("teachers")
    config = DecoderConfig(
        vocab_size=64, layers=1, width=16, heads=2, kv_heads=1, head_dim=8,
        mlp_width=32,
    )  # fmt: skip
    model = init_decoder(config, jax.random.key(5))
    save_model(model, folder / "narrow", model_type="llama")
    rows = [
        {
            "question": problem,
            "answer": str(problems.answer(problem)),
            "teacher": "rest" if i % 4 == 0 else "world",
        }
        for i, problem in enumerate(problems.problems("train", 40, 0))
    ]
    path = folder / "prompts.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    config = small_config()
    config.world.cache = str(world_cache)
    config.teachers.world = config.teacher.copy_and_resolve_references()
    config.teachers.rest = config.teacher.copy_and_resolve_references()
    config.teachers.rest.source = str(folder / "narrow")
    config.data.source = "jsonl"
    config.data.path = str(path)
    config.data.held_out = 8
    config.data.teacher_field = "teacher"
    config.train.steps = 4
    config.log.tensorboard = True
    config.objective.candidates = 1
    return settings_from(config)


def changed(settings, section, **fields):
    part = dataclasses.replace(getattr(settings, section), **fields)
    return dataclasses.replace(settings, **{section: part})


def without_times(path):
    return [
        {k: v for k, v in r.items() if not k.startswith(("seconds", "rate"))}
        for r in read_jsonl(path)
    ]


@pytest.fixture(scope="module")
def finished(settings, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("finished")
    training.train(settings, workdir)
    return workdir


def test_a_run_says_everything_a_teacher(finished):
    rows = read_jsonl(finished / "metrics.jsonl")
    assert [r["step"] for r in rows] == [1, 2, 3, 4]
    timed = rows[2]
    for name in (
        "divergence", "teacher_token_loss", "distance", "num_tokens",
        "length_mean", "reverse_kl", "teacher_entropy", "top_k_mass",
    ):  # fmt: skip
        assert timed[f"{name}/rest"] != timed[f"{name}/world"], name
        assert timed[name] is not None
    tokens = [timed[f"num_tokens{n}"] for n in ("", "/rest", "/world")]
    assert tokens[0] == tokens[1] + tokens[2]
    mean = sum(
        timed[f"divergence/{n}"] * timed[f"num_tokens/{n}"]
        for n in ("rest", "world")
    )
    assert timed["divergence"] == pytest.approx(mean / tokens[0], rel=1e-5)
    for row in read_jsonl(finished / "evals.jsonl"):
        assert (row["problems/rest"], row["problems/world"]) == (2, 6)
        assert row["problems"] == 8
        assert row["exact_match/rest"] is not None
        assert row["reverse_kl/rest"] != row["reverse_kl/world"]
    told = read_jsonl(finished / "completions.jsonl")
    assert {r["teacher"] for r in told} == {"rest", "world"}
    assert list((finished / "tensorboard").iterdir())


def test_an_interrupted_run_ends_with_the_same_bits(
    finished, settings, tmp_path, monkeypatch
):
    plain = training.Run._one_step

    def deadly(self):
        if self.step == 3:
            raise KeyboardInterrupt
        return plain(self)

    with monkeypatch.context() as patch:
        patch.setattr(training.Run, "_one_step", deadly)
        with pytest.raises(KeyboardInterrupt):
            training.train(settings, tmp_path)
    training.train(settings, tmp_path)
    for name in ("metrics", "evals", "completions"):
        one = without_times(finished / f"{name}.jsonl")
        assert one
        assert one == without_times(tmp_path / f"{name}.jsonl")


def test_every_prompt_is_held_against_its_own_teacher(settings, tmp_path):
    """Both teachers as student: against themselves there is no divergence."""
    pair = load_pair(settings, tmp_path)
    assert pair.teacher.shares == {"rest": 2, "world": 6}
    batch = next(pair.stream(settings))
    names = [pair.encoded.records[i]["teacher"] for i in batch.index]
    assert names == pair.teacher.row_names(8) == ["rest"] * 2 + ["world"] * 6
    with jax.set_mesh(pair.mesh):
        row = training.Evaluator(settings, pair)(pair.teacher, 0)
        assert abs(row["reverse_kl"]) < 1e-5
        mixed = training.Evaluator(settings, pair)(
            pair.teacher.models["rest"], 0
        )
    assert abs(mixed["reverse_kl/rest"]) < 1e-5
    assert mixed["reverse_kl/world"] > 1e-3
    # The same prompts in the same batch sizes, whatever the order of names.
    plain, _ = training.Evaluator(settings, pair).complete(
        pair.student, pair.test, 8, 0.0
    )
    assert len(plain) == 8
    found = require_same_run(
        {"settings": settings.to_dict(), "teacher": pair.teacher_fingerprint},
        settings, pair.teacher_fingerprint, "here",
    )  # fmt: skip
    assert found is None
    other = pair.teacher_fingerprint | {"rest": "f" * 64}
    with pytest.raises(ValueError, match=r"another teacher 'rest' \(fing.*fff"):
        require_same_run(
            {"settings": settings.to_dict(), "teacher": other},
            settings, pair.teacher_fingerprint, "here",
        )  # fmt: skip


def test_the_page_shows_every_teachers_rows(settings, tmp_path):
    shown = inspect(settings, tmp_path, "start", 8)
    assert shown["trajectories"] == 8


def test_offline_each_teacher_writes_its_own(settings, tmp_path):
    settings = changed(settings, "objective", stage="offline")
    settings = changed(settings, "train", steps=1)
    settings = changed(settings, "log", statistics_every=1, top_k=4)
    training.train(changed(settings, "eval", every=0), tmp_path)
    (row,) = read_jsonl(tmp_path / "metrics.jsonl")
    assert row["cross_entropy/rest"] > 0
    # A random teacher's own samples are about as unlikely as its entropy.
    assert row["teacher_nll/rest"] == pytest.approx(
        row["teacher_entropy/rest"], rel=0.2
    )


def test_what_does_not_fit_is_refused_with_its_place(settings, tmp_path):
    path = tmp_path / "bad.jsonl"
    names = "one of config.teachers: rest, world"
    for line, message in (
        ('{"question": "a", "teacher": "wrold"}',
         f"bad.jsonl line 2: the field \"teacher\" is 'wrold'; it must name "
         f"{names}; the nearest is 'world'"),
        ('{"question": "a"}',
         "bad.jsonl line 2 has no field \"teacher\" (data.teacher_field); its "
         f"fields are ['question']; it must name {names}"),
    ):  # fmt: skip
        path.write_text('{"question": "a", "teacher": "rest"}\n' + line)
        with pytest.raises(ValueError, match=re.escape(message)):
            load_pair(changed(settings, "data", path=str(path)), tmp_path)
    rows = ['{"question": "a", "teacher": "world"}\n'] * 9
    path.write_text("".join(rows))
    with pytest.raises(ValueError, match="no training record .* 'rest'"):
        load_pair(changed(settings, "data", path=str(path)), tmp_path)
    assert not (tmp_path / "world").exists()  # nothing was trained
    bare = {
        name: dataclasses.replace(m, source=settings.teachers["rest"].source)
        for name, m in settings.teachers.items()
    }
    lonely = dataclasses.replace(settings, teachers=bare, student=bare["rest"])
    with pytest.raises(
        ValueError,
        match="neither student.source nor teachers.rest.source nor teachers.w",
    ):
        load_pair(lonely, tmp_path)

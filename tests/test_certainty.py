"""A student that is sure of its errors: the mechanism, its worlds, controls."""

import dataclasses
import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from matplotlib import image
from small_files import logits_of
from test_sweep_report import draw, line

import topd_jax as topd
from topd_jax.data.settings import WorldSettings
from topd_jax.data.toy_world import models
from topd_jax.experiments import sweep
from topd_jax.experiments.certainty import pays_below
from topd_jax.experiments.sweep_report import write_report
from topd_jax.losses.token_losses import suppress_unlikely
from topd_jax.objectives.loading import make_objective
from topd_jax.training.config import settings_from

RIGHT = 0.95  # the teacher's probability of the right token


def pull(right):
    """Return minus the gradient of a two-token loss on the right logit."""
    teacher = jnp.log(jnp.array([1 - RIGHT, RIGHT]))

    def of(logit):
        logits = jnp.array([0.0, 1.0]) * logit
        return topd.reverse_kl(jax.nn.log_softmax(logits), teacher)

    return -jax.grad(of)(jnp.log(right) - jnp.log1p(-right))


def test_controls_ask_neither_teacher_nor_future():
    student = jnp.log(jnp.array([[0.9, 0.1], [0.9, 0.1]]))
    tokens = jnp.array([0, 1])
    losses = [
        suppress_unlikely(student, t, tokens) for t in (student, -student)
    ]
    np.testing.assert_array_equal(*losses)
    assert losses[0].tolist() == pytest.approx([0.0, np.log(0.1)])
    weight = make_objective("retain(fraction=0.25)").token_weights[0]
    mask = jnp.arange(4000).reshape(4, 1000) % 2 == 0
    weights = weight(jax.random.uniform(jax.random.key(1), mask.shape), mask)
    assert float(weights.sum()) == pytest.approx(2000)
    assert 0.2 < float((weights > 0).sum() / mask.sum()) < 0.3
    assert not (weights > 0)[~mask].any()


def test_worlds_that_differ_in_the_student_have_one_teacher(
    tmp_path, monkeypatch
):
    """And one tokenizer, which is trained on the usual student."""
    usual, other = (
        models._names(WorldSettings(student_sharpness=x)) for x in (1.0, 2.0)
    )
    assert (usual[0], usual[2]) == (other[0], other[2])
    assert other[1] != usual[1]
    texts, trained = [], []

    def tokenizer(*corpora, vocab_size):
        texts.append(corpora)
        return types.SimpleNamespace(model=b"")

    def train(settings, part, pairs, _):
        trained.append((part, pairs))

    monkeypatch.setattr(models, "train_tokenizer", tokenizer)
    monkeypatch.setattr(models, "_train", train)
    monkeypatch.setattr(models, "cast", lambda model, _: model)
    monkeypatch.setattr(models, "save_model", lambda *_, model_type: None)
    small = WorldSettings(solutions=50)
    for share in (0.5, 1.0):
        world = dataclasses.replace(small, student_left_to_right=share)
        models._make(world, tmp_path)
    assert texts[0] == texts[1]
    (_, teacher), (_, student), (_, same), (_, other) = trained
    assert teacher == same
    assert student != other


def test_a_sharper_student_has_larger_logits(student):
    ids, mask = jnp.array([[3, 1, 2]]), jnp.ones((1, 3), bool)
    plain, sharp = (
        logits_of(model, ids, mask)
        for model in (student, models.sharpened(student, 2.0))
    )
    np.testing.assert_allclose(sharp, 2 * plain, rtol=1e-5)


def test_guidance_pays_where_it_pulls_harder():
    objective = make_objective("topd(guidance_weight=0.3)")
    p = pays_below(objective, tokens=28)
    along = (1 - p) * 0.3 / (0.7 * 10)  # one branch a row, 70 % divergent
    assert along == pytest.approx(float(pull(p)) / 28, rel=1e-3)
    assert 0.3 < p < 0.35
    # As in the paper: 218 candidates a row of 9688 tokens, K = 50.
    text = "topd(candidates=218, branch_fraction=1.0, window=50)"
    assert 0.01 < pays_below(make_objective(text), tokens=9688) < 0.03
    assert pays_below(make_objective("opd"), tokens=28) is None
    for options in ("guidance_weight=0", "percentile=100", "threshold=0.3"):
        assert pays_below(make_objective(f"topd({options})"), tokens=28) is None
    # More than reverse KL ever pulls: at any probability.
    strong = make_objective("topd(guidance_weight=9.0)")
    assert pays_below(strong, tokens=28) > 0.5


def swept(**changes):
    return settings_from({"sweep": changes})


def test_every_variant_runs_in_every_world(tmp_path, monkeypatch, capsys):
    """Each world has models of its own, which are loaded once."""
    loaded, measured, written = [], [], []

    def load(settings, _):
        loaded.append(settings.world.seed)
        return settings.world.seed

    def measure(run, _, setup):
        measured.append((run.world, run.name, run.settings.world.seed, setup))
        where = {"world": run.world, "fingerprint": run.mark}
        return line(run.name, run.settings.seed, draw(0, 0.5), **where)

    def report(rows, folder):
        written.append(len(rows))
        (tmp_path / "table.md").write_text("")
        return {"table_file": str(tmp_path / "table.md")}

    monkeypatch.setattr(sweep, "load_setup", load)
    monkeypatch.setattr(sweep, "_measure", measure)
    monkeypatch.setattr(sweep, "write_report", report)
    worlds = ("", "world.student_sharpness=2;world.seed=4")
    settings = swept(worlds=worlds, variants=("opd",), seeds=(0, 1))
    sweep.sweep(settings, tmp_path)
    told = capsys.readouterr().err
    assert "holds 0 of 12 runs" in told
    assert "opd done; about 0 min for the other 9; see" in told
    assert loaded == [0, 4]
    assert written == [*range(1, 13), 12]  # one after each
    assert (
        measured
        == [
            (world, name, seed, seed)
            for world, seed in zip(worlds, (0, 4), strict=True)
            for name in ("start", "teacher", "opd")
        ]
        * 2
    )
    with pytest.raises(ValueError, match="sweep.worlds.*one of world"):
        list(sweep._runs(swept(worlds=("train.steps=3",))))


def test_a_line_is_of_the_world_that_its_run_is_of(tmp_path):
    """Whatever the sweep that wrote it called that world, if anything."""
    record, spelled = tmp_path / "record.jsonl", "world.seed=0"
    for before in ((), ("world.seed = 0",)):
        old = next(sweep._runs(swept(worlds=before)))
        row = {"name": old.name, "fingerprint": old.mark}
        sweep.append_row(record, row | {"world": old.world} if before else row)
    runs = sweep._runs(swept(worlds=(spelled, "world.seed=1")))
    rows = sweep._rows(record, {(r.name, r.mark): r for r in runs})
    assert [row["world"] for row in rows] == [spelled] * 2


def test_gains_are_drawn_by_certainty(tmp_path):
    rows = []
    for world, p, gain in (
        ("world.seed=1", 0.2, 0.0),
        ("world.seed=2", 0.01, 0.2),
    ):
        forks = {"forks": 9, "low": p / 2, "median": p, "high": 2 * p}
        rows += [
            line("start", 0, draw(0, 0.3), world=world, right_at_forks=forks),
            line("opd", 0, draw(1, 0.5), world=world),
            line("topd", 0, draw(1, 0.5 + gain), world=world),
        ]
    # Where no fork was found nothing is known, and the others are drawn.
    forks = {"forks": 0} | dict.fromkeys(("low", "median", "high"))
    rows += [
        line("start", 0, draw(0, 0.3), world="a", right_at_forks=forks),
        line("opd", 0, draw(1, 0.5), world="a"),
    ]
    files = write_report(rows, tmp_path)
    table = (tmp_path / "table.md").read_text()
    assert table.index("## world.seed=1") < table.index("## world.seed=2")
    assert "median probability of 0.01 (quartiles 0.005 and 0.02)" in table
    found = json.loads((tmp_path / "report.json").read_text())
    assert found["world.seed=2"]["variants"][2]["gain"] > 0.15
    assert image.imread(files["certainty"]).std() > 0.01

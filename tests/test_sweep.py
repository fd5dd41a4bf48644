"""Sweeps: resumable run by run, each finished run one line of a record."""

import dataclasses
import json
import shutil

import pytest
from matplotlib import image
from small_run import settings_with

from topd_jax.cli import main
from topd_jax.experiments import sweep
from topd_jax.experiments.variants import with_variant
from topd_jax.objectives.loading import make_objective
from topd_jax.objectives.objective import Objective
from topd_jax.training.logging import read_jsonl

VARIANTS = ("opd", "topd(window=4, candidates=2)")


class Killed(BaseException):
    """What stops a test where a signal would."""


@pytest.fixture(scope="module")
def arguments(small_arguments):
    return [
        "sweep",
        *small_arguments,
        f"--config.sweep.variants={VARIANTS!r}",
        # The last batch of problems has fillers, which must not count.
        "--config.eval.batch_size=5",
        "--config.train.steps=4",
        "--config.log.statistics_every=1",
        "--config.eval.every=2",
    ]


@pytest.fixture(scope="module")
def stopped(arguments, tmp_path_factory):
    """A sweep that was killed before its last run, as it lay then."""
    workdir = tmp_path_factory.mktemp("sweep")
    plain = sweep._run

    def deadly(name, *rest):
        if name == VARIANTS[-1]:
            raise Killed
        return plain(name, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sweep, "_run", deadly)
        with pytest.raises(Killed):
            main.run([*arguments, f"--workdir={workdir}"])
    return workdir


@pytest.fixture(scope="module")
def before(stopped):
    return (stopped / "record.jsonl").read_text()


@pytest.fixture(scope="module")
def finished(arguments, stopped, before):
    main.run([*arguments, f"--workdir={stopped}"])
    return stopped


def test_a_killed_sweep_goes_on_with_the_run_that_is_missing(finished, before):
    text = (finished / "record.jsonl").read_text()
    assert text.startswith(before)
    rows = read_jsonl(finished / "record.jsonl")
    assert [r["name"] for r in rows] == ["start", "teacher", *VARIANTS]
    assert before.count("\n") == 3
    assert rows[2]["fingerprint"] != rows[3]["fingerprint"]
    assert len({r["config"] for r in rows}) == 1


def test_lines_hold_what_the_report_needs(finished):
    start, teacher, opd, topd = read_jsonl(finished / "record.jsonl")
    assert abs(teacher["evaluation"]["reverse_kl"]) < 1e-5
    assert start["evaluation"]["reverse_kl"] > 0.01
    for row in (start, teacher, opd, topd):
        assert row["evaluation"]["problems"] == 8
        assert row["evaluation"]["temperature"] == 1.0
        assert row["evaluation"]["final"] is True
        assert set(row["greedy"]) >= {"exact_match", "grades"}
    for row, name in (
        (opd, "opd-0"),
        (topd, "topd-window-4-candidates-2-0"),
    ):
        metrics = read_jsonl(finished / "runs" / name / "metrics.jsonl")
        tokens = [m["num_tokens"] for m in metrics]
        assert row["steps"] == 4
        assert row["tokens"] == sum(tokens)
        assert [p["step"] for p in row["curve"]] == [0, 2, 4]
        assert row["curve"][1]["tokens"] == sum(tokens[:2])
        assert row["seconds_step"] > 0
    assert opd["evaluation"] != topd["evaluation"]
    # 8 problems in batches of 5, two candidates each; those past a fork are
    # left out, and the random student forks early.
    assert 0 < start["detector"]["candidates"] <= 16


def test_a_finished_sweep_does_nothing_again(finished, arguments, monkeypatch):
    text = (finished / "record.jsonl").read_text()

    def forbidden(*_):
        raise AssertionError("a recorded run was made again")

    monkeypatch.setattr(sweep, "_run", forbidden)
    monkeypatch.setattr(sweep, "load_setup", forbidden)
    main.run([*arguments, f"--workdir={finished}"])
    assert (finished / "record.jsonl").read_text() == text


def test_the_report_is_written(finished, capsys, arguments):
    main.run([*arguments, f"--workdir={finished}"])
    out = capsys.readouterr().out
    files = json.loads(out[out.index("\n{") :])
    folder = finished / "report"
    assert files["table_file"] == str(folder / "table.md")
    table = (folder / "table.md").read_text()
    assert all(f"| {name} |" in table for name in VARIANTS)
    assert table in out
    summary = json.loads((folder / "report.json").read_text())
    assert [v["name"] for v in summary["variants"]] == [
        "start", "teacher", *VARIANTS
    ]  # fmt: skip
    pixels = image.imread(files["curves"])[..., :3]
    assert (pixels.max(-1) - pixels.min(-1) > 0.2).any()


def test_a_run_killed_before_its_line_is_not_trained_again(
    finished, arguments, tmp_path, monkeypatch
):
    shutil.copytree(finished, tmp_path / "sweep")
    record = tmp_path / "sweep" / "record.jsonl"
    *kept, last = record.read_text().splitlines(keepends=True)
    # Killed while the line was being written.
    record.write_text("".join(kept) + last[: len(last) // 2])

    def forbidden(self):
        raise AssertionError("a finished run was trained again")

    monkeypatch.setattr(sweep.Run, "_one_step", forbidden)
    main.run([*arguments, f"--workdir={tmp_path / 'sweep'}"])
    assert record.read_text().splitlines(keepends=True)[:-1] == kept
    assert read_jsonl(record)[-1] == json.loads(last)


def test_a_line_that_lacks_only_its_end_is_kept(finished, arguments, tmp_path):
    text = (finished / "record.jsonl").read_text()
    record = tmp_path / "other.jsonl"
    record.write_text(text[:-1])
    main.run([
        *arguments, f"--workdir={finished}", f"--config.sweep.record={record}"
    ])  # fmt: skip
    assert record.read_text() == text


def test_an_unknown_variant_is_refused_before_the_first_run(
    small_arguments, tmp_path, capsys
):
    with pytest.raises(SystemExit) as exit_:
        main.run([
            "sweep", *small_arguments, f"--workdir={tmp_path}",
            "--config.sweep.variants=opd,tpod",
        ])  # fmt: skip
    assert exit_.value.code == 2
    error = capsys.readouterr().err
    assert "'tpod' must be one of opd, " in error
    assert list(tmp_path.iterdir()) == []


def changed(settings, section, **fields):
    part = dataclasses.replace(getattr(settings, section), **fields)
    return dataclasses.replace(settings, **{section: part})


def test_what_belongs_to_one_sweep_is_told_by_its_settings():
    settings = settings_with()
    mark = sweep._mark(settings)
    for same in (
        changed(settings, "sweep", seeds=(1, 2), record="x"),
        changed(settings, "world", cache="y"),
        changed(settings, "log", every=9),
    ):
        assert sweep._mark(same) == mark
    for other in (
        dataclasses.replace(settings, objective="topd(window=3)"),
        changed(settings, "optimizer", learning_rate=0.5),
        changed(settings, "world", seed=1),
        changed(settings, "eval", final_problems=9),
    ):
        assert sweep._mark(other) != mark


def own_objective(strength: float = 1.0) -> Objective:
    return Objective(temperature=strength)


def test_a_variant_is_an_objective_and_other_settings():
    settings = settings_with()
    entry = (
        "topd(context='student', window=3); train.steps=9"
        ";optimizer.learning_rate=0.5"
    )
    variant = with_variant(settings, entry)
    assert variant.objective == "topd(context='student', window=3)"
    assert (variant.train.steps, variant.optimizer.learning_rate) == (9, 0.5)
    assert settings == dataclasses.replace(
        variant, objective=settings.objective, train=settings.train,
        optimizer=settings.optimizer,
    )  # fmt: skip
    mine = f"{__name__}:own_objective(strength=2.0)"
    variant = with_variant(settings, mine)
    assert make_objective(variant.objective) == own_objective(2.0)


@pytest.mark.parametrize(
    ("entry", "text"),
    [
        ("opd(windwo=3)", "no option windwo"),
        ("opd;train.stpes=3", "config.train.stpes; the nearest is "
         "config.train.steps"),
        ("opd;train.steps", "'train.steps' must be section.key=value"),
        ("opd;train.steps=wide", "config.train.steps='wide' must be of type"),
        ("opd;train.steps=0", "train.steps=0 must be at least 1"),
        # Models and problems are loaded once.
        ("opd;student.source=x", "the section one of offline, optimizer, "),
        ("topd(window=99)", "must not exceed rollout.max_new_tokens=16"),
    ],
)  # fmt: skip
def test_what_a_variant_cannot_change_is_named(entry, text):
    with pytest.raises(ValueError, match="^sweep.variants: ") as error:
        with_variant(settings_with(), entry)
    assert text in str(error.value)

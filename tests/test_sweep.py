"""Sweeps: resumable run by run, each finished run one line of a record."""

import dataclasses
import json

import pytest
from matplotlib import image
from small_run import changed, settings_with

from topd_jax.cli import main
from topd_jax.experiments import sweep
from topd_jax.experiments.sweep import with_variant
from topd_jax.objectives.loading import make_objective
from topd_jax.objectives.objective import Objective
from topd_jax.training.logging import read_jsonl

VARIANT = "retain(fraction=0.5)"


class Killed(BaseException):
    """What stops a test where a signal would."""


@pytest.fixture(scope="module")
def arguments(small_arguments):
    return [
        "sweep",
        *small_arguments,
        f"--config.sweep.variants={VARIANT}",
        # The last batch of problems has fillers, which must not count.
        "--config.eval.batch_size=5",
        "--config.train.steps=2",
        "--config.log.statistics_every=1",
        "--config.eval.every=1",
    ]


@pytest.fixture(scope="module")
def swept(arguments, tmp_path_factory):
    """A sweep killed before its last line, then run again: where it is, and
    the record as the killed one left it."""
    workdir = tmp_path_factory.mktemp("sweep")
    append = sweep.append_row

    def deadly(record, row):
        if row["name"] == VARIANT:
            raise Killed
        append(record, row)

    def forbidden(self):
        raise AssertionError("a finished run was trained again")

    command = [*arguments, f"--workdir={workdir}"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sweep, "append_row", deadly)
        with pytest.raises(Killed):
            main.run(command)
    before = (workdir / "record.jsonl").read_text()
    assert (workdir / "report" / "table.md").is_file()  # of what is done
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sweep.Run, "_one_step", forbidden)
        main.run(command)
    return workdir, before


@pytest.fixture(scope="module")
def finished(swept):
    return swept[0]


def test_a_killed_sweep_goes_on_with_the_run_that_is_missing(swept):
    workdir, before = swept
    assert (workdir / "record.jsonl").read_text().startswith(before)
    assert before.count("\n") == 2
    rows = read_jsonl(workdir / "record.jsonl")[:3]
    assert [r["name"] for r in rows] == ["start", "teacher", VARIANT]
    assert len({r["fingerprint"] for r in rows[1:]}) == 2


def test_lines_hold_what_the_report_needs(finished):
    start, teacher, retain = read_jsonl(finished / "record.jsonl")[:3]
    assert abs(teacher["evaluation"]["reverse_kl"]) < 1e-5
    assert start["evaluation"]["reverse_kl"] > 0.01
    for row in (start, teacher, retain):
        assert row["evaluation"]["problems"] == 8
        assert row["evaluation"]["temperature"] == 1.0
        assert row["evaluation"]["final"] is True
        assert set(row["greedy"]) >= {"exact_match", "grades"}
    folder = f"retain-fraction-0.5-0-{retain['fingerprint'][:8]}"
    settings = (finished / "runs" / folder / "settings.json").read_text()
    assert json.loads(settings)["objective"] == VARIANT
    assert [p["step"] for p in retain["curve"]] == [0, 1, 2]
    assert retain["seconds_step"] > 0
    # 8 problems in batches of 5, two candidates each; those past a fork are
    # left out, and the random student forks early.
    assert 0 < start["detector"]["candidates"] <= 16


def test_a_finished_sweep_only_reports(
    finished, arguments, monkeypatch, capsys
):
    def forbidden(*_):
        raise AssertionError("a recorded run was made again")

    monkeypatch.setattr(sweep, "_measure", forbidden)
    monkeypatch.setattr(sweep, "load_setup", forbidden)
    # A record may hold the runs of another sweep.
    record = finished / "record.jsonl"
    other = json.loads(record.read_text().splitlines()[0])
    other |= {"fingerprint": "another"}
    sweep.append_row(record, other)
    text = record.read_text()
    main.run([*arguments, f"--workdir={finished}"])
    assert record.read_text() == text
    out = capsys.readouterr().out
    files = json.loads(out[out.index("\n{") :])
    folder = finished / "report"
    assert files["table_file"] == str(folder / "table.md")
    table = (folder / "table.md").read_text()
    assert f"| {VARIANT} |" in table
    assert table in out
    summary = json.loads((folder / "report.json").read_text())
    assert [v["name"] for v in summary["variants"]] == [
        "start", "teacher", VARIANT
    ]  # fmt: skip
    assert image.imread(files["curves"]).std() > 0.01


def test_an_unknown_variant_is_refused_before_the_first_run(
    small_arguments, tmp_path, refused
):
    line = refused("sweep", *small_arguments, f"--workdir={tmp_path}",
                   "--config.sweep.variants=opd,tpod")  # fmt: skip
    assert "'tpod' must be one of opd, " in line
    assert list(tmp_path.iterdir()) == []
    entry = f"opd;train.stage=offline;offline.path={tmp_path}/none"
    line = refused("sweep", *small_arguments, f"--workdir={tmp_path}",
                   f"--config.sweep.variants=opd,{entry}")  # fmt: skip
    assert f"{tmp_path}/none" in line
    assert not (tmp_path / "record.jsonl").exists()


def test_what_belongs_to_one_sweep_is_told_by_its_settings():
    def mark_of(settings):
        return sweep._Run("opd", "", settings).mark

    settings = settings_with()
    mark = mark_of(settings)
    for same in (
        changed(settings, "sweep", seeds=(1, 2)),
        changed(settings, "world", cache="y"),
        changed(settings, "log", completions=9),
    ):
        assert mark_of(same) == mark
    for other in (
        dataclasses.replace(settings, objective="topd(window=3)"),
        changed(settings, "optimizer", learning_rate=0.5),
        changed(settings, "world", seed=1),
        changed(settings, "eval", final_problems=9),
    ):
        assert mark_of(other) != mark


def test_a_long_variant_has_a_short_directory(tmp_path):
    name = f"topd({'candidates=4, ' * 30})"
    run = sweep._Run(name, "world.seed=1", settings_with())
    assert run.folder.startswith("world.seed-1-topd-candidates-4-")
    assert run.folder.endswith(f"-{run.mark[:8]}")
    (tmp_path / run.folder).mkdir()


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


def test_seconds_of_a_run_that_is_guided_in_part(tmp_path):
    """A quarter of its steps takes four times as long; the first compiles."""
    steps = [{"seconds": 90.0, "guidance": 0.1}]
    steps += [{"seconds": 4.0, "guidance": 0.1}] * 2
    steps += [{"seconds": 50.0}] + [{"seconds": 1.0}] * 8
    text = "".join(json.dumps(step) + "\n" for step in steps)
    (tmp_path / "metrics.jsonl").write_text(text)
    (tmp_path / "evals.jsonl").write_text("")
    found = sweep._summarize_logs(tmp_path)
    assert found == {"seconds_step": 21 / 12, "curve": []}
    # No step was logged.
    (tmp_path / "metrics.jsonl").write_text("")
    found = sweep._summarize_logs(tmp_path)
    assert found == {"seconds_step": None, "curve": []}

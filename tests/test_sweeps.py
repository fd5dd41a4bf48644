"""Sweeps: resumable run by run, each finished run one line of a record."""

import dataclasses
import json
import shutil

import pytest
from matplotlib import image
from small_run import small_config

from topd_jax.cli import main
from topd_jax.experiments import sweep
from topd_jax.training.config import settings_from
from topd_jax.training.logging import read_jsonl

VARIANTS = ("opd", "topd:teacher")


class Killed(BaseException):
    """What stops a test where a signal would."""


@pytest.fixture(scope="module")
def arguments(small_arguments):
    return [
        "sweep",
        *small_arguments,
        f"--config.sweep.variants={','.join(VARIANTS)}",
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
    for row, name in ((opd, "opd-0"), (topd, "topd-teacher-0")):
        metrics = read_jsonl(finished / "runs" / name / "metrics.jsonl")
        tokens = [m["num_tokens"] for m in metrics]
        assert row["steps"] == 4
        assert row["tokens"] == sum(tokens)
        assert [p["step"] for p in row["curve"]] == [0, 2, 4]
        assert row["curve"][1]["tokens"] == sum(tokens[:2])
        assert row["seconds_step"] > 0
        assert set(row["seconds_phases"]) == {"rollout", "annotate", "update"}
    assert opd["evaluation"] != topd["evaluation"]


def test_the_detector_looks_at_every_problem(finished):
    found = read_jsonl(finished / "record.jsonl")[0]["detector"]
    # 8 problems in batches of 5, two candidates each, those past a fork left
    # out: the random student forks early.
    assert 0 < found["candidates"] <= 16
    counts = found["histogram"]["surface"] + found["histogram"]["fork"]
    assert sum(counts) == found["candidates"]
    assert 0 <= found["flagged"] <= found["candidates"]


def test_a_finished_sweep_does_nothing_again(finished, arguments, monkeypatch):
    text = (finished / "record.jsonl").read_text()

    def forbidden(*_):
        raise AssertionError("a recorded run was made again")

    monkeypatch.setattr(sweep, "_run", forbidden)
    monkeypatch.setattr(sweep, "load_pair", forbidden)
    main.run([*arguments, f"--workdir={finished}"])
    assert (finished / "record.jsonl").read_text() == text


def test_the_report_is_written(finished, capsys, arguments):
    main.run([*arguments, f"--workdir={finished}"])
    out = capsys.readouterr().out
    files = json.loads(out[out.index("\n{") :])
    folder = finished / "report"
    assert files["table_file"] == str(folder / "table.md")
    table = (folder / "table.md").read_text()
    assert "| OPD |" in table and "| TOPD, context teacher |" in table
    assert table in out
    summary = json.loads((folder / "report.json").read_text())
    assert [v["name"] for v in summary["variants"]] == [
        "start", "teacher", *VARIANTS
    ]  # fmt: skip
    for name in ("curves", "distances"):
        pixels = image.imread(files[name])[..., :3]
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


def test_a_broken_line_is_named_and_nothing_lost(
    finished, arguments, tmp_path, capsys
):
    text = (finished / "record.jsonl").read_text()
    record = tmp_path / "other.jsonl"
    record.write_text("{broken\n" + text)
    with pytest.raises(SystemExit) as exit_:
        main.run([
            *arguments,
            f"--workdir={finished}",
            f"--config.sweep.record={record}",
        ])  # fmt: skip
    assert exit_.value.code == 2
    assert "other.jsonl line 1 is not JSON" in capsys.readouterr().err
    assert record.read_text() == "{broken\n" + text


def test_an_unknown_variant_is_refused_before_the_first_run(
    small_arguments, tmp_path, capsys
):
    with pytest.raises(SystemExit) as exit_:
        main.run([
            "sweep", *small_arguments, f"--workdir={tmp_path}",
            "--config.sweep.variants=opd,tpod:teacher",
        ])  # fmt: skip
    assert exit_.value.code == 2
    error = capsys.readouterr().err
    assert "'tpod:teacher' must be one of opd, " in error
    assert list(tmp_path.iterdir()) == []


def changed(settings, section, **fields):
    part = dataclasses.replace(getattr(settings, section), **fields)
    return dataclasses.replace(settings, **{section: part})


def test_what_belongs_to_one_sweep_is_told_by_its_settings():
    settings = settings_from(small_config())
    family = sweep._family(settings)
    for same in (
        dataclasses.replace(settings, seed=5),
        sweep.with_variant(settings, "n_step"),
        changed(settings, "sweep", seeds=(1, 2), record="x"),
        changed(settings, "world", cache="y"),
        changed(settings, "log", every=9),
    ):
        assert sweep._family(same) == family
    for other in (
        changed(settings, "optimizer", learning_rate=0.5),
        changed(settings, "objective", window=3),
        changed(settings, "world", seed=1),
        changed(settings, "eval", final_problems=9),
    ):
        assert sweep._family(other) != family


def test_a_variant_may_set_the_context():
    settings = settings_from(small_config())
    student = sweep.with_variant(settings, "topd:student").objective
    assert (student.variant, student.context) == ("topd", "student")
    plain = sweep.with_variant(settings, "opd").objective
    assert plain.variant == "opd"
    assert plain.context == settings.objective.context
    with pytest.raises(ValueError, match="context='nobody' must be one of"):
        sweep.with_variant(settings, "topd:nobody")


def test_a_variant_may_change_any_setting():
    settings = settings_from(small_config())
    found = sweep.with_variant(
        settings,
        "topd:student/window=3/anchor_first=False/siblings.gamma=0.25"
        "/train.steps=9/branch_loss=forward_kl/threshold=0.5",
    )
    goal = found.objective
    assert (goal.variant, goal.context) == ("topd", "student")
    assert (goal.window, goal.anchor_first, goal.threshold) == (3, False, 0.5)
    assert goal.branch_loss == "forward_kl"
    assert goal.siblings.gamma == 0.25
    assert found.train.steps == 9
    same = dataclasses.replace(
        found, objective=settings.objective, train=settings.train
    )
    assert same == settings


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("opd/windwo=3", "unknown config key config.objective.windwo; the "
         "nearest is config.objective.window"),
        ("opd/window", "'window' in 'opd/window' must be key=value"),
        ("opd/window=wide", "config.objective.window='wide' must be of type"),
        ("opd/train.steps=0", "train.steps=0 must be at least 1"),
    ],
)  # fmt: skip
def test_what_a_variant_cannot_change_is_named(name, text):
    settings = settings_from(small_config())
    with pytest.raises(ValueError, match="^sweep.variants: ") as error:
        sweep.with_variant(settings, name)
    assert text in str(error.value)

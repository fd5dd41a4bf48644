"""What local corrections report, draw and print, and what they refuse."""

import dataclasses
import json

import numpy as np
import pytest
from matplotlib import image
from small_run import settings_with

from topd_jax.cli import main
from topd_jax.experiments import local_correction, plots
from topd_jax.experiments.correction_report import PAPER, report, table

K = 4  # of small_run.py


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
    "topd:teacher": of_method([0.0, 0.3, 0.7, 0.2], first=3, same=2),
}


def test_the_numbers_by_hand():
    found = report(NUMBERS, np.array([0.5, 0.7]))
    assert found["as_written"] == pytest.approx(0.6)
    led = found["methods"]["topd:teacher"]
    assert led["mean"] == pytest.approx(0.3)
    assert led["median"] == pytest.approx(0.25)
    assert (led["first"], led["same"]) == (0.75, 0.5)
    low, high = led["interval"]
    assert 0.0 <= low < 0.3 < high <= 0.7
    against = led["against_opd"]
    assert against["difference"] == pytest.approx(-0.1)
    assert (against["nearer"], against["farther"]) == (0.5, 0.25)
    assert "against_opd" not in found["methods"]["opd"]
    json.dumps(found, allow_nan=False)


def test_the_table_has_the_papers_numbers_beside():
    numbers = report(NUMBERS, np.array([0.5]))
    text = table({**numbers, "count": 4, "window": K, "updates": 3})
    head, _, *rows = text.splitlines()
    assert head.startswith(f"4 prefixes, 3 updates on a window of {K} tokens")
    assert [r.split()[0] for r in rows] == list(NUMBERS)
    for row, (name, paper) in zip(rows, PAPER["mean"].items(), strict=True):
        assert row.split()[3] == f"{paper:.3f}", name
    assert "-0.100" in rows[2]


def test_the_figure_is_a_picture(tmp_path):
    numbers = report(NUMBERS, np.array([0.5]))
    path = plots.corrections(
        NUMBERS, numbers["methods"], PAPER["mean"], tmp_path / "new"
    )
    assert path.name == "correction-figure5.png"
    assert image.imread(path).std() > 0.01


@pytest.mark.parametrize("rate", [0.0, -1.0, float("nan")])
def test_a_rate_that_means_nothing_is_refused(rate):
    with pytest.raises(ValueError, match=r"--learning_rate=.* above 0; --upd"):
        local_correction.require_correctable(settings_with(), rate)


def test_several_teachers_are_refused_before_any_is_made(tmp_path):
    settings = settings_with()
    settings = dataclasses.replace(
        settings,
        teachers={"a": settings.teacher, "b": settings.teacher},
        data=dataclasses.replace(
            settings.data, source="jsonl", path="x", teacher_field="subject"
        ),
    )
    with pytest.raises(ValueError, match="one teacher .* names a, b; leave"):
        local_correction.correct(settings, tmp_path, "start", 1, 1)
    assert not any(tmp_path.iterdir())


def test_correct_from_the_command_line(trained, small_arguments, capsys):
    capsys.readouterr()
    call = ["correct", *small_arguments, f"--workdir={trained}", "--count=3"]
    main.run([*call, "--which=latest", "--updates=2", "--learning_rate=0.01"])
    out, err = capsys.readouterr()
    found = json.loads(out)
    assert found["count"] == 3 and found["updates"] == 2
    assert found["step"] == 6 and found["window"] == K
    assert found["config"]["optimizer"]["learning_rate"] == 0.01
    assert list(found["methods"]) == ["before", *local_correction.METHODS]
    assert "3 prefixes, 2 updates" in err and "topd:student" in err
    folder = trained / "correct-latest"
    assert image.imread(found["figure"]).std() > 0.01
    written = json.loads((folder / "correct.json").read_text())
    for name, numbers in found["methods"].items():
        distances = written["prefixes"][name]["distance"]
        assert len(distances) == 3
        assert np.mean(distances) == pytest.approx(numbers["mean"])
        assert numbers["skipped"] == 0


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--updates=-1"], "updates"),
        (["--learning_rate=0", "--which=start"], "must be above 0"),
        (["--which=best"], "no checkpoint in"),
    ],
)
def test_bad_input_is_one_line(flags, message, small_arguments, tmp_path,
                               capsys):  # fmt: skip
    with pytest.raises(SystemExit, match="2"):
        main.run(["correct", *small_arguments, f"--workdir={tmp_path}", *flags])
    err = capsys.readouterr().err.strip().splitlines()
    assert len(err) == 1 and message in err[0]

"""What local corrections report, draw and print, and what they refuse."""

import dataclasses
import json

import numpy as np
import pytest
from matplotlib import image
from small_run import settings_with

from topd_jax.cli import main
from topd_jax.experiments import local_correction
from topd_jax.experiments.local_correction import report

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
    result = json.loads(capsys.readouterr().out)
    assert result["count"] == 3 and result["updates"] == 2
    assert result["step"] == 6 and result["window"] == K
    assert result["config"]["optimizer"]["learning_rate"] == 0.01
    assert list(result["methods"]) == [
        "before",
        "opd",
        "topd",
        "topd(context='student')",
    ]
    assert image.imread(result["figure"]).std() > 0.01
    folder = trained / "correct-latest"
    prefixes = json.loads((folder / "correct.json").read_text())["prefixes"]
    for name, numbers in result["methods"].items():
        distances = prefixes[name]["distance"]
        assert len(distances) == 3
        assert np.mean(distances) == pytest.approx(numbers["mean"])
        assert numbers["skipped"] == 0


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--updates=-1"], "updates"),
        (["--learning_rate=0", "--which=start"], "must be above 0"),
        (["--learning_rate=nan", "--which=start"], "must be above 0"),
        (["--which=best"], "no checkpoint in"),
    ],
)
def test_bad_input_is_one_line(flags, message, small_arguments, tmp_path,
                               capsys):  # fmt: skip
    with pytest.raises(SystemExit, match="2"):
        main.run(["correct", *small_arguments, f"--workdir={tmp_path}", *flags])
    err = capsys.readouterr().err.strip().splitlines()
    assert len(err) == 1 and message in err[0]

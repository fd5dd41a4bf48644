"""Models with recurrent layers, from doctor to export, as a user has them."""

import dataclasses
import json

import numpy as np
import pytest
import small_run
from children import on_eight_devices
from conftest import make_trajectories
from small_files import RECURRENT, logits_of, make
from small_hub import IDS, hub_directory, questions

from topd_jax.cli import main
from topd_jax.models import load
from topd_jax.training.logging import read_jsonl

pytestmark = pytest.mark.slow

# Heads for two devices, and rows of the vocabulary.
CONFIG = dataclasses.replace(RECURRENT, vocab_size=IDS + 1, kv_heads=4)
TOPD = "topd(candidates=2, window=4, guidance_weight=0.3)"
ASKED = {
    "train.steps": 3, "data.max_prompt_length": 120, "data.held_out": 3,
    "rollout.max_new_tokens": 16, "checkpoint.every": 1, "eval.every": 0,
}  # fmt: skip


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Directories of a student and a wider teacher, as Qwen3.5 is published."""
    folder = tmp_path_factory.mktemp("recurrent")
    wider = dataclasses.replace(CONFIG, width=24)
    names = {"student": make(CONFIG), "teacher": make(wider, 1)}
    for name, model in names.items():
        hub_directory(folder / name, model=model)
        fields = json.loads((folder / name / "config.json").read_text())
        assert fields["model_type"] == "qwen3_5_text"
    return folder


@pytest.fixture(scope="module")
def flags(pair):
    """What the command line is told, but for the work directory."""
    data = questions(pair / "questions.jsonl")
    given = ASKED | {
        "student.source": pair / "student", "teacher.source": pair / "teacher",
        "data.source": "jsonl", "data.path": data,
    }  # fmt: skip
    line = [f"--config.{name}={value}" for name, value in given.items()]
    return [
        f"--config={small_run.__file__}", *line, f"--config.objective={TOPD}",
        "--config.rollout.slots=4",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def one(flags, tmp_path_factory):
    """The work directory of a run on one device, which the preflight let by."""
    workdir = tmp_path_factory.mktemp("one")
    line = [*flags, f"--workdir={workdir}"]
    with pytest.raises(SystemExit) as done:
        main.run(["doctor", *line])
    assert done.value.code == 0
    main.run(["train", *line])
    return workdir


def losses(workdir):
    rows = read_jsonl(workdir / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert not any(row["skipped"] for row in rows)
    return [(row["divergence"], row["grad_norm"]) for row in rows]


def test_a_pair_is_trained_graded_and_exported(
    pair, flags, one, tmp_path, topd
):
    more = ["--which=start", f"--config.student.source={tmp_path / 'out'}",
            f"--workdir={tmp_path}"]  # fmt: skip
    line = [*flags, f"--workdir={one}"]
    assert all(grad > 0 for _, grad in losses(one))
    graded = json.loads(topd("eval", *line))
    assert graded["step"] == 3
    topd("export", *line, f"--output={tmp_path / 'out'}")
    again = json.loads(topd("eval", *line, *more))
    assert again["benchmarks"]["test"] == graded["benchmarks"]["test"]
    tokens = make_trajectories().sequence
    logits = [
        logits_of(load(str(where))[0], tokens)
        for where in (pair / "student", tmp_path / "out")
    ]
    assert np.abs(logits[0] - logits[1]).max() > 1e-3


def test_eight_devices_write_it_in_slots(flags, one, tmp_path):
    """Slots of recurrent layers lie on several devices."""
    on_eight_devices(
        "-m", "topd_jax.cli", "train", *flags, f"--workdir={tmp_path}",
        "--config.mesh.data=2", "--config.mesh.fsdp=2",
        "--config.mesh.tensor=2",
    )  # fmt: skip
    one, eight = (np.array(losses(where)) for where in (one, tmp_path))
    np.testing.assert_allclose(eight[:, 0], one[:, 0], rtol=1e-4)
    # Adam makes more of the last digits of a gradient, step by step.
    np.testing.assert_allclose(eight[0], one[0], rtol=1e-3)

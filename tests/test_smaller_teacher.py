"""A step with a teacher in fewer bits, and what topd quantize says of it."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_run import small_config

from topd_jax.cli import commands, main
from topd_jax.models import fingerprint
from topd_jax.models.quantization import is_quantized
from topd_jax.training.config import settings_from
from topd_jax.training.loop import initial_state
from topd_jax.training.phases import make_optimizer, make_phases
from topd_jax.training.setup import load_pair


def settings_with(cache, **changes):
    config = small_config()
    config.world.cache = str(cache)
    for name, value in changes.items():
        section, key = name.split("__")
        config[section][key] = value
    return settings_from(config)


HALF = {"teacher__dtype": "bfloat16", "teacher__param_dtype": "bfloat16"}


@pytest.mark.parametrize(
    "changes",
    [
        HALF,
        {"teacher__quantize": "int8"},
        HALF | {"teacher__quantize": "int4", "objective__stage": "offline"},
    ],
    ids=["bf16", "int8", "int4 in bf16, writing"],
)
def test_an_fp32_student_learns_from_it(world_cache, tmp_path, changes):
    settings = settings_with(world_cache, **changes)
    pair = load_pair(settings, tmp_path)
    teacher = pair.teacher
    kind = settings.teacher.quantize
    assert is_quantized(teacher.arrays["q"]) == bool(kind)
    assert teacher.arrays["embedding"].dtype == settings.teacher.param_dtype
    optimizer = make_optimizer(settings.optimizer, settings.train.steps)
    ids = {"eos_ids": pair.tokenizer.eos_ids, "pad_id": pair.tokenizer.pad_id}
    phases = make_phases(settings, optimizer, **ids)
    state = initial_state(pair, optimizer)
    before = np.asarray(state.student.arrays["q"])
    prompts = pair.place(next(pair.stream(settings)).prompts)
    key = jax.random.key(0)
    with jax.set_mesh(pair.mesh):
        written = phases.rollout(state.student, teacher, prompts, key)
        notes = phases.annotate(state.student, teacher, written, key)
        seen = phases.statistics(state.student, teacher, written)
        for _ in range(2):  # the first is all warm-up
            state, metrics = phases.update(state, teacher.head, written, notes)
    assert notes.teacher_hidden.dtype == settings.teacher.dtype
    assert notes.teacher_token_loss.dtype == jnp.float32
    for name, (total, count) in {**seen, **metrics}.items():
        assert total.dtype == jnp.float32, name
        assert np.isfinite(total), name
        assert count >= 0
    for name, x in state.student.arrays.items():
        assert x.dtype == jnp.float32, name
        assert np.isfinite(x).all(), name
    assert np.abs(state.student.arrays["q"] - before).max() > 0
    assert fingerprint(teacher) == pair.teacher_fingerprint


def test_the_command_measures_bytes_and_divergences(
    world_cache, small_arguments, tmp_path, capsys
):
    workdir = f"--workdir={tmp_path}"
    which = ("--which=start", "--count=5")
    main.run(["quantize", *small_arguments, workdir, *which])
    out, err = capsys.readouterr()
    found = json.loads(out)
    assert json.loads((tmp_path / "quantize-start.json").read_text()) == found
    assert "| int4 |" in err
    names = [row["teacher"] for row in found["rows"]]
    assert names == ["float32", "bfloat16", "int8", "int4"]
    float32, bfloat16, int8, int4 = found["rows"]
    assert float32["kl"] == pytest.approx(0, abs=1e-7)
    assert float32["change"] == 0
    assert bfloat16["bytes"] * 2 == float32["bytes"]
    assert float32["bytes"] > int8["bytes"] > int4["bytes"]
    assert 0 < int8["kl"] < int4["kl"]
    for row in found["rows"]:
        assert row["tokens"] == float32["tokens"] > 5
        assert row["reverse_kl"] == pytest.approx(
            float32["reverse_kl"] + row["change"]
        )
    quantised = settings_with(world_cache, teacher__quantize="int8")
    with pytest.raises(ValueError, match="quantised model; load it without"):
        commands.quantize(quantised, tmp_path, "start", 5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"teacher__quantize": "int2"}, "teacher.quantize='int2' must be int8"),
        (
            {"teacher__quantize_tile": 32},
            "teacher.quantize_tile=32 must be at least 0, and 0 .* where",
        ),
        (
            {"student__quantize": "int8"},
            "student.quantize='int8' would freeze what is to learn",
        ),
    ],
)
def test_settings_that_mean_nothing_are_refused(changes, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        settings_with(tmp_path, **changes)

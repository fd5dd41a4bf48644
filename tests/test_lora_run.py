"""A whole run of a LoRA student: resume, refusals, adapters out and in."""

import ast
import dataclasses
import json

import jax
import numpy as np
import pytest
from small_run import small_config
from test_train import assert_same_run, changed

from topd_jax.cli import commands
from topd_jax.models import DecoderConfig, load, load_adapter, merge_lora
from topd_jax.models.lora import frozen_fingerprint, split
from topd_jax.models.quantization import is_quantized
from topd_jax.training import loop as training
from topd_jax.training.adapters import adapt
from topd_jax.training.config import ModelSettings, settings_from
from topd_jax.training.logging import read_jsonl
from topd_jax.training.restore import load_student
from topd_jax.training.setup import load_pair


@pytest.fixture(scope="module")
def settings(world_cache):
    config = small_config()
    config.world.cache = str(world_cache)
    config.objective.variant = "opd"
    config.train.steps = 4
    config.eval.every = 0
    config.student.lora_rank = 3
    config.student.lora_alpha = 6.0
    config.optimizer.learning_rate = 1e-2
    return settings_from(config)


@pytest.fixture(scope="module")
def finished(settings, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("lora")
    training.train(settings, workdir)
    return workdir


@pytest.fixture(scope="module")
def student(finished, settings):
    pair = load_pair(settings, finished)
    return load_student(settings, finished, pair, "latest")[0]


def arrays(model):
    return {n: np.asarray(x) for n, x in model.arrays.items()}


def assert_equal(a, b):
    assert a.keys() == b.keys()
    for name, array in a.items():
        np.testing.assert_array_equal(b[name], array, err_msg=name)


def test_the_base_stays_and_is_not_saved(finished, student, settings):
    pair = load_pair(settings, finished)
    before, after = arrays(pair.student), arrays(student)
    for name, array in before.items():
        assert (array == after[name]).all() != ("_lora_" in name), name
    state = finished / "checkpoints" / "4" / "state"
    tree = json.loads((state / "_METADATA").read_text())["tree_metadata"]
    held = [part for path in tree for part in ast.literal_eval(path)]
    # An adapter and its two moments; nothing has a name of the base's.
    assert held.count("o_lora_a") == 3 == held.count("down_lora_b")
    assert not set(held) & set(split(pair.student)[1].arrays)


def test_a_run_that_stopped_ends_bit_identical(
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
    assert_same_run(finished, tmp_path, settings)
    rows = read_jsonl(finished / "metrics.jsonl")
    assert rows[0]["grad_norm"] > 0


def test_another_base_or_scale_is_refused(finished, settings):
    pair = load_pair(settings, finished)
    pair = dataclasses.replace(pair, frozen_fingerprint="f" * 64)
    with (
        jax.set_mesh(pair.mesh),
        pytest.raises(ValueError, match="adapters of another model"),
    ):
        training.Run(settings, finished, pair)
    with pytest.raises(ValueError, match=r"lora_alpha: 6.0 there, 7.0 here"):
        training.train(changed(settings, "student", lora_alpha=7.0), finished)


def test_adapters_go_out_and_in(finished, student, settings, tmp_path):
    out = tmp_path / "adapter"
    commands.export(settings, finished, "latest", out, adapter=True)
    fields = json.loads((out / "adapter_config.json").read_text())
    base, _ = load(fields["base_model_name_or_path"], unroll=1)
    assert_equal(arrays(load_adapter(base, out)), arrays(student))
    again = changed(settings, "student", lora_rank=0, adapter=str(out))
    again = changed(again, "teacher", source=fields["base_model_name_or_path"])
    again = changed(again, "teacher", adapter=str(out))
    pair = load_pair(again, tmp_path)
    assert_equal(arrays(pair.student), arrays(student))
    assert pair.teacher.config.lora is None
    for name, array in arrays(merge_lora(student)).items():
        got = pair.teacher.arrays[name]
        np.testing.assert_allclose(got, array, atol=1e-6)
    merged = tmp_path / "merged"
    commands.export(settings, finished, "latest", merged)
    assert_equal(arrays(load(merged)[0]), arrays(merge_lora(student)))


def test_adapters_learn_beside_a_quantised_base(settings, tmp_path):
    small = changed(settings, "student", quantize="int8")
    small = changed(small, "train", steps=2)
    training.train(small, tmp_path)
    pair = load_pair(small, tmp_path)
    student, _ = load_student(small, tmp_path, pair, "latest")
    assert is_quantized(student.arrays["q"])
    assert frozen_fingerprint(student) == pair.frozen_fingerprint
    assert student.arrays["q_lora_b"].any()  # it starts at zero
    assert merge_lora(student) is student  # samples with them beside it
    out = tmp_path / "adapter"
    commands.export(small, tmp_path, "latest", out, adapter=True)
    base, _ = load(pair.student_source, unroll=1)
    found = split(load_adapter(base, out))[0]
    assert_equal(arrays(found), arrays(split(student)[0]))
    with pytest.raises(ValueError, match="cannot export a quantised model"):
        commands.export(small, tmp_path, "latest", tmp_path / "whole")


def test_a_run_of_adapters_is_no_whole_model(finished, student):
    assert DecoderConfig.from_dict(student.config.to_dict()) == student.config
    with pytest.raises(ValueError, match="only a part of its student"):
        load(finished)


def test_settings_that_contradict_an_adapter_are_refused(
    finished, student, settings, tmp_path
):
    out = tmp_path / "adapter"
    commands.export(settings, finished, "latest", out, adapter=True)
    _, base = split(student)
    mesh = load_pair(settings, finished).mesh
    told = ModelSettings(adapter=str(out))
    agreed = dataclasses.replace(told, lora_rank=3, lora_alpha=6.0)
    for fine in (told, agreed):
        found = adapt(base, fine, mesh, train=True)
        assert found.config == student.config
    wrong = dataclasses.replace(agreed, lora_rank=8, lora_targets=("q",))
    with pytest.raises(ValueError, match=r"student.lora_rank=8, the adapter"):
        adapt(base, wrong, mesh, train=True)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"lora_rank": 0}, "no adapters to export: student.lora_rank=0"),
        ({"keep_layers": (0,)}, r"keep_layers=\(0,\): no file holds"),
    ],
)
def test_adapters_that_belong_to_no_file_are_refused(
    finished, settings, tmp_path, fields, message
):
    other = changed(settings, "student", **fields)
    with pytest.raises(ValueError, match=message):
        commands.export(other, finished, "latest", tmp_path / "x", adapter=True)

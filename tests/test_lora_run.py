"""A whole run of a LoRA student: resume, refusals, adapters out and in."""

import ast
import dataclasses
import json

import numpy as np
import pytest
from small_run import (
    assert_same_run,
    changed,
    interrupted,
    run_in,
    settings_with,
)
from small_step import assert_trees_equal

from topd_jax.cli.export import export
from topd_jax.models import DecoderConfig, load, load_adapter, merge_lora
from topd_jax.models.lora import frozen_fingerprint, split
from topd_jax.models.quantization import dequantize, is_quantized
from topd_jax.training import loop
from topd_jax.training.logging import read_jsonl
from topd_jax.training.restore import load_student
from topd_jax.training.setup import load_setup
from topd_jax.training.shapes import model_configs


@pytest.fixture(scope="module")
def settings(world_cache):
    return settings_with(
        world_cache, objective="opd", train__steps=3, eval__every=0,
        student__lora_rank=3, student__lora_alpha=6.0,
        optimizer__learning_rate=1e-2,
    )  # fmt: skip


@pytest.fixture(scope="module")
def finished(settings, setup, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("lora")
    run_in(settings, workdir, setup).train()
    return workdir


@pytest.fixture(scope="module")
def student(finished, settings, setup):
    return load_student(settings, finished, setup, "latest")[0]


def arrays(model):
    return {n: np.asarray(x) for n, x in model.arrays.items()}


def test_the_base_stays_and_is_not_saved(finished, student, setup):
    before, after = arrays(setup.student), arrays(student)
    for name, array in before.items():
        assert (array == after[name]).all() != ("_lora_" in name), name
    assert read_jsonl(finished / "metrics.jsonl")[0]["grad_norm"] > 0
    state = finished / "checkpoints" / "3" / "state"
    tree = json.loads((state / "_METADATA").read_text())["tree_metadata"]
    held = [part for path in tree for part in ast.literal_eval(path)]
    # An adapter and its two moments; nothing has a name of the base's.
    assert held.count("o_lora_a") == 3 == held.count("down_lora_b")
    assert not set(held) & set(split(setup.student)[1].arrays)
    # A run of adapters is no whole model.
    assert DecoderConfig.from_dict(student.config.to_dict()) == student.config
    with pytest.raises(ValueError, match="only a part of its student"):
        load(finished)


def test_a_run_that_stopped_ends_bit_identical(
    finished, settings, setup, tmp_path
):
    with interrupted(3):
        run_in(settings, tmp_path, setup).train()
    run_in(settings, tmp_path, setup).train()
    assert_same_run(finished, tmp_path)


def test_another_base_is_refused(finished, settings, setup):
    other = dataclasses.replace(setup, frozen_fingerprint="f" * 64)
    with pytest.raises(ValueError, match="adapters of another model"):
        run_in(settings, finished, other)


def test_adapters_go_out_and_in(finished, student, settings, setup, tmp_path):
    out, merged = tmp_path / "adapter", tmp_path / "merged"
    export(settings, finished, "latest", out, adapter=True)
    fields = json.loads((out / "adapter_config.json").read_text())
    source = fields["base_model_name_or_path"]
    base, _ = load(source, unroll=1)
    assert_trees_equal(arrays(load_adapter(base, out)), arrays(student))
    again = changed(
        settings, "student", lora_rank=0, lora_alpha=16.0, adapter=str(out)
    )
    again = changed(again, "teacher", source=source, adapter=str(out))
    loaded = load_setup(again, tmp_path)
    assert_trees_equal(arrays(loaded.student), arrays(student))
    teacher, whole = loaded.teachers[0].model, arrays(merge_lora(student))
    assert teacher.config.lora is None
    for name, array in whole.items():
        np.testing.assert_allclose(teacher.arrays[name], array, atol=1e-6)
    # Beside integers they stay apart.
    small = changed(again, "teacher", quantize="int8")
    teacher = load_setup(small, tmp_path).teachers[0].model
    assert is_quantized(teacher.arrays["q"])
    got = arrays(split(teacher)[0])
    assert_trees_equal(got, arrays(split(student)[0]))
    planned = model_configs(small)["teacher"]
    assert planned.lora.targets == teacher.config.lora.targets
    export(settings, finished, "latest", merged)
    assert_trees_equal(arrays(load(merged)[0]), whole)
    # It says itself what it is.
    with pytest.raises(ValueError, match="'lora_rank': 3} and student.adapter"):
        changed(again, "student", lora_rank=3)


def test_adapters_learn_beside_a_quantized_base(settings, tmp_path):
    small = changed(settings, "student", quantize="int8")
    small = changed(small, "train", steps=2)
    loop.train(small, tmp_path)
    setup = load_setup(small, tmp_path)
    student, _ = load_student(small, tmp_path, setup, "latest")
    assert is_quantized(student.arrays["q"])
    assert frozen_fingerprint(student) == setup.frozen_fingerprint
    assert student.arrays["q_lora_b"].any()  # it starts at zero
    assert merge_lora(student) is student  # samples with them beside it
    out = tmp_path / "adapter"
    export(small, tmp_path, "latest", out, adapter=True)
    base, _ = load(setup.student_source, unroll=1)
    restored = split(load_adapter(base, out))[0]
    assert_trees_equal(arrays(restored), arrays(split(student)[0]))
    export(small, tmp_path, "latest", tmp_path / "whole")
    whole = arrays(merge_lora(dequantize(student)))
    assert_trees_equal(arrays(load(tmp_path / "whole")[0]), whole)


def test_adapters_that_belong_to_no_file_are_refused(
    finished, settings, tmp_path
):
    for fields, message in (
        ({"lora_rank": 0, "lora_alpha": 16.0}, "no adapters to export: stud"),
        ({"keep_layers": (0,)}, r"keep_layers=\(0,\): no file holds"),
    ):
        other = changed(settings, "student", **fields)
        with pytest.raises(ValueError, match=message):
            export(other, finished, "latest", tmp_path / "x", adapter=True)

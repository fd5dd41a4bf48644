"""The preflight's estimates: mesh, dtypes, memory."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import pytest
from small_hub import CONFIG
from small_run import settings_with

from topd_jax.cli.doctor import fit, meshes
from topd_jax.models import (
    DecoderConfig,
    Lora,
    init_decoder,
    parameter_table,
)
from topd_jax.models.config import LORA_TARGETS
from topd_jax.parallel import sharding
from topd_jax.training.loop import init_state
from topd_jax.training.phases import make_optimizer, make_phases
from topd_jax.types import Prompts


def test_every_parameter_that_does_not_divide_is_named():
    mesh = jax.sharding.AbstractMesh((1, 5, 3, 1, 1), sharding.MESH_AXES)
    shape = dataclasses.replace(CONFIG, width=60, mlp_width=66)
    found = meshes.mesh_fit({"student": CONFIG, "teacher": shape}, mesh)
    assert [f.level for f in found] == ["error", "error"]
    assert found[0].text.startswith(
        "student: embedding: vocab=259 must be divisible by the mesh axes "
        "tensor (3); q: embed=64 must be divisible by the mesh axes fsdp (5)"
    )
    assert found[0].text.endswith("more parameters")
    assert "q: heads=4 must" in found[1].text
    assert "gate" not in found[1].text  # 60 and 66 divide
    (found,) = meshes.mesh_fit(
        {"student": CONFIG},
        jax.sharding.AbstractMesh((2, 4, 2, 1, 1), sharding.MESH_AXES),
    )
    assert found.level == "error"
    assert found.text == (
        "student: embedding: vocab=259 must be divisible by the mesh axes "
        "tensor (2); output: vocab=259 must be divisible by the mesh axes "
        "tensor (2)"
    )


def test_kv_heads_that_do_not_divide_are_gathered_at_every_token():
    mesh = jax.sharding.AbstractMesh((1, 4, 2, 1, 1), sharding.MESH_AXES)
    wide = settings_with(rollout__sharding="tensor")
    few = dataclasses.replace(CONFIG, heads=8, kv_heads=4)
    (found,) = meshes.decoding(wide, few, mesh)
    assert found.level == "warning"
    assert "4 kv heads over tensor x fsdp = 8 devices" in found.text
    enough = dataclasses.replace(few, kv_heads=8)
    assert meshes.decoding(wide, enough, mesh) == []
    assert meshes.decoding(settings_with(), few, mesh) == []
    rows = settings_with(rollout__sharding="rows")
    assert meshes.decoding(rows, few, mesh) == []


def test_updates_that_bfloat16_would_lose():
    narrow = dataclasses.replace(CONFIG, param_dtype="bfloat16")
    configs = {"student": narrow, "teacher": CONFIG}
    settings = settings_with(optimizer__learning_rate=2e-6)
    (found,) = fit.dtypes(settings, configs)
    assert found.level == "warning"
    assert "optimizer.learning_rate=2e-06 are lost in rounding" in found.text
    assert found.way_out == "--config.student.param_dtype=float32"
    # What the check claims, in bfloat16 itself.
    weight = jnp.bfloat16(CONFIG.width**-0.5)
    assert weight + jnp.bfloat16(2e-6) == weight
    assert weight + jnp.bfloat16(1e-2) != weight
    assert (
        fit.dtypes(settings_with(optimizer__learning_rate=1e-2), configs)[
            0
        ].level
        == "ok"
    )
    wide = {"student": CONFIG, "teacher": narrow}
    assert fit.dtypes(settings, wide)[0].level == "ok"


def test_what_a_device_has_not_is_a_warning(monkeypatch):
    mesh, configs = sharding.make_mesh(), {"student": CONFIG, "teacher": CONFIG}
    settings = settings_with()
    need = fit.estimate(settings, configs, mesh)
    for have, level in ((need.peak * 1.2, "ok"), (need.peak, "warning")):
        monkeypatch.setattr(fit, "device_bytes", lambda _, have=have: have)
        (found,) = fit.memory(settings, configs, mesh)
        assert (found.level, bool(found.way_out)) == (level, level != "ok")
    monkeypatch.setattr(fit, "device_bytes", lambda _: None)
    assert "does not say" in fit.memory(settings, configs, mesh)[0].text


def test_memory_is_shared_among_devices():
    settings = settings_with(data__batch_size=16)
    shape = dataclasses.replace(CONFIG, vocab_size=256)
    configs = {"student": shape, "teacher": shape}
    one, four, eight = (
        fit.estimate(
            settings, configs, jax.sharding.AbstractMesh(n, sharding.MESH_AXES)
        )
        for n in ((1, 1, 1, 1, 1), (1, 4, 1, 1, 1), (1, 4, 2, 1, 1))
    )
    # Norms alone are not spread.
    assert four.kept == pytest.approx(one.kept / 4, rel=0.02)
    assert eight.kept == pytest.approx(one.kept / 8, rel=0.05)
    assert four.rollout == pytest.approx(one.rollout / 4)
    assert eight.rollout == pytest.approx(one.rollout / 8)
    assert eight.update < four.update < one.update


def test_activations_are_shared_over_sequence():
    settings = settings_with(data__batch_size=16, objective__variant="opd")
    configs = {"student": CONFIG, "teacher": CONFIG}
    one, two, odd = (
        fit.estimate(
            dataclasses.replace(
                settings,
                data=dataclasses.replace(settings.data, batch_size=rows),
            ),
            configs,
            jax.sharding.AbstractMesh((1, 1, 1, 1, n), sharding.MESH_AXES),
        )
        for n, rows in ((1, 16), (2, 16), (2, 17))
    )
    assert two.kept == one.kept  # parameters are not
    assert two.rollout == pytest.approx(one.rollout / 2)
    assert two.annotate == pytest.approx(one.annotate / 2)
    # Of the update the states are whole on every device.
    states = 4 * one.kept / 5 + 4 * CONFIG.vocab_size * CONFIG.width
    assert two.update - states == pytest.approx((one.update - states) / 2)
    # Rows that do not divide over it stay whole where columns do not part.
    assert odd.rollout == pytest.approx(one.rollout * 17 / 16)


def test_adapters_and_fewer_bits_are_counted():
    mesh, configs = sharding.make_mesh(), {"student": CONFIG, "teacher": CONFIG}
    plain = fit.estimate(settings_with(), configs, mesh)
    numbers = sum(
        math.prod(row.shape) for row in parameter_table(CONFIG).values()
    )
    assert plain.kept == 5 * 4 * numbers
    lora = settings_with(student__lora_rank=1)
    low = fit.estimate(lora, configs, mesh)
    wide = dataclasses.replace(CONFIG, lora=Lora(1, 1.0, LORA_TARGETS))
    added = sum(
        math.prod(row.shape)
        for name, row in parameter_table(wide).items()
        if "_lora_" in name
    )
    assert low.kept == 2 * 4 * numbers + 4 * 4 * added
    assert low.update == plain.update - 4 * 4 * (numbers - added)
    small = fit.estimate(settings_with(teacher__quantize="int8"), configs, mesh)
    matrices = sum(
        math.prod(row.shape)
        for name, row in parameter_table(CONFIG).items()
        if name in ("q", "k", "v", "o", "gate", "up", "down")
    )
    assert small.kept == plain.kept - 3 * matrices


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rows", "remat", "variant"), [(8, "none", "topd"), (16, "full", "opd")]
)
def test_memory_is_what_the_compiler_says_within_a_factor(rows, remat, variant):
    settings = settings_with(
        data__batch_size=rows, data__max_prompt_length=64,
        rollout__max_new_tokens=64, objective__variant=variant,
    )  # fmt: skip
    shape = DecoderConfig(
        vocab_size=2048, layers=4, width=128, heads=4, kv_heads=2, head_dim=32,
        mlp_width=384, remat=remat,
    )  # fmt: skip
    configs = {
        "student": shape, "teacher": dataclasses.replace(shape, layers=8)
    }  # fmt: skip
    guess = fit.estimate(settings, configs, sharding.make_mesh())
    key = jax.random.key(0)
    optimizer = make_optimizer(settings.optimizer, 6)
    phases = make_phases(settings, optimizer, eos_ids=(2,), pad_id=0)
    student, teacher = (
        jax.eval_shape(lambda k, c=c: init_decoder(c, k), key)
        for c in configs.values()
    )
    state = jax.eval_shape(lambda m: init_state(m, optimizer), student)
    head = jax.eval_shape(lambda m: m.head, teacher)
    prompts = Prompts(
        jax.ShapeDtypeStruct((rows, 64), jnp.int32),
        jax.ShapeDtypeStruct((rows, 64), bool),
    )
    written = jax.eval_shape(phases.rollout, student, teacher, prompts, key)
    notes = jax.eval_shape(phases.annotate, student, teacher, written, key)
    most = 0
    for lowered in (
        phases.rollout.lower(student, teacher, prompts, key),
        phases.annotate.lower(student, teacher, written, key),
        phases.update.lower(state, head, written, notes),
    ):
        most = max(most, lowered.compile().memory_analysis().temp_size_in_bytes)
    models = [sum(x.size * 4 for x in jax.tree.leaves(m))
              for m in (state, student, teacher)]  # fmt: skip
    assert guess.kept == pytest.approx(sum(models), rel=0.01)
    assert 0.5 < guess.peak / (sum(models) + most) < 2

"""The preflight's estimates: mesh, dtypes, memory."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import pytest
from small_hub import CONFIG
from small_run import OBJECTIVE, settings_with

from topd_jax.cli.doctor import fit
from topd_jax.cli.doctor.files import Context, ModelFiles
from topd_jax.models import (
    DecoderConfig,
    Lora,
    init_decoder,
    parameter_table,
)
from topd_jax.models.config import LORA_TARGETS
from topd_jax.objectives.loading import make_objective
from topd_jax.parallel import sharding
from topd_jax.training.compiled import compile_step, make_optimizer
from topd_jax.training.step import init_state
from topd_jax.types import Prompts, Teacher

BOTH = {"student": CONFIG, "teacher": CONFIG}


def mesh_of(*sizes):
    return jax.sharding.AbstractMesh(sizes, sharding.MESH_AXES)


def checked(check, configs, mesh=None, settings=None):
    """The finding of one check."""
    models = {name: ModelFiles(config) for name, config in configs.items()}
    (found,) = check(Context(settings or settings_with(), models, [], mesh))
    return found


def test_parameters_that_do_not_divide_are_named():
    shape = dataclasses.replace(CONFIG, width=60, mlp_width=66)
    mesh = mesh_of(1, 5, 3, 1, 1)
    found = checked(fit.meshes, {"student": CONFIG, "teacher": shape}, mesh)
    assert found.level == "error"
    assert found.text.startswith(
        "student: embedding: vocab=259 must be divisible by the mesh axes "
        "tensor (3); student: q: embed=64 must be divisible by the mesh axes "
        "fsdp (5)"
    )
    found = checked(fit.meshes, {"teacher": shape}, mesh)
    assert "teacher: q: heads=4 must" in found.text
    assert "gate" not in found.text  # 60 and 66 divide
    fine = dataclasses.replace(CONFIG, vocab_size=260)
    found = checked(fit.meshes, {"student": fine}, mesh_of(2, 4, 2, 1, 1))
    assert (found.level, found.text) == ("ok", "data=2 x fsdp=4 x tensor=2")


def test_updates_that_bfloat16_would_lose():
    narrow = dataclasses.replace(CONFIG, param_dtype="bfloat16")
    configs = {"student": narrow, "teacher": CONFIG}
    settings = settings_with(optimizer__learning_rate=2e-6)
    found = checked(fit.dtypes, configs, settings=settings)
    assert found.level == "warning"
    assert "optimizer.learning_rate=2e-06 are lost in rounding" in found.text
    assert found.way_out == "--config.student.param_dtype=float32"
    # What the check claims, in bfloat16 itself.
    weight = jnp.bfloat16(CONFIG.width**-0.5)
    assert weight + jnp.bfloat16(2e-6) == weight
    assert weight + jnp.bfloat16(1e-2) != weight
    fast = settings_with(optimizer__learning_rate=1e-2)
    assert checked(fit.dtypes, configs, settings=fast).level == "ok"
    wide = {"student": CONFIG, "teacher": narrow}
    assert checked(fit.dtypes, wide, settings=settings).level == "ok"


def test_what_a_device_has_not_is_a_warning(monkeypatch):
    mesh = sharding.make_mesh()
    need = fit.estimate(settings_with(), BOTH, mesh)
    peak = need.pop("kept") + max(need.values())
    for have, level in ((peak * 1.2, "ok"), (peak, "warning")):
        monkeypatch.setattr(fit, "device_bytes", lambda _, have=have: have)
        found = checked(fit.memory, BOTH, mesh)
        assert (found.level, bool(found.way_out)) == (level, level != "ok")
    monkeypatch.setattr(fit, "device_bytes", lambda _: None)
    assert "does not say" in checked(fit.memory, BOTH, mesh).text


def test_memory_is_shared_among_devices():
    settings = settings_with(data__batch_size=16, objective="opd")
    shape = dataclasses.replace(CONFIG, vocab_size=256)
    configs = {"student": shape, "teacher": shape}
    one, four, eight, sequence = (
        fit.estimate(settings, configs, mesh_of(*n))
        for n in (
            (1, 1, 1, 1, 1), (1, 4, 1, 1, 1), (1, 4, 2, 1, 1), (1, 1, 1, 1, 2)
        )
    )  # fmt: skip
    # Norms alone are not spread.
    assert four["kept"] == pytest.approx(one["kept"] / 4, rel=0.02)
    assert eight["kept"] == pytest.approx(one["kept"] / 8, rel=0.05)
    assert four["rollout"] == pytest.approx(one["rollout"] / 4)
    assert eight["rollout"] == pytest.approx(one["rollout"] / 8)
    assert eight["update"] < four["update"] < one["update"]
    assert sequence["kept"] == one["kept"]  # parameters are not
    assert sequence["rollout"] == pytest.approx(one["rollout"] / 2)
    states = 4 * one["kept"] / 5
    assert sequence["update"] - states == pytest.approx(
        (one["update"] - states) / 2
    )


def numbers(config, *parts):
    return sum(
        math.prod(row.shape)
        for name, row in parameter_table(config).items()
        if not parts or any(part in name for part in parts)
    )


def test_adapters_and_fewer_bits_are_counted():
    mesh = sharding.make_mesh()
    plain = fit.estimate(settings_with(), BOTH, mesh)
    count = numbers(CONFIG)
    assert plain["kept"] == 5 * 4 * count
    lora = settings_with(student__lora_rank=1)
    low = fit.estimate(lora, BOTH, mesh)
    wide = dataclasses.replace(CONFIG, lora=Lora(1, 1.0, LORA_TARGETS))
    added = numbers(wide, "_lora_")
    assert low["kept"] == 2 * 4 * count + 4 * 4 * added
    assert low["update"] == plain["update"] - 4 * 4 * (count - added)
    small = fit.estimate(settings_with(teacher__quantize="int8"), BOTH, mesh)
    matrices = numbers(CONFIG) - numbers(CONFIG, "embed", "output", "norm")
    assert small["kept"] == plain["kept"] - 3 * matrices


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rows", "remat", "objective"),
    [(8, "none", OBJECTIVE), (16, "full", "opd")],
)
def test_memory_is_what_the_compiler_says_within_a_factor(
    rows, remat, objective
):
    settings = settings_with(
        data__batch_size=rows, data__max_prompt_length=64,
        rollout__max_new_tokens=64, objective=objective,
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
    stages = compile_step(
        settings, make_objective(objective), optimizer, eos_ids=(2,), pad_id=0
    )
    student, teacher = (
        jax.eval_shape(lambda k, c=c: init_decoder(c, k), key)
        for c in configs.values()
    )
    state = jax.eval_shape(lambda m: init_state(m, optimizer), student)
    teachers = (Teacher(teacher),)
    prompts = Prompts(
        jax.ShapeDtypeStruct((rows, 64), jnp.int32),
        jax.ShapeDtypeStruct((rows, 64), bool),
    )
    arguments = (student, teachers, prompts, key)
    written = jax.eval_shape(stages.rollout, *arguments)
    reading = (student, teachers, written, key)
    scored = jax.eval_shape(stages.score, *reading)
    most = max(
        lowered.compile().memory_analysis().temp_size_in_bytes
        for lowered in (
            stages.rollout.lower(*arguments),
            stages.score.lower(*reading),
            stages.train_step.lower(state, written, scored, None),
        )
    )
    kept = sum(x.size * 4 for m in (state, student, teacher)
               for x in jax.tree.leaves(m))  # fmt: skip
    assert guess["kept"] == pytest.approx(kept, rel=0.01)
    peak = guess.pop("kept") + max(guess.values())
    assert 0.5 < peak / (kept + most) < 2

"""The preflight's estimates: mesh, dtypes, memory."""

import dataclasses
import shutil

import jax
import jax.numpy as jnp
import pytest
from small_files import make
from small_hub import CONFIG
from small_run import OBJECTIVE, settings_with

from topd_jax.cli.doctor import fit
from topd_jax.cli.doctor.files import Context, ModelFiles
from topd_jax.models import DecoderConfig, save_model
from topd_jax.parallel import sharding
from topd_jax.planning.programs import bytes_held, calls, model_configs


def mesh_of(*sizes):
    return jax.sharding.AbstractMesh(sizes, sharding.MESH_AXES)


@pytest.fixture
def sources(tmp_path):
    """(student, teacher) -> the changes of settings that name their files."""

    def write(*shapes):
        names = ("student", "teacher")
        for name, shape in zip(names, shapes, strict=True):
            shutil.rmtree(tmp_path / name, ignore_errors=True)
            save_model(make(shape), tmp_path / name)
        return {f"{n}__source": str(tmp_path / n) for n in names}

    return write


def checked(check, settings, mesh=None):
    """The finding of one check."""
    configs = model_configs(settings).items()
    models = {name: ModelFiles(config) for name, config in configs}
    (found,) = check(Context(settings, models, [], mesh))
    return found


def test_a_parameter_that_does_not_divide_is_named(sources):
    settings = settings_with(**sources(CONFIG, CONFIG))
    found = checked(fit.meshes, settings, mesh_of(1, 5, 1, 1, 1))
    assert found.level == "error"
    assert "embed=64 must be divisible by the mesh axes fsdp (5)" in found.text
    mesh = mesh_of(1, 5, 1, 1, 1)
    models = {"student": ModelFiles(CONFIG)}
    assert not [*fit.memory(Context(settings, models, [], mesh))]
    fine = dataclasses.replace(CONFIG, vocab_size=260)
    settings = settings_with(**sources(fine, fine))
    found = checked(fit.meshes, settings, mesh_of(2, 4, 2, 1, 1))
    assert (found.level, found.text) == ("ok", "data=2 x fsdp=4 x tensor=2")


def test_updates_that_bfloat16_would_lose():
    narrow = dict(student__param_dtype="bfloat16")
    settings = settings_with(optimizer__learning_rate=2e-6, **narrow)
    found = checked(fit.dtypes, settings)
    assert found.level == "warning"
    assert "optimizer.learning_rate=2e-06 are lost in rounding" in found.text
    assert found.way_out == "--config.student.param_dtype=float32"
    # What the check claims, in bfloat16 itself.
    weight = jnp.bfloat16(settings.world.student_width**-0.5)
    assert weight + jnp.bfloat16(2e-6) == weight
    assert weight + jnp.bfloat16(1e-2) != weight
    fast = settings_with(optimizer__learning_rate=1e-2, **narrow)
    assert checked(fit.dtypes, fast).level == "ok"
    frozen = settings_with(
        optimizer__learning_rate=2e-6, teacher__param_dtype="bfloat16"
    )
    assert checked(fit.dtypes, frozen).level == "ok"


def test_what_a_device_has_not_is_a_warning(monkeypatch):
    mesh, settings = sharding.make_mesh(), settings_with()
    need = fit.estimate(settings, mesh)
    peak = need.pop("kept") + max(need.values())
    for have, level in ((peak * 1.2, "ok"), (peak, "warning")):
        monkeypatch.setattr(fit, "device_bytes", lambda _, have=have: have)
        found = checked(fit.memory, settings, mesh)
        assert (found.level, bool(found.way_out)) == (level, level != "ok")
    monkeypatch.setattr(fit, "device_bytes", lambda _: None)
    assert "does not say" in checked(fit.memory, settings, mesh).text


def test_memory_is_shared_among_devices(sources):
    shape = dataclasses.replace(CONFIG, vocab_size=256)
    settings = settings_with(
        data__batch_size=16, objective="opd", **sources(shape, shape)
    )
    one, four, eight, sequence = (
        fit.estimate(settings, mesh_of(*n))
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
    states = one["kept"]  # 4 of them, as kept with the teacher
    assert sequence["update"] - states == pytest.approx(
        (one["update"] - states) / 2, rel=1e-3
    )


def test_adapters_leave_a_smaller_update():
    mesh = sharding.make_mesh()
    plain = fit.estimate(settings_with(), mesh)
    for changes in (dict(student__lora_rank=1), dict(student__adapter="x")):
        low = fit.estimate(settings_with(**changes), mesh)
        assert low["kept"] < 0.6 * plain["kept"]
        assert low["update"] < plain["update"] - 0.8 * plain["kept"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rows", "remat", "objective"),
    [(8, "none", OBJECTIVE), (16, "full", "opd")],
)
def test_memory_is_what_the_compiler_says_within_a_factor(
    rows, remat, objective, sources
):
    shape = DecoderConfig(
        vocab_size=2048, layers=4, width=128, heads=4, kv_heads=2, head_dim=32,
        mlp_width=384,
    )  # fmt: skip
    settings = settings_with(
        data__batch_size=rows, data__max_prompt_length=64,
        rollout__max_new_tokens=64, objective=objective, student__remat=remat,
        **sources(shape, dataclasses.replace(shape, layers=8)),
    )  # fmt: skip
    mesh = sharding.make_mesh()
    guess = fit.estimate(settings, mesh)
    with jax.set_mesh(mesh):
        run = calls(settings, mesh)
        most = max(
            run[name].fn.lower(*run[name].args).compile()
            .memory_analysis().temp_size_in_bytes
            for name in ("rollout", "score", "train_step")
        )  # fmt: skip
    held = [bytes_held(x) for x in run["train_step"].live[:3]]
    assert guess["kept"] == sum(held)
    peak = guess.pop("kept") + max(guess.values())
    assert 0.5 < peak / (sum(held) + most) < 2

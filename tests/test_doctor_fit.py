"""The preflight's checks of shapes: mesh, dtypes, memory."""

import dataclasses
import shutil

import jax
import jax.numpy as jnp
import pytest
from small_files import make
from small_hub import CONFIG
from small_run import settings_with

from topd_jax.cli.doctor import fit
from topd_jax.cli.doctor.files import Context, ModelFiles
from topd_jax.models import save_model
from topd_jax.parallel import sharding
from topd_jax.training.shapes import model_configs


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
    """The findings of one check, by name."""
    configs = model_configs(settings).items()
    models = {name: ModelFiles(config) for name, config in configs}
    return {f.name: f for f in check(Context(settings, models, [], mesh))}


def test_a_parameter_that_does_not_divide_is_named(sources, monkeypatch):
    monkeypatch.setattr(fit, "device_bytes", lambda _: None)
    settings = settings_with(**sources(CONFIG, CONFIG))
    found = checked(fit.meshes, settings, mesh_of(1, 5, 1, 1, 1))
    assert list(found) == ["mesh"] and found["mesh"].level == "error"
    text = "embed=64 must be divisible by the mesh axes fsdp (5)"
    assert text in found["mesh"].text
    fine = dataclasses.replace(CONFIG, vocab_size=260)
    settings = settings_with(**sources(fine, fine))
    found = checked(fit.meshes, settings, mesh_of(2, 4, 2, 1, 1))
    mesh = found["mesh"]
    assert (mesh.level, mesh.text) == ("ok", "data=2 x fsdp=4 x tensor=2")
    assert found["memory"].level == "ok"
    assert found["memory"].text.endswith("does not say what it has")


def test_updates_that_bfloat16_would_lose():
    narrow = dict(student__param_dtype="bfloat16")
    settings = settings_with(optimizer__learning_rate=2e-6, **narrow)
    found = checked(fit.dtypes, settings)["dtype"]
    assert found.level == "warning"
    assert "optimizer.learning_rate=2e-06 are lost in rounding" in found.text
    assert found.way_out == "--config.student.param_dtype=float32"
    # What the check claims, in bfloat16 itself.
    weight = jnp.bfloat16(settings.world.student_width**-0.5)
    assert weight + jnp.bfloat16(2e-6) == weight
    assert weight + jnp.bfloat16(1e-2) != weight
    fast = settings_with(optimizer__learning_rate=1e-2, **narrow)
    assert checked(fit.dtypes, fast)["dtype"].level == "ok"
    for frozen in (dict(teacher__param_dtype="bfloat16"),
                   dict(student__lora_rank=1, **narrow)):  # fmt: skip
        settings = settings_with(optimizer__learning_rate=2e-6, **frozen)
        assert checked(fit.dtypes, settings)["dtype"].level == "ok"


def test_models_and_optimizer_must_fit_a_device(sources, monkeypatch):
    """Counted of their shapes, a device's part: norms alone are not spread."""
    shape = dataclasses.replace(CONFIG, vocab_size=256, mlp_width=512)
    files = sources(shape, shape)
    model = sum(x.nbytes for x in jax.tree.leaves(make(shape)))
    # Student, two moments and teacher; adapters learn, and have moments alone.
    for mesh, parts, changes in (
        (mesh_of(1, 4, 1, 1, 1), 4, {}),
        (mesh_of(1, 1, 1, 1, 1), 2, {"student__lora_rank": 1}),
    ):
        settings = settings_with(**files, **changes)
        for share, level in ((0.7, "ok"), (0.9, "warning")):
            have = 4 * model / parts / share
            monkeypatch.setattr(fit, "device_bytes", lambda _, n=have: n)
            found = checked(fit.meshes, settings, mesh)["memory"]
            assert (found.level, bool(found.way_out)) == (level, level != "ok")


def test_slices_that_leave_devices_without_rows():
    offline = {
        "train__stage": "offline", "offline__path": "solutions",
        "offline__pack_length": 64,
    }  # fmt: skip
    for accumulate, level, more in (
        (1, [], {}), (2, ["ok"], {}), (4, ["warning"], {}),
        (4, [], offline),  # whose rows divide whatever their number
    ):  # fmt: skip
        settings = settings_with(
            data__batch_size=8, data__samples=1,
            optimizer__accumulate=accumulate, **more,
        )  # fmt: skip
        found = checked(fit.slices, settings, mesh_of(2, 2, 1, 1, 1))
        assert [f.level for f in found.values()] == level

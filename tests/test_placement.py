"""The mesh that a run takes where its config is silent."""

import importlib

import pytest
from jax.sharding import AbstractMesh
from small_run import changed, settings_with

from topd_jax.parallel import sharding
from topd_jax.training import placement
from topd_jax.training.config import settings_from
from topd_jax.training.shapes import abstract_models, bytes_held

GIB = 2**30


@pytest.fixture(autouse=True)
def _no_devices(monkeypatch):
    """Meshes of devices that only have a number."""

    def mesh(*, devices, data=-1, fsdp=1, tensor=1, expert=1, sequence=1):
        others = fsdp * tensor * expert * sequence
        data = len(devices) // others if data == -1 else data
        shape = data, fsdp, tensor, expert, sequence
        return AbstractMesh(shape, sharding.MESH_AXES)

    monkeypatch.setattr(sharding, "make_mesh", mesh)


def chosen(settings, devices, memory):
    mesh = placement.make_run_mesh(settings, range(devices), memory)
    return tuple(mesh.shape[axis] for axis in ("data", "fsdp", "tensor"))


def published(name, **data):
    config = importlib.import_module(f"topd_jax.configs.{name}").get_config()
    for key, value in data.items():
        config.data[key] = value
    return settings_from(config)


def test_rows_are_spread_first_and_then_what_memory_asks_for():
    settings = settings_with()  # eight rows, and two heads
    assert chosen(settings, 8, GIB) == (8, 1, 1)
    assert chosen(settings, 16, GIB) == (8, 1, 2)
    # Half of the memory holds models and optimizer; not quite; and where no
    # mesh makes them small enough, the one that keeps least is taken.
    models = abstract_models(settings, sharding.make_mesh(devices=range(1)))
    kept = bytes_held((models.state, models.teachers))
    for memory, mesh in ((2.1, (8, 1, 1)), (1.9, (4, 1, 2)), (0.1, (1, 8, 1))):
        assert chosen(settings, 8, memory * kept) == mesh


@pytest.mark.parametrize(
    ("name", "devices", "memory", "mesh"),
    [
        # What was worked out by hand for these chips.
        ("paper_v5p", 4, 95, (1, 1, 4)),
        ("paper_v6e", 8, 32, (1, 2, 4)),
        ("paper_v5e", 16, 16, (1, 4, 4)),
        ("paper_tpu7x", 8, 96, (1, 2, 4)),
        ("qwen3_8b_to_1p7b", 8, 16, (1, 8, 1)),
    ],
)
def test_the_configs_of_the_paper_need_no_mesh(name, devices, memory, mesh):
    assert chosen(published(name), devices, memory * GIB) == mesh


def test_a_batch_that_cannot_use_the_devices_is_told_which_would():
    with pytest.raises(ValueError) as told:
        chosen(published("paper"), 64, 32 * GIB)
    assert "no mesh uses all 64 devices" in str(told.value)
    assert "at most mesh.tensor=4" in str(told.value)
    assert "--config.data.batch_size=16" in str(told.value)
    batch = published("paper", batch_size=16)
    assert chosen(batch, 64, 32 * GIB)[2] == 4
    slots = changed(batch, "rollout", slots=24)
    with pytest.raises(ValueError, match="try --config.rollout.slots=32, or"):
        chosen(slots, 64, 32 * GIB)

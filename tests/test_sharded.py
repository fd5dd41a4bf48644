"""The mesh: its errors here, the real step on 8 devices in a child process."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from topd_jax import sharding

HERE = Path(__file__).parent


def test_eight_devices_take_the_step_of_one():
    env = dict(
        os.environ,
        JAX_PLATFORMS="cpu",
        XLA_FLAGS="--xla_force_host_platform_device_count=8",
    )
    done = subprocess.run(
        [sys.executable, HERE / "sharded_step.py"],
        env=env,
        capture_output=True,
        text=True,
        timeout=1200,
    )
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert done.stdout.count("same on") == 12


def test_mesh_must_fit_the_devices():
    with pytest.raises(ValueError, match=r"needs 6 devices and there are 1"):
        sharding.make_mesh(3, 2, 1, devices=jax.devices()[:1])
    with pytest.raises(ValueError, match="must be positive"):
        sharding.make_mesh(-1, 0, 1)


def abstract_mesh(data, fsdp, tensor):
    sizes = (data, fsdp, tensor, 1)
    return jax.sharding.AbstractMesh(sizes, sharding.MESH_AXES)


def test_what_does_not_divide_is_refused_by_name():
    mesh = abstract_mesh(1, 8, 1)
    with pytest.raises(
        ValueError, match=r"batch_size: batch=12 must be divisible .*\(8\)"
    ):
        sharding.named(mesh, (12, 4), ("batch", None), name="batch_size")


def test_rules_refuse_one_axis_twice_and_unknown_names():
    with pytest.raises(ValueError, match="on two dimensions"):
        sharding.spec(("vocab", "heads"))
    with pytest.raises(ValueError, match="logical axis 'wings'"):
        sharding.spec(("wings",))

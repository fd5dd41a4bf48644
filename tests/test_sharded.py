"""The mesh: its errors here, the real step on 8 devices in a child process."""

import jax
import pytest
from children import LIBTPU, on_eight_devices, run_script

from topd_jax.parallel import sharding


@pytest.mark.slow
def test_eight_devices_take_the_step_of_one():
    assert on_eight_devices("sharded_step.py").count("same on") == 12


@pytest.mark.slow
def test_every_mesh_of_eight_devices_takes_the_step_of_one():
    assert on_eight_devices("sharded_shapes.py").count("same on") == 35


@pytest.mark.parametrize("loss", ["weighted", "recomputed", "normalised"])
def test_the_head_is_exchanged_once_and_not_at_every_chunk(loss):
    assert on_eight_devices("sharded_chunks.py", loss).count("bytes") == 2


@pytest.mark.slow
@pytest.mark.parametrize(("which", "shapes"), [("one", 1), ("others", 2)])
def test_devices_that_share_columns_take_the_step_of_one(which, shapes):
    said = on_eight_devices("sharded_sequence.py", which)
    assert said.count("same on") == shapes
    assert said.count("nobody computes") == (which == "one")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "rules"),
    [
        ("dense", "train"),
        ("dense", "gathered"),
        ("dense", "tensor"),
        ("dense", "rows"),
        ("experts", "train"),
        ("experts", "tensor"),
        ("experts", "rows"),
        ("columns", "train"),
        ("columns", "tensor"),
        ("columns", "rows"),
    ],
)
def test_no_program_gathers_a_whole(tmp_path, kind, rules):
    said = on_eight_devices("sharded_programs.py", tmp_path, kind, rules)
    programs = {"train": 6, "tensor": 1}.get(rules, 2)
    assert said.count("gathers no whole") == programs


@pytest.mark.slow
def test_no_program_of_a_tpu_gathers_a_whole(tmp_path):
    pytest.importorskip("libtpu", reason="pip install libtpu")
    for rules, programs in (("train", 6), ("tensor", 1), ("rows", 2)):
        said = run_script(
            "sharded_programs.py", tmp_path, "dense", rules, "v5e:2x4", **LIBTPU
        )
        assert said.count("gathers no whole") == programs


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["weighted", "recomputed", "normalised"])
def test_a_tpu_gathers_the_head_once(loss):
    pytest.importorskip("libtpu", reason="pip install libtpu")
    said = run_script("sharded_chunks.py", loss, "v5e:2x4", **LIBTPU)
    assert f"{loss} v5e:2x4" in said


TOP_K = """
import jax, numpy as np
from topd_jax.parallel import sharding
from topd_jax.parallel.collectives import top_k
x = np.random.default_rng(0).integers(0, 9, (8, 24)).astype(np.float32)
for shape in ((8, 1, 1), (1, 4, 2), (1, 1, 8)):
    mesh = sharding.make_mesh(*shape)
    for k in (1, 3, 20):  # many ties; 20 are more than a device has
        want = jax.lax.top_k(x, k)
        with jax.set_mesh(mesh):
            got = jax.jit(lambda x, k=k: top_k(x, k))(x)
        jax.tree.map(np.testing.assert_array_equal, tuple(want), got)
print("same")
"""


def test_the_best_of_spread_logits_are_those_of_all():
    assert "same" in on_eight_devices("-c", TOP_K)


def test_mesh_must_fit_the_devices():
    with pytest.raises(ValueError, match=r"needs 6 devices and there are 1"):
        sharding.make_mesh(3, 2, 1, devices=jax.devices()[:1])
    with pytest.raises(ValueError, match="must be positive"):
        sharding.make_mesh(-1, 0, 1)


def abstract_mesh(data, fsdp, tensor):
    sizes = (data, fsdp, tensor, 1, 1)
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

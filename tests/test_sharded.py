"""The mesh: its errors here, the real step on 8 devices in a child process."""

import jax
import jax.numpy as jnp
import pytest
from children import LIBTPU, on_eight_devices, run_script

from topd_jax.parallel import sharding
from topd_jax.parallel.layouts import loss_layout
from topd_jax.parallel.rules import RULES, rules_in_force, using

AUTO = (jax.sharding.AxisType.Auto,) * 2
OTHER = jax.sharding.AbstractMesh((4, 2), ("x", "y"), axis_types=AUTO)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "which", "count"),
    [
        ("step", "meshes", 5),
        ("step", "objectives", 6),
        ("step", "columns", 2),
        ("step", "recurrent", 2),
        ("models", "experts", 4),
        ("models", "quantized", 2),
        ("models", "foreign", 2),
        ("models", "flash", 3),
        ("rollout", "rollouts", 5),
        ("rollout", "slots", 4),
        ("rollout", "decode", 4),
    ],
)
def test_eight_devices_compute_what_one_does(script, which, count):
    printed = on_eight_devices(f"sharded_{script}.py", which)
    assert printed.count("same on") == count
    assert printed.count("nobody computes") == (which == "columns")


def test_the_head_is_exchanged_once_and_not_at_every_chunk():
    """And the best of spread logits are those of all."""
    printed = on_eight_devices("sharded_chunks.py", "sent")
    assert printed.count("bytes") == 6 and printed.count("same best") == 3


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "programs"), [("dense", 11), ("experts", 9), ("columns", 9)]
)
def test_no_program_gathers_a_whole(tmp_path, kind, programs):
    printed = on_eight_devices("sharded_programs.py", tmp_path, kind)
    assert printed.count("gathers no whole") == programs


@pytest.mark.slow
def test_no_program_of_a_tpu_gathers_a_whole(tmp_path):
    pytest.importorskip("libtpu", reason="pip install libtpu")
    printed = run_script(
        "sharded_programs.py", tmp_path, "dense", "v5e:2x4", **LIBTPU
    )
    assert printed.count("gathers no whole") == 9
    printed = run_script("sharded_chunks.py", "sent", "v5e:2x4", **LIBTPU)
    assert printed.count("v5e:2x4") == 3


def test_mesh_must_fit_the_devices():
    with pytest.raises(ValueError, match=r"needs 6 devices and there are 1"):
        sharding.make_mesh(3, 2, 1, devices=jax.devices()[:1])
    with pytest.raises(ValueError, match=r"fsdp=0 x .* needs 0 devices"):
        sharding.make_mesh(-1, 0, 1)


def test_what_does_not_divide_is_refused_by_name():
    mesh = jax.sharding.AbstractMesh((1, 8, 1, 1, 1), sharding.MESH_AXES)
    with pytest.raises(
        ValueError, match=r"batch_size: batch=12 must be divisible .*\(8\)"
    ):
        sharding.named(mesh, (12, 4), ("batch", None), name="batch_size")


def test_rules_refuse_unknown_names():
    with pytest.raises(ValueError, match="logical axis 'wings'"):
        sharding.spec_on(sharding.make_mesh(), ("wings",))


def test_a_mesh_with_other_axes_asks_for_rules():
    words = r"'batch' names the mesh axis 'data' and the mesh has x, y.*using\("
    x = jnp.ones((8, 6))

    @jax.jit
    def pinned(x):
        return sharding.constrain(x, "batch", "vocab")

    with jax.sharding.use_abstract_mesh(OTHER):
        for call in (lambda: jax.eval_shape(pinned, x), loss_layout):
            with pytest.raises(ValueError, match=words):
                call()
        with using({"batch": "x", "vocab": "y"}):
            assert "P('x', 'y')" in str(jax.make_jaxpr(pinned)(x))
            assert loss_layout().ways["tokens"] == 4
            assert loss_layout() == loss_layout(), "else each call compiles"
    # What a mesh has by default in newer versions of JAX.
    kinds = (jax.sharding.AxisType.Explicit,) * 2
    explicit = jax.sharding.AbstractMesh((4, 2), ("x", "y"), axis_types=kinds)
    with (
        jax.sharding.use_abstract_mesh(explicit),
        pytest.raises(ValueError, match=r"axes x, y .*Auto,\) \* 2"),
    ):
        jax.eval_shape(pinned, x)
    with pytest.raises(ValueError, match=words):
        sharding.named(OTHER, (8, 6), ("batch", None))
    one = jax.sharding.AbstractMesh((1, 1), ("x", "y"))
    with jax.sharding.use_abstract_mesh(one):
        assert jax.eval_shape(pinned, x).shape == x.shape
        spec = sharding.named(one, (8, 6), ("batch", None)).spec
        assert tuple(spec) == (None, None)


def test_rules_complete_themselves_and_trace_again():
    assert rules_in_force() == RULES
    traced = []
    ask = jax.jit(lambda x: traced.append(rules_in_force()["draws"]) or x)
    derived = ("product_batch", "tokens", "draws")
    ask(1.0)
    with using({"batch": "x", "vocab": "y", "sequence": "z"}):
        ask(1.0)
        assert rules_in_force()["embed"] is None
    ask(1.0)
    assert traced == [RULES["draws"], ("x", "z", "y")]
    with using({k: v for k, v in RULES.items() if k not in derived}):
        assert rules_in_force() == RULES

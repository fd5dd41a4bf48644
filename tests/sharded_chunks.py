"""The fused losses on eight simulated devices: equal to one, and frugal.

    sharded_chunks.py meshes      values and gradients, on any mesh
    sharded_chunks.py sent        what the losses send at every chunk; and top_k
    sharded_chunks.py sent v5e:2x4

Hidden states of 8 rows are compared with a teacher's, in chunks of 32 tokens:
devices may exchange the head and its gradient once, not once a chunk. With a
topology, as its compiler has it, from shapes alone.
"""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from numpy.testing import assert_allclose
from small_heads import heads, weights_of

from topd_jax.losses import fused
from topd_jax.parallel import sharding
from topd_jax.parallel.collectives import top_k
from topd_jax.parallel.layouts import loss_layout
from topd_jax.planning import hlo, hlo_cost
from topd_jax.planning.chips import topology_devices, without_tpu

ROWS, WIDTH, VOCAB = 8, 32, 512
STUDENT = ("student_hidden", "student_head")


def shapes_of(tokens):
    return {
        "student_hidden": (ROWS, tokens, WIDTH),
        "student_head": (VOCAB, WIDTH),
        "teacher_hidden": (ROWS, tokens, 2 * WIDTH),
        "teacher_head": (VOCAB, 2 * WIDTH),
        "weights": (ROWS, tokens),
    }


def weighted(student, fixed):
    layout = loss_layout(chunk_size=32)
    return fused.fused_weighted_sum(**student, **fixed, layout=layout)[0]


def recomputed(student, fixed):
    fixed = dict(fixed)
    weights = fixed.pop("weights")
    layout = loss_layout(chunk_size=32)
    losses = fused.fused_divergence(**student, **fixed, layout=layout)
    return jnp.sum(weights * losses)


def normalized(student, fixed):
    """Of the student alone, by which guidance divides."""
    totals = fused.fused_log_normalizer(
        *(student[n] for n in STUDENT), layout=loss_layout(chunk_size=32)
    )
    return jnp.sum(fixed["weights"] * totals)


def compiled_for(loss, tokens, sizes, devices=None):
    """A loss's gradient on a mesh, compiled."""
    mesh = sharding.make_mesh(**sizes, devices=devices)
    fixed = {}
    for name, shape in shapes_of(tokens).items():
        axes = ("batch", None, None)[: len(shape)]
        if name.endswith("head"):
            axes = ("vocab", "embed")
        place = sharding.named(mesh, shape, axes)
        fixed[name] = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=place)
    student = {n: fixed.pop(n) for n in STUDENT}
    places = {n: x.sharding for n, x in student.items()}
    fn = jax.jit(jax.grad(loss), out_shardings=places)
    with jax.set_mesh(mesh):
        return fn.lower(student, fixed).compile()


def sent_by(compiled):
    return hlo_cost.count(hlo.parse(compiled.as_text())).sent


def sent_once(loss, topology="", **sizes):
    """Four times the tokens: no more is sent, on devices of a topology too."""
    devices = topology_devices(topology) if topology else None
    few, many = (
        sent_by(compiled_for(loss, tokens, sizes, devices))
        for tokens in (64, 256)
    )
    # Between tensor devices the states' gradient is summed a token.
    states = 2 * 4 * WIDTH * ROWS * (256 - 64) if "tensor" in sizes else 0
    assert few <= many <= 1.1 * few + states, (few, many)
    where = f"{topology} {sizes}"
    print(f"{loss.__name__} {where}: {few:.0f} then {many:.0f} bytes")


def on_meshes():
    """Every face, on meshes of any axes and on the project's own."""
    shape = (8, 6)
    arrays, weights = heads(shape, (32, 32)), weights_of(shape)
    tokens = jnp.arange(48).reshape(shape) % 32

    def both(layout, *arrays):
        def face(*arrays):
            total, each = fused.fused_weighted_sum(
                *arrays, weights, layout=layout
            )
            again = fused.fused_divergence(*arrays, layout=layout)
            logp = fused.fused_token_logprobs(
                *arrays[:2], tokens, layout=layout
            )
            total += jnp.sum(weights * (3 * again - logp))
            totals = fused.fused_log_normalizer(*arrays[:2], layout=layout)
            return total + jnp.sum(totals), (each, logp, totals)

        return jax.value_and_grad(face, (0, 1), has_aux=True)(*arrays)

    def compare(layout, mesh, axes):
        axes = [(axes[0], axes[1], None), axes[2:]] * 2
        places = [
            jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*a))
            for a in axes
        ]
        spread = jax.jit(both, static_argnums=0)(
            layout, *map(jax.device_put, arrays, places)
        )
        for got, want in zip(
            jax.tree.leaves(spread), jax.tree.leaves(one), strict=True
        ):
            scale = np.abs(want).max()
            assert_allclose(got, want, 3e-6, 3e-6 * scale)
        print(dict(mesh.shape), "equal one device")

    one = jax.jit(both, static_argnums=0)(loss_layout(chunk_size=16), *arrays)
    for sizes, rules, axes in (
        ((4, 2), {"batch": "x", "tokens": "x", "vocab": "y"},
         ("x", None, "y", None)),
        ((2, 4), {"sequence": "x", "tokens": "x", "vocab": "y", "embed": "x"},
         (None, "x", "y", "x")),
    ):  # fmt: skip
        mesh = jax.make_mesh(sizes, ("x", "y"), (AxisType.Auto,) * 2)
        layout = loss_layout(mesh, rules, chunk_size=16)
        assert layout.ways_of("tokens") == sizes[0]
        assert layout.ways_of("vocab") == sizes[1]
        compare(layout, mesh, axes)
    refused = pytest.raises(ValueError, match="the mesh has x, y; pass rules")
    with jax.set_mesh(mesh), refused:
        loss_layout()
    mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
    with jax.set_mesh(mesh):
        rows = ("data", "fsdp")
        compare(loss_layout(chunk_size=16), mesh, (rows, None, "tensor", None))


def best():
    """The largest of logits spread over the vocabulary, with many ties."""
    x = np.random.default_rng(0).integers(0, 9, (8, 24)).astype(np.float32)
    for shape in ((8, 1, 1), (1, 4, 2), (1, 1, 8)):
        with jax.set_mesh(sharding.make_mesh(*shape)):
            for k in (1, 20):  # 20 are more than a device has
                got = jax.jit(top_k, static_argnums=1)(x, k)
                want = jax.lax.top_k(x, k)
                jax.tree.map(np.testing.assert_array_equal, tuple(want), got)
        print(f"same best on {shape}")


def sent(topology=""):
    if topology:
        without_tpu()
    else:
        best()
    for loss in (weighted, recomputed, normalized):
        sent_once(loss, topology, fsdp=8)
        if not topology:
            sent_once(loss, data=2, fsdp=2, tensor=2)


if __name__ == "__main__":
    {"meshes": on_meshes, "sent": sent}[sys.argv[1]](*sys.argv[2:])

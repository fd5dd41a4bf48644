"""What the fused losses send at every chunk, on eight simulated devices.

Hidden states of 8 rows are compared with a teacher's, in chunks of 32 tokens:
value and gradients must be those of one device, and devices may exchange the
head and its gradient once, not once a chunk. With a topology, "v5e:2x4", as
its compiler has it, from shapes alone.
"""

import sys

import jax
import jax.numpy as jnp
import numpy as np

from topd_jax.losses import fused, trajectory
from topd_jax.parallel import sharding
from topd_jax.planning import hlo, hlo_cost
from topd_jax.planning.command import without_a_tpu
from topd_jax.planning.programs import topology_devices

ROWS, WIDTH, VOCAB = 8, 32, 512
STUDENT = ("student_hidden", "student_head")


def inputs(tokens):
    keys = jax.random.split(jax.random.key(0), 5)
    shapes = {
        "student_hidden": (ROWS, tokens, WIDTH),
        "student_head": (VOCAB, WIDTH),
        "teacher_hidden": (ROWS, tokens, 2 * WIDTH),
        "teacher_head": (VOCAB, 2 * WIDTH),
        "weights": (ROWS, tokens),
    }
    return {
        name: jax.random.normal(key, shape)
        for key, (name, shape) in zip(keys, shapes.items(), strict=True)
    }


def weighted(student, fixed):
    return fused.fused_weighted_sum(**student, **fixed, chunk_size=32)[0]


def recomputed(student, fixed):
    fixed = dict(fixed)
    weights = fixed.pop("weights")
    losses = fused.fused_divergence(**student, **fixed, chunk_size=32)
    return jnp.sum(weights * losses)


def normalised(student, fixed):
    """Of the student alone, by which guidance divides."""
    totals = trajectory.fused_log_normalizer(
        student["student_hidden"], student["student_head"], chunk_size=32
    )
    return jnp.sum(fixed["weights"] * totals)


def compiled_for(loss, tokens, sizes, devices=None):
    """(a loss's gradient on a mesh, compiled; its inputs; their places)."""
    arrays = inputs(tokens)
    axes = {n: ("batch", None, None)[: x.ndim] for n, x in arrays.items()}
    axes |= dict.fromkeys(("student_head", "teacher_head"), ("vocab", "embed"))
    mesh = sharding.make_mesh(**sizes, devices=devices)
    places = {
        name: sharding.named(mesh, x.shape, axes[name])
        for name, x in arrays.items()
    }
    shapes = {
        name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=places[name])
        for name, x in arrays.items()
    }
    student = {n: shapes.pop(n) for n in STUDENT}
    fn = jax.jit(jax.grad(loss), out_shardings={n: places[n] for n in STUDENT})
    with jax.set_mesh(mesh):
        return fn.lower(student, shapes).compile(), arrays, places


def sent_by(compiled):
    return hlo_cost.count(hlo.parse(compiled.as_text())).sent


def run(loss, tokens, sizes):
    """(gradients, bytes sent by a device) of a loss on a mesh."""
    compiled, arrays, places = compiled_for(loss, tokens, sizes)
    arrays = {n: jax.device_put(x, places[n]) for n, x in arrays.items()}
    student = {n: arrays.pop(n) for n in STUDENT}
    return compiled(student, arrays), sent_by(compiled)


def on_topology(loss, topology):
    without_a_tpu()
    devices = topology_devices(topology)
    few, many = (
        sent_by(compiled_for(loss, n, dict(fsdp=8), devices)[0])
        for n in (64, 256)
    )
    assert many <= 1.1 * few, (few, many)
    print(f"{loss.__name__} {topology}: {few:.0f} then {many:.0f} bytes")


def main(loss):
    arrays = inputs(64)
    student = {n: arrays.pop(n) for n in STUDENT}
    plain = jax.grad(loss)(student, arrays)
    for sizes in (dict(fsdp=8), dict(data=2, fsdp=2, tensor=2)):
        spread, few = run(loss, 64, sizes)
        for name, wanted in plain.items():
            np.testing.assert_allclose(
                spread[name], wanted, rtol=2e-4, atol=2e-4
            )
        _, many = run(loss, 256, sizes)
        # Between tensor devices the states' gradient is summed a token.
        states = 2 * 4 * WIDTH * ROWS * (256 - 64) if "tensor" in sizes else 0
        assert few <= many <= 1.1 * few + states, (few, many)
        print(f"{loss.__name__} {sizes}: {few:.0f} then {many:.0f} bytes")


if __name__ == "__main__":
    losses = (weighted, recomputed, normalised)
    chosen = {loss.__name__: loss for loss in losses}[sys.argv[1]]
    if len(sys.argv) > 2:
        on_topology(chosen, sys.argv[2])
    else:
        main(chosen)

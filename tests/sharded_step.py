"""The step on 8 simulated devices against one device; run by test_sharded.

python sharded_step.py meshes|objectives|columns|recurrent
"""

import dataclasses
import math
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
from conftest import EOS, PAD, VOCAB, make_model, make_trajectories
from jax.sharding import AxisType, Mesh
from small_files import RECURRENT, adapted

from topd_jax.models import Lora, init_decoder, merge_lora
from topd_jax.models.attention import core
from topd_jax.models.config import LORA_TARGETS, DecoderConfig
from topd_jax.models.lora import join, split
from topd_jax.objectives import presets
from topd_jax.objectives.objective import NearFuture
from topd_jax.parallel import sharding
from topd_jax.parallel.rules import using
from topd_jax.training.score import score
from topd_jax.training.step import init_state, train_step
from topd_jax.types import Scored, Teacher

# Branches apart from their prefix, as many and long ones are.
core._FEW_BEHIND = 0
# A mixture has parameters for every axis.
MIXTURE = DecoderConfig(
    vocab_size=VOCAB, layers=2, width=16, heads=8, kv_heads=8, head_dim=4,
    mlp_width=16, experts=8, experts_per_token=2, expert_width=16,
)  # fmt: skip
# Rules of a mesh whose axes are named otherwise.
OTHER_RULES = {"batch": "rows", "embed": "rows"} | dict.fromkeys(
    ("vocab", "heads", "kv_heads", "mlp", "activation_heads",
     "activation_kv_heads", "activation_mlp"), "columns",
)  # fmt: skip
AUTO = AxisType.Auto
AHEAD = NearFuture(candidates=3, window=4, branch_fraction=1.0)
TOPD = {
    context: presets.topd(near_future=AHEAD, context=context)
    for context in ("student", "teacher")
}


def place(model, mesh):
    shards = sharding.tree_shardings(model, mesh, model.logical_axes)
    return jax.device_put(model, shards)


def spread(batch, mesh):
    return jax.device_put(batch, sharding.batch_shardings(batch, mesh))


def run(
    mesh, objective, models=None, rows=None, accumulate=1, **scoring
) -> tuple:
    """(updated student, metrics, distances, teacher windows), on the host."""
    student, *teachers = models or (
        make_model(0), make_model(1, layers=3, width=24)
    )  # fmt: skip
    rows = make_trajectories(rows=16) if rows is None else rows
    rows = spread(rows, mesh)
    optimizer = optax.sgd(1.0)
    # Of three prompts the second teacher has two.
    teachers = tuple(
        Teacher(place(model, mesh), "ab"[i], i + 1)
        for i, model in enumerate(teachers)
    )

    @jax.jit
    def step(student, teachers, rows):
        scored = score(
            student, teachers, rows, jax.random.key(0), objective=objective,
            eos_ids=(EOS,), pad_id=PAD, **scoring,
        )  # fmt: skip
        frozen = split(student)[1]
        state, metrics = train_step(
            init_state(student, optimizer), rows, scored, frozen,
            objective=objective, optimizer=optimizer, accumulate=accumulate,
        )  # fmt: skip
        ahead = [(s.distance, s.teacher_windows) for s in scored]
        return merge_lora(join(state.student, frozen)), metrics, ahead

    with jax.set_mesh(mesh):
        out = step(place(student, mesh), teachers, rows)
    whole = {x.sharding.is_fully_replicated for x in jax.tree.leaves(out[0])}
    axes = {"fsdp", "tensor", "columns"}
    if any(size > 1 and name in axes for name, size in mesh.shape.items()):
        assert False in whole, "no parameter is spread"
    return jax.device_get(out)


def run_mixture(mesh, config=MIXTURE, branch_sharding="train", **shape):
    make = jax.jit(init_decoder, static_argnums=0)
    models = [make(config, jax.random.key(i)) for i in (0, 1)]
    rows = make_trajectories(rows=8, **shape)
    return run(
        mesh, TOPD["teacher"], models, rows, branch_sharding=branch_sharding
    )


def assert_same(expected, found, atol=2e-5):
    for x, y in zip(
        jax.tree.leaves(expected), jax.tree.leaves(found), strict=True
    ):
        np.testing.assert_allclose(jnp.asarray(x), y, rtol=2e-4, atol=atol)


def one_device():
    return sharding.make_mesh(devices=jax.devices()[:1])


def meshes():
    """Every two axes beside a third, and all eight devices on one."""
    expected = run_mixture(one_device())
    for shape in (
        (2, 2, 2, 1, 1), (2, 1, 1, 2, 2), (1, 2, 1, 2, 2), (1, 1, 2, 2, 2),
        (1, 1, 8, 1, 1),
    ):  # fmt: skip
        assert_same(expected, run_mixture(sharding.make_mesh(*shape)))
        print(f"same on {shape}", flush=True)


def recurrent():
    """Layers with a state: OPD and branches, heads and columns spread."""
    config = dataclasses.replace(RECURRENT, vocab_size=VOCAB, kv_heads=4)
    expected = run_mixture(one_device(), config)
    mesh = sharding.make_mesh(1, 2, 2, 1, 2)
    for rules in ("train", "rows"):
        found = run_mixture(mesh, config, branch_sharding=rules)
        assert_same(expected, found)
        print(f"same on several axes by {rules}", flush=True)


def objectives():
    sampled = presets.topd(
        near_future=dataclasses.replace(AHEAD, branch_temperature=1.0),
        branch_loss="reverse_kl",
    )
    two = make_model(0), make_model(1, layers=1, width=24), make_model(2)
    mixed = 2, 2, 2
    for name, shape, objective, models, options in (
        ("student context", mixed, TOPD["student"], None, dict(accumulate=2)),
        ("gathered", mixed, sampled, None, dict(branch_sharding="gathered")),
        ("two teachers", mixed, presets.opd(), two, {}),
        ("adapters", mixed, presets.opd(),
         (adapted(make_model(0), Lora(4, 8.0, LORA_TARGETS)), make_model(2)),
         dict(accumulate=2)),
    ):  # fmt: skip
        rows = make_trajectories(rows=24 if models is two else 16)
        expected = run(one_device(), objective, models, rows)
        mesh = sharding.make_mesh(*shape)
        found = run(mesh, objective, models, rows, **options)
        assert_same(expected, found)
        print(f"same on {shape}: {name}", flush=True)
    expected = run(one_device(), sampled)
    few_heads = sharding.make_mesh(1, 4, 2)
    assert_same(expected, run(few_heads, sampled, branch_sharding="rows"))
    print("same on more devices than heads", flush=True)
    with using(OTHER_RULES):
        devices = np.array(jax.devices()).reshape(4, 2)
        mesh = Mesh(devices, ("rows", "columns"), axis_types=(AUTO, AUTO))
        assert_same(expected, run(mesh, sampled, branch_sharding="rows"))
    print("same on a mesh with other axes", flush=True)


def columns():
    """Attention in blocks of queries, as where sequences are long."""
    core._LONG_SCORES = core._BLOCK_SCORES = 1
    for shape, context, accumulate in (
        ((1, 2, 2, 1, 2), "student", 2),
        ((2, 1, 1, 1, 4), "teacher", 2),
    ):
        expected = run(one_device(), TOPD[context])
        mesh = sharding.make_mesh(*shape)
        assert_same(expected, run(mesh, TOPD[context], accumulate=accumulate))
        print(f"same on {shape}, {context}, {accumulate}", flush=True)
    each_computes_its_part(parts=8, length=2048)


def each_computes_its_part(parts, length):
    """Scores, feed-forward columns and logits of a step: an eighth each."""
    from topd_jax.parallel.layouts import loss_layout
    from topd_jax.planning import hlo

    student, optimizer, mesh = (
        make_model(0), optax.sgd(1.0), sharding.make_mesh(sequence=parts)
    )  # fmt: skip
    rows = make_trajectories(rows=1, prompt=16, completion=length - 16)
    shape = rows.tokens.shape
    scored = Scored(student.head, jnp.zeros((*shape, 16)), jnp.zeros(shape))

    @jax.jit
    def learn(state, rows, scored):
        return train_step(
            state, rows, (scored,), objective=presets.opd(),
            optimizer=optimizer, layout=loss_layout(chunk_size=256),
        )  # fmt: skip

    with jax.set_mesh(mesh):
        state = init_state(place(student, mesh), optimizer)
        compiled = learn.lower(state, rows, scored).compile()
    computed = {
        array.shape
        for computation in hlo.parse(compiled.as_text()).computations.values()
        for instruction in computation.instructions.values()
        for array in instruction.arrays
        if instruction.op in ("exponential", "logistic", "dot")
    }
    part = -(-(length // parts) // 128) * 128
    heads, hidden = student.config.heads, student.config.mlp_width
    most = {length: heads * 128 // parts, VOCAB: part, hidden: part}
    for last, others in most.items():
        sizes = [math.prod(s[:-1]) for s in computed if s and s[-1] == last]
        assert sizes and max(sizes) <= others, (last, computed)
    print("nobody computes another's columns", flush=True)


if __name__ == "__main__":
    assert jax.device_count() == 8
    parts = (meshes, objectives, columns, recurrent)
    {part.__name__: part for part in parts}[sys.argv[1]]()

"""Models on eight simulated devices against one; run by test_sharded.

    python sharded_models.py experts|quantized|foreign|flash

experts: logits, gradients and the text of a rollout of a mixture. quantized:
its integers, and what they compute. foreign: a step and a rollout of a
function. flash: a step by the attention kernels, interpreted; each device
reads the rows, heads and queries that it has.
"""

import math
import sys

import jax
import jax.numpy as jnp
import numpy as np
from conftest import EOS, PAD, make_model, make_trajectories
from foreign_model import make_foreign
from interpreted import interpreted_kernels
from sharded_step import (
    MIXTURE,
    TOPD,
    assert_same,
    one_device,
    place,
    run,
    run_mixture,
    spread,
)
from small_files import logits_of, make
from test_experts import CONFIG as PLAIN

from topd_jax.models import fingerprint
from topd_jax.models.quantization import quantize, quantizer
from topd_jax.parallel.sharding import make_mesh
from topd_jax.sampling import rollout
from topd_jax.types import Prompts

EXPERTS = PLAIN.replace(
    sinks=True, expert_biases=True, swiglu_limit=2.0, shared_expert_width=8,
)  # fmt: skip


def tokens_on(mesh):
    """Tokens and mask, padded on the left."""
    tokens = jax.random.randint(jax.random.key(0), (8, 6), 3, 40)
    mask = jnp.arange(6) >= jnp.arange(8)[:, None] % 4
    return spread((tokens, mask), mesh)


def experts():
    """Spread over the expert axis, alone and beside the other axes."""

    def loss(model, tokens, mask):
        logp = jax.nn.log_softmax(logits_of(model, tokens, mask))
        return jnp.sum(logp[..., 3] * mask), logp

    def everything(mesh, rules="train"):
        model = place(make(EXPERTS), mesh)
        if mesh.shape["expert"] > 1:
            held = model.arrays["expert_gate"].addressable_shards[0]
            assert held.data.shape[1] < EXPERTS.experts
        with jax.set_mesh(mesh):
            batch = tokens_on(mesh)
            slope, logp = jax.jit(jax.grad(loss, has_aux=True))(model, *batch)
            written = rollout(
                model, Prompts(*batch), jax.random.key(0), max_new_tokens=6,
                temperature=0.0, eos_ids=(), pad_id=0, sharding=rules,
            )  # fmt: skip
        return jax.device_get((slope.arrays, logp, written.tokens))

    want = everything(one_device())
    for shape, rules in (
        ((2, 1, 1, 4), "train"), ((1, 2, 2, 2), "tensor"),
        ((2, 2, 1, 2), "gathered"), ((1, 2, 2, 2), "rows"),
    ):  # fmt: skip
        assert_same(want, everything(make_mesh(*shape), rules), atol=2e-4)
        print(f"same on {shape}", flush=True)


def quantized():
    """Quantized and then spread, or spread and then quantized."""

    def states(model, mesh):
        with jax.set_mesh(mesh):
            return np.asarray(logits_of(model, *tokens_on(mesh)))

    for kind, shape in (("int8", (1, 4, 2, 1)), ("int4", (1, 2, 2, 2))):
        whole = quantize(make(EXPERTS), kind)
        mesh, finish = make_mesh(*shape), quantizer(kind)
        moved, floats = place(whole, mesh), place(make(EXPERTS), mesh)
        arrays = {n: finish(n, x) for n, x in floats.arrays.items()}
        made = floats.__class__(EXPERTS, arrays)
        for x, y in zip(
            jax.tree.leaves(moved), jax.tree.leaves(made), strict=True
        ):
            assert x.sharding.is_equivalent_to(y.sharding, x.ndim)
        held = made.arrays["expert_up"].qvalue
        part = held.addressable_shards[0].data.size
        assert part * math.prod(shape) == held.size
        assert fingerprint(made) == fingerprint(whole)
        assert_same(states(whole, one_device()), states(made, mesh))
        print(f"{kind}: same on {shape}", flush=True)


def foreign():
    def step_and_rollout(mesh, axes):
        student, rows = make_foreign(logical_axes=axes), make_trajectories()
        out = run(mesh, TOPD["teacher"], (student, make_model(1)), rows)
        with jax.set_mesh(mesh):
            student = place(student, mesh)
            words = student.params["params"]["words"]["embedding"].sharding
            assert words.is_fully_replicated == (not axes), words
            batch = spread(Prompts(rows.prompt, rows.prompt_mask), mesh)
            written = rollout(
                student, batch, jax.random.key(1), max_new_tokens=6,
                eos_ids=(EOS,), pad_id=PAD,
            )  # fmt: skip
        return out, jax.device_get(written)

    want = step_and_rollout(one_device(), None)
    words = {"words/embedding": ("vocab", "embed")}
    for shape, axes in (((8, 1, 1), None), ((2, 2, 2), words)):
        assert_same(want, step_and_rollout(make_mesh(*shape), axes))
        print(f"same on {shape}", flush=True)


def flash():
    long = dict(prompt=20, completion=131)
    want = run_mixture(one_device(), **long)
    # data, fsdp, tensor, expert, sequence
    for shape in ((1, 2, 2, 1, 2), (2, 1, 2, 2, 1), (1, 1, 1, 1, 8)):
        config = MIXTURE.replace(attention="flash")
        with interpreted_kernels() as calls:
            assert_same(want, run_mixture(make_mesh(*shape), config, **long))
        data, fsdp, tensor, expert, sequence = shape
        read = {shapes[0][:3] for _, shapes, _ in calls}
        rows = 8 // (data * fsdp * expert)
        assert (rows, 160 // sequence, 8 // tensor) in read, read
        print(f"same on {shape}: {sorted(read)}", flush=True)


if __name__ == "__main__":
    assert jax.device_count() == 8
    {
        function.__name__: function
        for function in (experts, quantized, foreign, flash)
    }[sys.argv[1]]()

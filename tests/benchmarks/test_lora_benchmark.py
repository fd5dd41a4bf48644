"""What adapters save in an update, and what merging them does to a rollout.

``pytest -m benchmark -s tests/benchmarks/test_lora_benchmark.py``. Sizes of
``works.py``: student 4 layers of width 256, V 4096. Bytes are the
compiler's own account of the update, not the process's. Prints JSON lines;
asserts no time.
"""

import functools
import json
import time

import jax
import jax.numpy as jnp
import optax
import pytest

import topd_jax as topd
from topd_jax.models import (
    DecoderConfig,
    Lora,
    add_lora,
    init_decoder,
    merge_lora,
)
from topd_jax.models.lora import split

pytestmark = pytest.mark.benchmark

PROMPT, VOCAB, RANK = 16, 4096, 8


def model(seed, layers, width, heads, inner):
    config = DecoderConfig(
        vocab_size=VOCAB, layers=layers, width=width, heads=heads, kv_heads=2,
        head_dim=64, mlp_width=inner, unroll=layers,
    )  # fmt: skip
    return jax.jit(init_decoder, static_argnums=0)(config, jax.random.key(seed))


@functools.cache
def students():
    whole = model(0, 4, 256, 4, 768)
    lora = Lora(RANK, 16.0, whole.config.lora_targets)
    return {"whole": whole, "lora": add_lora(whole, lora)}


def prompts(rows):
    shape = rows, PROMPT
    return topd.Prompts(jnp.ones(shape, jnp.int32), jnp.ones(shape, bool))


def size(tree):
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def test_memory_of_an_update():
    teacher, optimizer = model(1, 6, 384, 6, 1152), optax.adamw(1e-5)
    objective, out = topd.opd(), {}
    learn = functools.partial(
        topd.train_step, objective=objective, optimizer=optimizer
    )
    # Few tokens: the temporaries are then gradients, and not activations.
    write = functools.partial(
        topd.rollout, max_new_tokens=16, eos_ids=(), pad_id=0
    )
    for name, student in students().items():
        told = jax.eval_shape(write, student, prompts(1), jax.random.key(0))
        scored = jax.eval_shape(
            functools.partial(
                topd.score, objective=objective, eos_ids=(), pad_id=0
            ),
            student, (topd.Teacher(teacher),), told, jax.random.key(0),
        )  # fmt: skip
        state, frozen = topd.init_state(student, optimizer), split(student)[1]
        compiled = (
            jax.jit(learn, donate_argnums=0)
            .lower(state, told, scored, frozen)
            .compile()
        )
        memory = compiled.memory_analysis()
        out[name] = {
            "trained": size(state.student),
            "moments": size(state.opt_state),
            "frozen": size(frozen),
            "temporary": memory.temp_size_in_bytes,
            "gigaflops": round(compiled.cost_analysis()["flops"] / 1e9, 2),
        }
    ratios = {
        key: round(out["lora"][key] / out["whole"][key], 3)
        for key in ("trained", "moments", "temporary", "gigaflops")
    }
    print(json.dumps({"benchmark": "lora update", **out, "ratios": ratios}))
    assert max(ratios.values()) < 1


def test_rollouts_merged_and_apart():
    student = students()["lora"]
    write = functools.partial(
        topd.rollout,
        prompts=prompts(16),
        max_new_tokens=64,
        eos_ids=(),
        pad_id=0,
    )
    runs = {
        "whole": (write, students()["whole"]),
        "apart": (write, student),
        "merged": (
            jax.jit(lambda m, key: write(merge_lora(m), key=key)),
            student,
        ),
    }
    best = dict.fromkeys(runs, float("inf"))
    for i in range(6):  # in turn; the first compiles
        for name, (run, of) in runs.items():
            start = time.process_time()
            jax.block_until_ready(run(of, key=jax.random.key(i)))
            if i:
                best[name] = min(best[name], time.process_time() - start)
    row = {name: round(s / best["whole"], 3) for name, s in best.items()}
    print(json.dumps({"benchmark": "lora rollout, processor time", **row}))

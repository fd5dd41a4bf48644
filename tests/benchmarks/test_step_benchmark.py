"""One on-policy step, plain and trajectory-aware, in one run.

Sizes of the peers' benchmark: student 4 layers of width 256, V 4096; teacher 6
layers of width 384; 16 prompts, 64 new tokens. Branches read m * K / N = 1.125
of the rollout's tokens, as in arXiv:2606.00305, whose ratio is 1.41. Prints
one JSON line; asserts no time.
"""

import functools
import json
import statistics
import time

import jax
import jax.numpy as jnp
import optax
import pytest

import topd_jax as topd
from topd_jax.models import DecoderConfig, init_decoder

pytestmark = pytest.mark.benchmark

ROWS, PROMPT, NEW, VOCAB = 16, 16, 64, 4096
STEPS = 5
# 6 * 12 / 64 = 1.125
AHEAD = {"near_future": topd.NearFuture(candidates=6, window=12)}
VARIANTS = {
    "opd": topd.opd(),
    "n_step": topd.n_step(**AHEAD),
    "topd, teacher": topd.topd(**AHEAD),
    "topd, student": topd.topd(**AHEAD, context="student"),
}


def model(seed, layers, width, heads, inner):
    config = DecoderConfig(
        vocab_size=VOCAB,
        layers=layers,
        width=width,
        heads=heads,
        kv_heads=2,
        head_dim=64,
        mlp_width=inner,
        unroll=layers,
    )
    return jax.jit(init_decoder, static_argnums=0)(config, jax.random.key(seed))


def stages(objective, optimizer):
    # No end of sequence: every row writes all its tokens.
    ids = dict(eos_ids=(), pad_id=0)
    write = functools.partial(topd.rollout, max_new_tokens=NEW, **ids)
    read = jax.jit(functools.partial(topd.score, objective=objective, **ids))
    learn = jax.jit(
        functools.partial(
            topd.train_step, objective=objective, optimizer=optimizer
        ),
        donate_argnums=0,
    )
    return write, read, learn


def timed(fn, *args):
    start = time.perf_counter()
    out = jax.block_until_ready(fn(*args))
    return out, time.perf_counter() - start


def test_step():
    student, teacher = model(0, 4, 256, 4, 768), model(1, 6, 384, 6, 1152)
    teachers = (topd.Teacher(teacher),)
    prompts = topd.Prompts(
        jnp.ones((ROWS, PROMPT), jnp.int32), jnp.ones((ROWS, PROMPT), bool)
    )
    optimizer = optax.adamw(1e-5)
    runs = {
        name: (stages(goal, optimizer), topd.init_state(student, optimizer))
        for name, goal in VARIANTS.items()
    }
    seconds = {name: [] for name in runs}
    for step in range(STEPS + 1):  # in turn; the first compiles
        for name, ((write, read, learn), state) in list(runs.items()):
            key = jax.random.key(step)
            told, a = timed(write, state.student, prompts, key)
            scored, b = timed(read, state.student, teachers, told, key)
            (state, metrics), c = timed(learn, state, told, scored)
            assert jnp.isfinite(metrics["loss"][0])
            runs[name] = (runs[name][0], state)
            if step:
                seconds[name].append((a, b, c))
    out = {}
    base = [sum(s) for s in seconds["opd"]]
    for name, found in seconds.items():
        totals = [sum(s) for s in found]
        out[name] = {
            "seconds": round(statistics.median(totals), 3),
            "rollout_score_train_step": [
                round(statistics.median(x), 3) for x in zip(*found, strict=True)
            ],
            "ratio": round(
                statistics.median(
                    t / b for t, b in zip(totals, base, strict=True)
                ),
                2,
            ),
        }
    print(json.dumps({"benchmark": "step", **out}))
    assert out["opd"]["ratio"] == 1.0

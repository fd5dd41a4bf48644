"""Speed and memory of the fused losses against full logits, in one run.

Asserts no times. Each measurement runs in a process of its own, so that the
peak of its memory is its own; the report, one JSON line a measurement and
the ratios, is printed (``pytest -m benchmark -s tests/benchmarks``). Other
libraries' problem: batch 4, 512 tokens, 32,768 ids, widths 256 and 384, both
heads, value and gradients.
"""

import json
import os
import resource
import subprocess
import sys
import time

import pytest

ROWS, TOKENS, VOCAB, STUDENT, TEACHER = 4, 512, 32768, 256, 384
RUNS = 4
WAYS = ("dense", "weighted_sum", "recomputed")


def build(way, divergence):
    """A function (student states and head, teacher's) -> value, gradients."""
    import jax
    import jax.numpy as jnp

    from topd_jax.losses import divergences, fused
    from topd_jax.losses.log_probs import log_softmax
    from topd_jax.objectives.loading import PIECES

    count, token_loss = ROWS * TOKENS, PIECES["token_loss"][divergence]

    def dense(*arrays):
        student, teacher = (
            log_softmax(jnp.einsum("btd,vd->btv", *pair))
            for pair in (arrays[:2], arrays[2:])
        )
        return divergences.weighted_mean(token_loss(student, teacher))

    def weighted_sum(*arrays):
        weights = jnp.full((ROWS, TOKENS), 1 / count)
        return fused.fused_weighted_sum(*arrays, weights, token_loss)[0]

    def recomputed(*arrays):
        return jnp.mean(fused.fused_divergence(*arrays, token_loss))

    loss = {
        "dense": dense,
        "weighted_sum": weighted_sum,
        "recomputed": recomputed,
    }[way]
    return jax.jit(jax.value_and_grad(loss, (0, 1)))


def measure(way, divergence):
    """Runs in the child: one JSON line."""
    import jax

    def resident():
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    keys = jax.random.split(jax.random.key(0), 4)
    arrays = [
        jax.random.normal(keys[0], (ROWS, TOKENS, STUDENT)),
        jax.random.normal(keys[1], (VOCAB, STUDENT)) / STUDENT**0.5,
        jax.random.normal(keys[2], (ROWS, TOKENS, TEACHER)),
        jax.random.normal(keys[3], (VOCAB, TEACHER)) / TEACHER**0.5,
    ]
    compiled = build(way, divergence).lower(*arrays).compile()
    before = resident()
    wall, busy = [], []
    for _ in range(RUNS):
        start, used = time.perf_counter(), time.process_time()
        value, grads = jax.block_until_ready(compiled(*arrays))
        wall.append(time.perf_counter() - start)
        busy.append(time.process_time() - used)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    report = {
        "way": way,
        "divergence": divergence,
        "loss": round(float(value), 6),
        "head_gradient": round(float(jax.numpy.linalg.norm(grads[1])), 8),
        "seconds": round(min(wall[1:]), 3),
        "cpu_seconds": round(min(busy[1:]), 3),
        "extra_mb": round((peak - before) / 2**20),
        "planned_mb": round(
            compiled.memory_analysis().temp_size_in_bytes / 2**20
        ),
    }
    print(json.dumps(report))


@pytest.mark.benchmark
@pytest.mark.parametrize("divergence", ["reverse_kl", "jsd"])
def test_fused_against_dense(divergence):
    reports = {}
    for way in WAYS:
        result = subprocess.run(
            [sys.executable, __file__, way, divergence],
            env={
                **os.environ,
                "JAX_PLATFORMS": "cpu",
                "PYTHONPATH": os.pathsep.join(sys.path),
            },
            capture_output=True,
            text=True,
            check=False,
        )
        assert result.returncode == 0, result.stderr[-2000:]
        reports[way] = json.loads(result.stdout.splitlines()[-1])
        print(json.dumps(reports[way]))
    dense = reports["dense"]
    for way in WAYS[1:]:
        report = reports[way]
        ratios = {
            f"{key} / dense": round(report[key] / dense[key], 2)
            for key in ("seconds", "cpu_seconds", "extra_mb")
        }
        print(json.dumps({"way": way, "divergence": divergence} | ratios))
        assert report["loss"] == pytest.approx(dense["loss"], rel=1e-4)
        assert report["head_gradient"] == pytest.approx(
            dense["head_gradient"], rel=1e-4
        )
        # Memory is the compiler's plan, so it can be asserted.
        assert report["planned_mb"] < dense["planned_mb"] / 4


if __name__ == "__main__":
    measure(*sys.argv[1:])

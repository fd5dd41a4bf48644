"""Grouped products: megablox, interpreted, against a loop and ragged_dot."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from topd_jax.models.grouped import grouped_dot, megablox

# Rows, and how many each group has: all of them, rows behind the last group,
# groups across tiles of 256 rows, none.
CASES = [
    (16, (16, 0, 0, 0)),
    (23, (5, 0, 9, 2)),
    (600, (255, 1, 0, 256)),
    (40, (0, 0, 0, 0)),
]
WIDE = dict(inputs=640, outputs=600)  # wider than a tile


def problem(rows, sizes, seed=0, inputs=24, outputs=12):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(rows, inputs)).astype(np.float32)
    w = rng.normal(size=(len(sizes), inputs, outputs)).astype(np.float32)
    return jnp.asarray(x), jnp.asarray(w), jnp.asarray(sizes, jnp.int32)


def loop(x, w, sizes):
    out, start = np.zeros((len(x), w.shape[2])), 0
    for matrix, size in zip(np.asarray(w), np.asarray(sizes), strict=True):
        out[start : start + size] = np.asarray(x)[start : start + size] @ matrix
        start += size
    return out


@pytest.mark.parametrize(
    ("rows", "sizes", "shape", "tolerance"),
    [*((*case, {}, 1e-5) for case in CASES), (32, (20, 12), WIDE, 1e-4)],
)
def test_values_are_those_of_a_loop(rows, sizes, shape, tolerance):
    args = problem(rows, sizes, **shape)
    for out in (megablox(*args, interpret=True), grouped_dot(*args)):
        np.testing.assert_allclose(
            out, loop(*args), rtol=tolerance, atol=tolerance
        )


def test_gradients_are_those_of_ragged_dot():
    rows = 300
    x, w, sizes = problem(rows, (255, 1, 0, 9))
    slope = jax.random.normal(jax.random.key(1), (rows, w.shape[2]))
    # Whatever stands behind the groups, NaN included, moves nothing.
    behind = (jnp.arange(rows) >= sizes.sum())[:, None]
    dirty = jnp.where(behind, jnp.nan, x), w, sizes
    want = jax.vjp(
        functools.partial(jax.lax.ragged_dot, group_sizes=sizes), x, w
    )[1](slope)
    mine = jax.vjp(lambda x, w: grouped_dot(x, w, sizes), x, w)[1](slope)
    kernel = jax.vjp(
        lambda x, w: megablox(x, w, sizes, interpret=True), *dirty[:2]
    )[1](jnp.where(behind, jnp.nan, slope))
    for a, b, c in zip(want, mine, kernel, strict=True):
        np.testing.assert_allclose(b, a, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(c, a, rtol=1e-4, atol=1e-4)
    values = megablox(*dirty, interpret=True)
    np.testing.assert_allclose(values, loop(x, w, sizes), atol=1e-5)


def test_cpu_programs_hold_no_kernel_and_tpu_programs_no_ragged_dot():
    args = problem(16, (9, 3))
    trace = jax.jit(jax.grad(lambda *a: grouped_dot(*a).sum())).trace(*args)
    cpu = trace.lower(lowering_platforms=("cpu",)).as_text()
    tpu = trace.lower(lowering_platforms=("tpu",)).as_text()
    assert "tpu_custom_call" not in cpu
    assert "tpu_custom_call" in tpu
    assert "ragged_dot" not in tpu

"""Attention of branches side by side, against one dense mask."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from topd_jax.models.attention import branches, flash, flash_blocks
from topd_jax.models.attention.masks import Branching

ROWS, COUNT, STEPS, READ, G, R, D = 2, 5, 4, 300, 2, 2, 64
COLUMNS = READ + COUNT * STEPS


def problem(written=3, dtype="float32", reach=None, seed=0):
    """(arrays, mask of what is seen, Seen); row 1 is padded, and branch 0 of
    it sees nothing before itself."""
    rng = np.random.default_rng(seed)
    column = np.arange(COLUMNS)
    exists = column >= np.array([[0], [37]])
    exists &= column < READ + COUNT * written
    prefix = np.array([[1, 9, 128, 200, 300], [37, 38, 150, 260, 299]])
    place = np.where(column < READ, column, 0)
    ahead = np.arange(written) + 1
    places = np.repeat(place[None], ROWS, 0)
    own = prefix[:, None] + ahead[:, None] - 1
    places[:, READ : READ + COUNT * written] = own.reshape(ROWS, -1)
    sees = Branching(jnp.asarray(exists), jnp.asarray(prefix), READ)
    slides = reach is not None
    rows = prefix + written - 1
    seen = branches.seen_of(
        sees,
        jnp.asarray(rows) if slides else None,
        jnp.asarray(places) if slides else None,
        jnp.int32(reach if slides else 2**31 - 1),
    )
    mask = sees.dense()
    if slides:
        mask &= rows[..., None] - places[:, None] < reach
    shapes = [(ROWS, COUNT, G * R, D)] + [(ROWS, COLUMNS, G, D)] * 2
    arrays = [jnp.asarray(rng.normal(size=s), dtype) for s in shapes]
    return arrays, mask, seen


def dense(query, key, value, mask, cap=None):
    query, key, value = (x.astype(jnp.float32) for x in (query, key, value))
    key, value = (jnp.repeat(x, R, axis=2) for x in (key, value))
    scores = jnp.einsum("bshd,blhd->bhsl", query, key) * D**-0.5
    if cap is not None:
        scores = cap * jnp.tanh(scores / cap)
    weights = jax.nn.softmax(jnp.where(mask[:, None], scores, -1e30), axis=-1)
    return jnp.einsum("bhsl,blhd->bshd", weights, value)


def attend(arrays, seen, cap=None, kernel=False):
    options = flash.Options(D**-0.5, cap, interpret=kernel)
    return branches.attend(
        *arrays, seen, options=options, read=READ, kernel=kernel
    )


def test_the_mask_of_branches():
    sees = Branching(
        jnp.arange(9) < jnp.array([[9], [6]]), jnp.array([[1, 3], [2, 0]]), 3
    )
    np.testing.assert_array_equal(
        sees.dense().astype(int),
        [
            [[1, 0, 0, 1, 0, 1, 0, 1, 0], [1, 1, 1, 0, 1, 0, 1, 0, 1]],
            [[1, 1, 0, 1, 0, 1, 0, 0, 0], [0, 0, 0, 0, 1, 0, 0, 0, 0]],
        ],
    )


@pytest.mark.parametrize("kernel", [False, True])
@pytest.mark.parametrize(
    ("options", "tolerance"),
    [
        ({}, 2e-5),
        ({"written": 1}, 2e-5),
        ({"written": STEPS, "cap": 3.0}, 2e-5),
        ({"reach": 40}, 2e-5),
        ({"reach": 2}, 2e-5),
        ({"dtype": "bfloat16"}, 0.02),
    ],
    ids=str,
)
def test_equals_one_dense_mask(kernel, options, tolerance, monkeypatch):
    if kernel:  # of several blocks of columns
        monkeypatch.setattr(flash_blocks, "_SCORES", 128 * 128 * R)
    options = dict(options)
    cap = options.pop("cap", None)
    arrays, mask, seen = problem(**options)
    out = attend(arrays, seen, cap, kernel)
    assert out.dtype == arrays[0].dtype
    np.testing.assert_allclose(
        out.astype(jnp.float32), dense(*arrays, mask, cap),
        rtol=tolerance, atol=tolerance,
    )  # fmt: skip


@pytest.mark.parametrize("together", [1, 2, 5])
def test_some_branches_at_a_time(together, monkeypatch):
    monkeypatch.setattr(branches, "_SCORES", together * READ)
    arrays, mask, seen = problem(reach=200)
    np.testing.assert_allclose(
        attend(arrays, seen), dense(*arrays, mask), rtol=2e-5, atol=2e-5
    )


def test_what_is_not_written_does_not_matter():
    arrays, _, seen = problem(written=2)
    query, *cache = arrays
    other = [x.at[:, READ + COUNT * 2 :].set(1e30) for x in cache]
    np.testing.assert_array_equal(
        attend(arrays, seen), attend([query, *other], seen)
    )

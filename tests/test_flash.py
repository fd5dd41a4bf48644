"""Attention by the kernels, interpreted, and by blocks, against dense masks."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from children import LIBTPU, run_script
from conftest import VOCAB, make_model, make_trajectories
from dense_attention import dense_attention
from interpreted import interpreted_kernels
from small_files import make
from small_step import assert_trees_close, whole_step

from topd_jax.models import Decoder, DecoderConfig
from topd_jax.models.attention import branches, core, flash, flash_blocks
from topd_jax.models.attention.core import MaskSpec
from topd_jax.models.attention.masks import (
    BranchMask,
    branch_intervals,
    causal_intervals,
    packed_intervals,
)

G, R, D = 2, 2, 64


def branched_intervals():
    """Three branches of five tokens behind 300 keys; one has ended."""
    exists = jnp.arange(300) >= jnp.array([[3], [0]])
    start = jnp.array([[20, 170, 290], [5, 6, 299]])
    window = jnp.arange(5) < jnp.array([[5, 2, 5], [0, 5, 1]])[..., None]
    return branch_intervals(exists, start, window)


def late_branch():
    """It leaves so late that a window begins earlier for the last keys, with
    room behind them in a cache."""
    exists, window = jnp.ones((1, 300), bool), jnp.ones((1, 1, 5), bool)
    return branch_intervals(exists, jnp.array([[299]]), window).widen(450)


def packed_rows():
    return packed_intervals(
        jnp.array([[0] * 130 + [1] * 5 + [2] * 135, [0] * 1 + [1] * 269])
    )


def inputs(mask, dtype="float32", heads=(G, R, D)):
    """Query, key, value and the cotangent of the output."""
    (groups, shared, size), (rows, length) = heads, mask.prefix.shape
    of_query = (rows, length, groups * shared, size)
    of_key = (rows, groups, mask.exists.shape[1], size)
    rng = np.random.default_rng(0)
    shapes = (of_query, of_key, of_key, of_query)
    return [jnp.asarray(rng.normal(size=s), dtype) for s in shapes]


def positions_in(mask):
    """Positions of its tokens: a branch goes on where its prefix ends."""
    return jnp.where(
        mask.prefix > 0, mask.prefix + mask.last - mask.first, mask.last
    )


def kernel_and_dense(
    mask, dtype="float32", heads=(G, R, D), cap=None, window=None
):
    """Output and gradients of each; zero where a query has no keys."""
    *arrays, cotangent = inputs(mask, dtype, heads)
    options = flash.Options(heads[-1] ** -0.5, cap, interpret=True)
    allowed, intervals = mask.dense(), mask
    if window is not None:
        position = positions_in(mask)
        room = allowed.shape[2] - allowed.shape[1]
        of_key = jnp.pad(position, ((0, 0), (0, room)))
        allowed &= position[:, :, None] - of_key[:, None] < window
        intervals = mask.within(window)

    @jax.jit
    def kernel(*arrays):
        out, normalizer = flash.forward(*arrays, intervals, options)
        return out, flash.backward(
            *arrays, intervals, out, normalizer, cotangent, options
        )

    @jax.jit
    def plain(*arrays):
        out, back = jax.vjp(
            lambda *x: dense_attention(*x, allowed, options.scale, cap), *arrays
        )
        return out, back(cotangent.astype(jnp.float32))

    return kernel(*arrays), plain(*(x.astype(jnp.float32) for x in arrays))


@pytest.fixture
def small_blocks(monkeypatch):
    """128 keys and 128 rows a block, so that there are several."""
    monkeypatch.setattr(flash_blocks, "_ROWS", 128)
    monkeypatch.setattr(flash_blocks, "_SCORES", 128 * 128 * R)


@pytest.mark.parametrize(
    ("intervals", "options"),
    [
        (branched_intervals, dict(heads=(3, 1, 64), window=9, cap=2.0)),
        (late_branch, dict(window=135)),
        (packed_rows, dict(heads=(1, 3, 128), window=40)),
        (packed_rows, dict(dtype="bfloat16")),
    ],
)
def test_kernels_are_attention_over_intervals(intervals, options, small_blocks):
    """Of queries without keys, which give zero and no gradient, as well."""
    got, want = kernel_and_dense(intervals(), **options)
    dtype = options.get("dtype", "float32")
    assert {x.dtype.name for x in jax.tree.leaves(got)} == {dtype}
    got = jax.tree.map(lambda x: x.astype(jnp.float32), got)
    near = 2e-5 if dtype == "float32" else 0.04
    assert_trees_close(got, want, rtol=near, atol=near)


def test_a_block_that_no_query_needs_is_never_read(small_blocks):
    intervals = branched_intervals().within(9)
    query, key, value, _ = inputs(intervals)
    sizes = flash_blocks.sizes_of(query, key)
    assert sizes.keys == 128 and sizes.query_blocks > 1
    mask = np.asarray(intervals.dense())
    options = flash.Options(D**-0.5, interpret=True)
    read = jax.jit(lambda *arrays: flash.forward(*arrays, intervals, options))
    for row, first in np.ndindex(2, sizes.query_blocks):
        queries = slice(first * sizes.queries, (first + 1) * sizes.queries)
        needed = np.flatnonzero(mask[row, queries].any(0)) // 128
        unneeded = ~np.isin(np.arange(key.shape[2]) // 128, needed)
        poisoned = np.array(key)
        poisoned[row, :, unneeded] = np.nan
        out, _ = read(query, poisoned, value)
        assert np.isfinite(out[row, queries]).all()


def pairs_multiplied(mask):
    """Share of the pairs of blocks of one row that are multiplied."""
    length, keys = mask.prefix.shape[1], mask.exists.shape[1]
    query, key = jnp.zeros((1, length, 1, 128)), jnp.zeros((1, 1, keys, 128))
    sizes = flash_blocks.sizes_of(query, key)
    arranged = jax.jit(flash_blocks.arranged, static_argnums=0)
    _, tables = arranged(sizes, query, key, key, mask)
    pairs = np.ogrid[: sizes.query_blocks, : sizes.key_blocks]
    needed = np.asarray(flash_blocks.needed(tables, 0, *pairs))
    # A pair that is multiplied is the one that is fetched.
    keys_read = flash_blocks.nearest_key(tables, 0, *pairs)
    queries_read = flash_blocks.nearest_query(tables, 0, *pairs)
    assert (keys_read == pairs[1])[needed].all()
    assert (queries_read == pairs[0])[needed].all()
    # And no other: one fetch a block that is needed, and the first one.
    fetched = (np.diff(keys_read, axis=1) != 0).sum(1) + 1
    assert (fetched <= np.maximum(needed.sum(1), 1)).all()
    return needed.mean()


def test_a_rollout_costs_half_and_a_branch_its_prefix():
    exists = jnp.ones((1, 8192), bool)
    assert pairs_multiplied(causal_intervals(exists)) < 0.55
    segments = jnp.arange(8192)[None] // 1024
    assert pairs_multiplied(packed_intervals(segments)) < 0.15
    start = jnp.full((1, 32), 64)  # early forks: the square is what costs
    mask = branch_intervals(exists, start, jnp.ones((1, 32, 32), bool))
    causal, apart = 8192 * 8193 / 2, 32 * (32 * 64 + 32 * 33 / 2)
    least = (causal + apart) / (8192 + 32 * 32) ** 2
    assert pairs_multiplied(mask) < least + 0.1


# In a decoder; a block of queries at a time.

CONFIG = DecoderConfig(
    vocab_size=VOCAB, layers=2, width=32, heads=4, kv_heads=2, head_dim=16,
    mlp_width=32, remat="full", window=40, sliding=(True, False),
)  # fmt: skip


LENGTH = 300  # two blocks of 128 and a part


@pytest.fixture
def in_blocks(monkeypatch):
    monkeypatch.setattr(core, "_LONG_SCORES", 1)
    monkeypatch.setattr(core, "_BLOCK_SCORES", 1)


def test_blocks_have_value_and_gradients_of_the_whole(request):
    """Of keys in float32, which is what bfloat16 is summed in."""
    config = DecoderConfig(
        vocab_size=40, layers=1, width=16, heads=4, kv_heads=2, head_dim=8,
        mlp_width=24, attention_softcap=2.0,
    )  # fmt: skip
    exists = jnp.arange(LENGTH) >= jnp.array([[0], [20]])  # padding
    mask = causal_intervals(exists).widen(LENGTH + 50)
    *arrays, _ = inputs(mask, "bfloat16", heads=(2, 2, 8))
    arrays.append(jnp.array([1.0, -1.0, 2.0, 0.5], "bfloat16"))  # sinks
    allowed = mask.dense()
    spec = MaskSpec(allowed[:, None], None, None)

    def loss(*arrays):
        *given, sinks = arrays
        out = core.attend(*given, spec, 0, config, sinks).astype(jnp.float32)
        out = jnp.where(allowed.any(-1)[..., None, None], out, 0.0)
        return jnp.sum(jnp.sin(out) * jnp.arange(8)), out

    def learn(*arrays):
        return jax.jit(jax.value_and_grad(loss, (0, 1, 2, 3), has_aux=True))(
            *arrays
        )

    exact = [x.astype(jnp.float32) for x in arrays]
    want = learn(*exact)
    request.getfixturevalue("in_blocks")
    assert_trees_close(learn(*exact), want, rtol=2e-5, atol=2e-5)
    for x, y in zip(learn(*arrays)[1], want[1], strict=True):
        assert x.dtype == jnp.bfloat16
        error = np.abs(x.astype(np.float32) - y).max()
        assert error < 0.03 * np.abs(y).max()


def test_a_decoder_reads_intervals_as_a_mask(request):
    """Value and gradient, with gaps, branches and a sliding layer; by the
    kernels, and in blocks where these have no TPU."""
    arrays, intervals = make(CONFIG).arrays, branched_intervals()
    shape = intervals.exists.shape
    tokens = jax.random.randint(jax.random.key(1), shape, 3, 20)
    positions = positions_in(intervals)

    def learn(mask, attention):
        @jax.jit
        @jax.value_and_grad
        def loss(model):
            hidden, _ = model(tokens, positions, mask)
            real = intervals.exists[..., None] * jnp.arange(hidden.shape[-1])
            return jnp.sum(jnp.sin(hidden) * real)

        return loss(Decoder(CONFIG.replace(attention=attention), arrays))

    def assert_equals(got, tolerance=1e-5):
        for x, y in zip(*map(jax.tree.leaves, (got, want)), strict=True):
            most = tolerance * np.abs(y).max()
            np.testing.assert_allclose(x, y, rtol=tolerance, atol=most)

    want = learn(intervals.dense(), "blocks")
    with interpreted_kernels() as calls:
        assert_equals(learn(intervals, "flash"), 2e-5)
    assert {"forward", "backward"} == {name for name, *_ in calls}
    request.getfixturevalue("in_blocks")
    assert_equals(learn(intervals, "flash"))


def test_no_array_of_a_step_is_a_mask_or_scores_of_all_keys(in_blocks):
    """Scoring with branches behind, and an update, of 611 tokens."""
    rows = make_trajectories(rows=1, prompt=11, completion=600)
    model = make_model(0, layers=1)
    lowered = whole_step.lower(
        model, model, rows,
        "topd(context='teacher', candidates=2, window=4)",
    )  # fmt: skip
    shapes = re.findall(r"\b[a-z]+\d*\[([\d,]+)\]", lowered.compile().as_text())
    sizes = {np.prod([int(n) for n in s.split(",")]) for s in shapes}
    assert 611 * VOCAB <= max(sizes) < 611**2


# Branches side by side, against one dense mask.

ROWS, COUNT, STEPS, READ = 2, 5, 4, 300
KEYS = READ + COUNT * STEPS


def branch_problem(written=3, dtype="float32", window=None):
    """(arrays, dense mask, BranchKeys); row 1 is padded, and branch 0 of it
    attends to nothing before itself."""
    key = np.arange(KEYS)
    exists = (key >= np.array([[0], [37]])) & (key < READ + COUNT * written)
    prefix = np.array([[1, 9, 128, 200, 300], [37, 38, 150, 260, 299]])
    positions = np.repeat(np.where(key < READ, key, 0)[None], ROWS, 0)
    along = prefix[:, None] + np.arange(written)[:, None]
    positions[:, READ : READ + COUNT * written] = along.reshape(ROWS, -1)
    newest = prefix + written - 1
    mask = BranchMask(jnp.asarray(exists), jnp.asarray(prefix), READ)
    allowed, of_layer = mask.dense(), positions if window else None
    if window:
        allowed &= newest[..., None] - positions[:, None] < window
    rng = np.random.default_rng(0)
    shapes = [(ROWS, COUNT, G * R, D)] + [(ROWS, G, KEYS, D)] * 2
    arrays = [jnp.asarray(rng.normal(size=s), dtype) for s in shapes]
    return arrays, allowed, branches.keys_of(mask, newest, of_layer, window)


@pytest.mark.parametrize(
    ("problem", "cap", "tolerance"),
    [
        ({"written": STEPS, "window": 40}, 3.0, 2e-5),
        ({"window": 2, "dtype": "bfloat16"}, None, 0.02),
    ],
    ids=str,
)
def test_branches_equal_one_dense_mask(problem, cap, tolerance, monkeypatch):
    """By the kernel in several blocks of keys, else some branches at a time."""
    monkeypatch.setattr(flash_blocks, "_SCORES", 128 * 128 * R)
    monkeypatch.setattr(branches, "_SCORES", 2 * READ)
    arrays, mask, keys = branch_problem(**problem)
    want = dense_attention(*arrays, mask, D**-0.5, cap)
    options = flash.Options(D**-0.5, cap, interpret=True)
    with interpreted_kernels() as calls:
        for kernel in (False, True):
            attend = functools.partial(
                branches.attend, options=options, kernel=kernel
            )
            out = jax.jit(attend)(*arrays, keys)
            assert len(calls) == kernel
            assert out.dtype == arrays[0].dtype
            np.testing.assert_allclose(
                out.astype(jnp.float32), want, rtol=tolerance, atol=tolerance
            )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kernels", "topology", "line", "count"),
    [
        ("flash", "v5e:2x4", "3 kernels", 2),
        ("flash", "v5p:2x2x1", "3 kernels", 2),
        ("decode", "v5e:2x4", "reads the cache in place", 4),
        ("decode", "v5p:2x2x1", "reads the cache in place", 4),
        ("experts", "v5e:2x4", "kernels", 4),
        ("families", "v5e:2x4", "compiled", 2),
    ],
)
def test_a_tpu_compiles_them(kernels, topology, line, count):
    pytest.importorskip("libtpu", reason="pip install libtpu")
    printed = run_script("tpu_kernels.py", kernels, topology, **LIBTPU)
    assert printed.count(line) == count, printed

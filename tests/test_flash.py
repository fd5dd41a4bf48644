"""The attention kernels, interpreted, against dense attention."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from children import LIBTPU, on_eight_devices, run_script
from conftest import EOS, PAD, VOCAB, make_trajectories

from topd_jax.cli.doctor import kernels as doctor
from topd_jax.models import DecoderConfig, init_decoder
from topd_jax.models.attention.core import (
    core,
    flash,
    flash_blocks,
    flash_decode,
)
from topd_jax.models.attention.masks import (
    branch_spans,
    causal_spans,
    packed_spans,
)
from topd_jax.objectives.objective import Objective
from topd_jax.training.step import annotate, init_state, update

B, G, R, D = 2, 2, 2, 64


def rollout_spans(length=200):
    """Left-padded rows."""
    exists = jnp.arange(length) >= jnp.array([[0], [37]])
    return causal_spans(exists)


def with_branches():
    """Three branches of five tokens behind 300 columns; one has ended."""
    exists = jnp.arange(300) >= jnp.array([[3], [0]])
    start = jnp.array([[20, 170, 290], [5, 6, 299]])
    window = jnp.arange(5) < jnp.array([[5, 2, 5], [0, 5, 1]])[..., None]
    return branch_spans(exists, start, window)


def packed():
    segments = jnp.array([[0] * 130 + [1] * 5 + [2] * 265, [0] * 1 + [1] * 399])
    return packed_spans(segments)


def read_behind():
    """A reading whose cache has room for more columns."""
    return rollout_spans().widen(450)


CASES = {
    "rollout": rollout_spans,
    "branches": with_branches,
    "packed": packed,
    "wider": read_behind,
}


def seen_of(spans, reach=None):
    columns = jnp.arange(spans.exists.shape[1], dtype=jnp.int32)
    rows = jnp.arange(spans.prefix.shape[1], dtype=jnp.int32)
    slides = reach is not None
    return flash.Seen(
        spans.exists, spans.prefix, spans.first, spans.last,
        jnp.broadcast_to(rows, spans.prefix.shape) if slides else None,
        jnp.broadcast_to(columns, spans.exists.shape) if slides else None,
        jnp.int32(reach if slides else 2**31 - 1),
    )  # fmt: skip


def inputs(spans, dtype="float32", heads=(G, R, D), seed=0):
    (groups, shared, size), (rows, length) = heads, spans.prefix.shape
    columns = spans.exists.shape[1]
    rng = np.random.default_rng(seed)
    shapes = (
        (rows, length, groups * shared, size), (rows, columns, groups, size),
        (rows, columns, groups, size), (rows, length, groups * shared, size),
    )  # fmt: skip
    return [jnp.asarray(rng.normal(size=s), dtype) for s in shapes]


def dense(query, key, value, spans, scale, cap=None, reach=None):
    """All scores at once, in float32."""
    query, key, value = (x.astype(jnp.float32) for x in (query, key, value))
    shared = query.shape[2] // key.shape[2]
    key, value = (jnp.repeat(x, shared, axis=2) for x in (key, value))
    scores = jnp.einsum("bshd,blhd->bhsl", query, key) * scale
    if cap is not None:
        scores = cap * jnp.tanh(scores / cap)
    mask = spans.dense()[:, None]
    if reach is not None:
        at = jnp.arange(mask.shape[-1])
        mask &= jnp.arange(mask.shape[-2])[:, None] - at < reach
    weights = jax.nn.softmax(jnp.where(mask, scores, -1e30), axis=-1)
    weights = jnp.where(mask, weights, 0.0)  # of rows that see nothing too
    return jnp.einsum("bhsl,blhd->bshd", weights, value)


def both(spans, dtype="float32", heads=(G, R, D), cap=None, reach=None):
    """(kernel's, dense) output and gradients."""
    query, key, value, slope = inputs(spans, dtype, heads)
    options = flash.Options(heads[-1] ** -0.5, cap, interpret=True)
    seen = seen_of(spans, reach)

    @jax.jit
    def kernel(query, key, value, slope):
        out, normaliser = flash.forward(query, key, value, seen, options)
        return out, flash.backward(
            query, key, value, seen, out, normaliser, slope, options
        )

    @jax.jit
    def plain(query, key, value, slope):
        def read(*x):
            return dense(*x, spans, options.scale, cap, reach)

        out, back = jax.vjp(read, query, key, value)
        return out, back(slope.astype(jnp.float32))

    return kernel(query, key, value, slope), plain(query, key, value, slope)


def assert_close(found, wanted, tolerance=2e-5):
    pairs = zip(*map(jax.tree.leaves, (found, wanted)), strict=True)
    for x, y in pairs:
        assert np.isfinite(x).all()
        np.testing.assert_allclose(
            x.astype(jnp.float32), y, rtol=tolerance, atol=tolerance
        )


@pytest.fixture
def small_blocks(monkeypatch):
    """128 columns and 128 rows a block, so that there are several."""
    monkeypatch.setattr(flash_blocks, "_ROWS", 128)
    monkeypatch.setattr(flash_blocks, "_SCORES", 128 * 128 * R)


@pytest.mark.parametrize(
    "name",
    [
        "rollout",
        "branches",
        *(pytest.param(n, marks=pytest.mark.slow) for n in ("packed", "wider")),
    ],
)
def test_it_is_attention_over_spans(name, small_blocks):
    assert_close(*both(CASES[name]()))


def test_blocks_may_be_as_large_as_the_rows():
    assert_close(*both(with_branches()))


@pytest.mark.parametrize(
    "options",
    [
        dict(reach=40),
        dict(cap=0.7),
        dict(heads=(1, 3, 128)),
        dict(heads=(3, 1, 64), reach=150, cap=2.0),
    ],
)
def test_sliding_capped_and_grouped(options):
    spans = CASES["branches" if "reach" not in options else "rollout"]()
    assert_close(*both(spans, **options))


def test_bfloat16_is_rounded_as_often_as_its_inputs():
    found, wanted = both(with_branches(), "bfloat16")
    assert all(x.dtype == jnp.bfloat16 for x in jax.tree.leaves(found))
    assert_close(found, wanted, 0.04)


def test_who_sees_nothing_is_zero_and_gives_no_gradient():
    spans = rollout_spans()  # 37 columns of padding
    (out, (on_query, on_key, on_value)), _ = both(spans)
    for x in (out, on_query, on_key, on_value):
        assert (x[1, :37] == 0).all()
    assert (out[1, 37:] != 0).any(-1).all()


@pytest.mark.parametrize("name", ["rollout", "branches", "packed"])
def test_a_block_that_nobody_needs_is_never_read(name, small_blocks):
    spans = CASES[name]()
    query, key, value, _ = inputs(spans)
    sizes = flash_blocks.sizes_of(query, key)
    assert sizes.columns == 128 and sizes.query_blocks > 1
    mask = np.asarray(spans.dense())
    for row in range(B):
        # What the last queries of a block see, and what no query of it does.
        seen = mask[row, : sizes.queries].any(0)
        unseen = np.flatnonzero(~seen)
        unseen = unseen[unseen // 128 > np.flatnonzero(seen).max() // 128]
        assert unseen.size
        poisoned = key.at[row, unseen].set(jnp.nan)
        out, _ = flash.forward(
            query, poisoned, value, seen_of(spans),
            flash.Options(D**-0.5, interpret=True),
        )  # fmt: skip
        assert np.isfinite(out[row, : sizes.queries]).all()


def pairs_read(spans, shared=1):
    """Pairs of blocks that are multiplied, of all."""
    rows, length = spans.prefix.shape
    columns = spans.exists.shape[1]
    query = jax.ShapeDtypeStruct((rows, length, shared, 128), jnp.float32)
    key = jax.ShapeDtypeStruct((rows, columns, 1, 128), jnp.float32)
    sizes = flash_blocks.sizes_of(query, key)
    _, tables = flash_blocks.arranged(
        sizes, *(jnp.zeros(x.shape) for x in (query, key, key)), seen_of(spans)
    )
    read = 0
    for row in range(rows):
        for block in range(sizes.query_blocks):
            steps = jnp.arange(sizes.column_blocks)
            found, needed = jax.vmap(
                lambda s, row=row, block=block: flash_blocks.column_block(
                    tables, row, block, s
                )
            )(steps)
            kept = np.asarray(found)[np.asarray(needed)]
            assert len(set(kept.tolist())) == len(kept)
            read += len(kept)
        # The other way round they are the same pairs.
        other = 0
        for block in range(sizes.column_blocks):
            _, needed = jax.vmap(
                lambda s, row=row, block=block: flash_blocks.query_block(
                    tables, row, block, s
                )
            )(jnp.arange(sizes.query_blocks))
            other += int(needed.sum())
        read -= other * (rows > 1)
    if rows > 1:
        assert read == 0
        return None
    return read / (sizes.query_blocks * sizes.column_blocks)


def test_a_rollout_costs_half_and_a_branch_its_prefix():
    length = 8192
    exists = jnp.ones((1, length), bool)
    assert pairs_read(causal_spans(exists)) < 0.55
    assert pairs_read(packed_spans(jnp.arange(length)[None] // 1024)) < 0.15
    start = jnp.full((1, 32), 64)  # early forks: what is dear is the square
    spans = branch_spans(exists, start, jnp.ones((1, 32, 32), bool))
    whole = spans.exists.shape[1] ** 2
    least = float(spans.dense().sum()) / whole
    assert pairs_read(spans) < least + 0.1
    assert pairs_read(CASES["branches"]()) is None


# In a decoder, and on a mesh: the kernels interpreted in the place of blocks.


@pytest.fixture
def kernels(monkeypatch):
    """Has a CPU take the kernels where a TPU would; counts their calls."""
    calls = []

    def on_tpu(*arrays, tpu, default):
        calls.append(tpu.func.__name__)
        return tpu(*arrays)

    monkeypatch.setattr(flash.jax.lax, "platform_dependent", on_tpu)
    options = functools.partial(flash.Options, interpret=True)
    monkeypatch.setattr(core.flash, "Options", options)
    return calls


CONFIG = DecoderConfig(
    vocab_size=VOCAB, layers=2, width=32, heads=4, kv_heads=2, head_dim=16,
    mlp_width=32, remat="full", window=60, sliding=(True, False),
)  # fmt: skip


def steps(config, context="teacher"):
    """Gradient of a TOPD step, whose rows are longer than 128 columns."""
    make = jax.jit(init_decoder, static_argnums=0)
    student, teacher = (make(config, jax.random.key(i)) for i in (0, 1))
    rows = make_trajectories(rows=4, prompt=20, completion=130)
    objective = Objective(candidates=3, window=4, context=context)
    notes = annotate(
        student, teacher, rows, jax.random.key(0), objective=objective,
        eos_ids=(EOS,), pad_id=PAD,
    )  # fmt: skip
    state, metrics = update(
        init_state(student, optax.sgd(1.0)), teacher.head, rows, notes,
        objective=objective, optimizer=optax.sgd(1.0),
    )  # fmt: skip
    return state.student, metrics, notes.teacher_windows, notes.teacher_hidden


@pytest.mark.parametrize(
    "context", ["teacher", pytest.param("student", marks=pytest.mark.slow)]
)
def test_a_step_by_the_kernels_is_that_by_blocks(context, kernels):
    wanted = steps(CONFIG, context)
    assert not kernels
    found = steps(CONFIG.replace(attention="flash"), context)
    assert {"forward", "backward"} == set(kernels)
    mask = jnp.arange(130) < 4  # rows exist at least so far
    for x, y in zip(
        jax.tree.leaves(found[:3]), jax.tree.leaves(wanted[:3]), strict=True
    ):
        np.testing.assert_allclose(x, y, rtol=2e-4, atol=2e-5)
    np.testing.assert_allclose(
        found[3][:, mask], wanted[3][:, mask], rtol=2e-4, atol=2e-5
    )


def test_elsewhere_flash_is_blocks():
    wanted = jax.tree.leaves(steps(CONFIG))
    found = jax.tree.leaves(steps(CONFIG.replace(attention="flash")))
    for x, y in zip(found, wanted, strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-6, atol=1e-6)


class Told:
    """A model of which the doctor reads the config."""

    config = CONFIG.replace(
        attention="flash", dtype="bfloat16", attention_softcap=5.0
    )


def break_scores(monkeypatch):
    plain = flash.kernels._scores

    def broken(*args):
        scores, mask = plain(*args)
        return scores * 1.2, mask

    monkeypatch.setattr(flash.kernels, "_scores", broken)
    jax.clear_caches()


def test_doctor_compares_the_kernels_with_plain_attention(monkeypatch):
    models = {"student": Told, "teacher a": object()}
    assert doctor.kernels(models) == []  # no TPU: blocks are taken
    (fine,) = doctor.kernels(models, interpret=True)
    assert fine.level == "ok" and "2 heads of 16 a key, bfloat16" in fine.text
    break_scores(monkeypatch)
    (found,) = doctor.kernels({"teacher a": Told}, interpret=True)
    assert found.level == "error" and "the limit is 0.03" in found.text
    assert found.way_out == "set config.teachers.a.attention=blocks"


def test_doctor_compares_the_kernel_that_decodes_too(monkeypatch):
    plain = flash_decode._block

    def late(sizes, table, step):
        block, needed = plain(sizes, table, step)
        return block, needed & (step > 0)

    monkeypatch.setattr(flash_decode, "_block", late)
    monkeypatch.setattr(flash_decode, "_FEW_BYTES", 0)
    monkeypatch.setattr(doctor, "_farthest", lambda *_: 0.0)
    jax.clear_caches()
    (found,) = doctor.kernels({"student": Told}, interpret=True)
    assert found.level == "error"


def test_a_window_that_is_not_kept_is_found(monkeypatch):
    plain = flash.kernels._scores

    def blind(sizes, options, tables, refs, column):
        kept = {k: x for k, x in refs.items() if k != "place"}
        return plain(sizes, options, tables, kept, column)

    monkeypatch.setattr(flash.kernels, "_scores", blind)
    jax.clear_caches()
    (found,) = doctor.kernels({"student": Told}, interpret=True)
    assert found.level == "error"


@pytest.mark.slow
def test_eight_devices_read_by_kernels_what_one_reads_by_blocks():
    said = on_eight_devices("sharded_flash.py")
    assert said.count("same on") == 3


@pytest.mark.slow
@pytest.mark.parametrize("topology", ["v5e:2x4", "v5p:2x2x1"])
def test_a_tpu_compiles_them(topology):
    pytest.importorskip("libtpu", reason="pip install libtpu")
    said = run_script("tpu_flash.py", topology, **LIBTPU)
    assert said.count("3 kernels") == 2

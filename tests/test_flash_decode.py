"""The decoding kernel, interpreted, against dense attention and in rollouts."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from children import LIBTPU, on_eight_devices, run_script
from dense_attention import dense_attention

from topd_jax.models import Decoder, DecoderConfig, init_decoder
from topd_jax.models.attention import core, flash, flash_decode
from topd_jax.models.attention.masks import CachedMask
from topd_jax.sampling import rollout
from topd_jax.types import Prompts

N, B, G, R, D, L = 3, 4, 2, 3, 64, 700
LAYER = 1


@pytest.fixture
def small_blocks(monkeypatch):
    """128 columns of one row and head a block, so that there are several."""
    monkeypatch.setattr(flash_decode, "_FEW_BYTES", 0)
    monkeypatch.setattr(flash_decode, "_BYTES", 1)


def inputs(dtype="float32", length=L, shape=(B, G, R, D)):
    rows, groups, shared, size = shape
    rng = np.random.default_rng(0)
    cache = (N, rows, length, groups, size)
    shapes = (rows, 1, groups * shared, size), cache, cache
    return [jnp.asarray(rng.normal(size=s), dtype) for s in shapes]


def masks(written, length, rows, window=None):
    """(bool[B, L], first, last) of left-padded rows, most of them alike."""
    column = jnp.arange(length)
    padding = jnp.array([0, 37, 5, 37] * rows)[:rows, None]
    mask = (column >= padding) & (column < written)
    first = jnp.zeros(rows, jnp.int32)
    if window is not None:
        mask &= column >= written - window
        first = jnp.argmax(mask, axis=1)
    return mask, first, jnp.int32(written - 1)


def check(
    *written, dtype="float32", length=L, shape=(B, G, R, D), cap=None,
    window=None, tolerance=2e-5,
):  # fmt: skip
    """Compares the two; what may not be read is nan."""
    query, *cache = (np.asarray(x) for x in inputs(dtype, length, shape))
    options = flash.Options(shape[-1] ** -0.5, cap, interpret=True)
    read = jax.jit(
        functools.partial(flash_decode.read, options=options, usual=length)
    )
    columns = flash_decode.sizes_of(query, cache[0]).keys
    for count in written:
        mask, first, last = masks(count, length, shape[0], window)
        wanted = dense_attention(
            *map(jnp.asarray, (query, cache[0][LAYER], cache[1][LAYER])),
            mask[:, None], options.scale, cap,
        )  # fmt: skip
        poisoned = [np.full_like(x, np.nan) for x in cache]
        begin = int(first.min()) // columns * columns
        for x, y in zip(poisoned, cache, strict=True):
            x[LAYER, :, begin:count] = y[LAYER, :, begin:count]
        numbers = flash_decode.as_numbers(mask)
        found = read(query, *poisoned, LAYER, numbers, first, last)
        assert found.dtype == query.dtype and np.isfinite(found).all()
        np.testing.assert_allclose(
            found.astype(jnp.float32), wanted, rtol=tolerance, atol=tolerance
        )


def test_it_is_attention_over_what_is_written(small_blocks):
    # A block is of 128 columns, and the last one of 700 is not whole.
    check(40, 128, 129, 384, 385, 700)


@pytest.mark.parametrize(
    "options",
    [
        dict(length=100),
        dict(shape=(1, 1, 8, 128)),
        dict(shape=(6, 4, 1, 32), window=20, cap=2.0),
    ],
)
def test_blocks_of_several_rows_and_heads(options):
    check(60, options.get("length", 500), **options)


def test_a_window_in_bfloat16_is_all_that_is_read(small_blocks):
    # ``check`` has nan in the blocks before it.
    check(50, 600, 700, window=100, dtype="bfloat16", tolerance=0.02)


def test_a_row_that_sees_nothing_is_zero():
    query, keys, values = inputs()
    mask, first, last = masks(300, L, B)
    mask = mask.at[2].set(False)
    found = flash_decode.read(
        query, keys, values, jnp.int32(LAYER), flash_decode.as_numbers(mask),
        first, last, options=flash.Options(0.1, interpret=True), usual=300,
    )  # fmt: skip
    assert (found[2] == 0).all() and (found[1] != 0).any()


# In a decoder's rollout: the kernel interpreted in the place of XLA's.

CONFIG = DecoderConfig(
    vocab_size=41, layers=2, width=32, heads=4, kv_heads=2, head_dim=16,
    mlp_width=24, attention_softcap=3.0,
)  # fmt: skip


@pytest.fixture
def kernel(monkeypatch):
    """Has a CPU take the kernel where a TPU would; keeps what it is told."""
    told = []

    def on_tpu(*arrays, tpu, default):
        if tpu.func is flash_decode.read:
            told.append((arrays[1].shape[2], tpu.keywords["usual"]))
            return tpu(*arrays)
        return default(*arrays)

    monkeypatch.setattr(flash.jax.lax, "platform_dependent", on_tpu)
    options = functools.partial(flash.Options, interpret=True)
    monkeypatch.setattr(core.flash, "Options", options)
    return told


def written_by(config, length, **options):
    model = init_decoder(config, jax.random.key(0))
    mask = np.arange(9) >= np.array([[0], [4], [8]])
    tokens = np.random.default_rng(0).integers(6, 41, (3, 9)) * mask
    return rollout(
        model, Prompts(jnp.asarray(tokens, jnp.int32), jnp.asarray(mask)),
        jax.random.key(1), max_new_tokens=length, eos_ids=(3,), pad_id=0,
        samples=2, **options,
    )  # fmt: skip


def assert_same(found, wanted):
    for name in ("tokens", "mask", "truncated"):
        np.testing.assert_array_equal(
            getattr(found, name), getattr(wanted, name)
        )
    np.testing.assert_allclose(found.logp, wanted.logp, rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize(
    "options",
    [
        dict(),
        dict(window=20, sliding=(False, True)),
        pytest.param(
            dict(unroll=2, window=20, sliding=(True, False)),
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_rollout_by_the_kernel_has_the_same_tokens(options, kernel):
    config = CONFIG.replace(**options)
    wanted = written_by(config, 30, buckets=(110,))
    assert not kernel and wanted.mask.sum() > 100
    config = config.replace(attention="flash")
    assert_same(written_by(config, 30, buckets=(110,)), wanted)
    # Two blocks, and in the middle of the loop 15 tokens; or half of the layers
    # see 20 columns.
    usual = 110 + 15
    assert set(kernel) == {(140, (usual + 20) // 2 if options else usual)}


def test_elsewhere_it_is_plain_attention():
    exists = jnp.arange(8) >= jnp.array([[0], [3]])
    mask = CachedMask(exists, jnp.int32(6), usual=6)
    places = jnp.array([[5], [2]])

    arrays = init_decoder(CONFIG, jax.random.key(0)).arrays
    noise = np.random.default_rng(0).normal(size=(2, 2, 8, 2, 16))

    def next_state(config, mask):
        model = Decoder(config, arrays)
        cache = model.init_cache(2, 8).replace(
            length=jnp.int32(5), keys=jnp.asarray(noise, jnp.float32)
        )
        read = jax.jit(type(model).__call__)
        return read(model, jnp.array([[7], [9]]), places, mask, cache)

    wanted = next_state(CONFIG, mask.dense())
    for attention_by in ("flash", "blocks"):
        found = next_state(CONFIG.replace(attention=attention_by), mask)
        for x, y in zip(*map(jax.tree.leaves, (found, wanted)), strict=True):
            np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_eight_devices_write_by_the_kernel_what_one_writes_without():
    said = on_eight_devices("sharded_decode.py")
    assert said.count("same on") == 4


@pytest.mark.slow
@pytest.mark.parametrize("topology", ["v5e:2x4", "v5p:2x2x1"])
def test_a_tpu_compiles_it(topology):
    pytest.importorskip("libtpu", reason="pip install libtpu")
    said = run_script("tpu_kernels.py", "decode", topology, **LIBTPU)
    assert said.count("reads the cache in place") == 4

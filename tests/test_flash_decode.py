"""The decoding kernel, interpreted, against dense attention and in rollouts."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from dense_attention import dense_attention
from interpreted import interpreted_kernels
from small_files import make

from topd_jax.models import DecoderConfig
from topd_jax.models.attention import flash, flash_decode
from topd_jax.sampling import rollout
from topd_jax.types import Prompts

N, B, G, R, D, L = 3, 4, 2, 3, 64, 300
LAYER = 1


@pytest.fixture
def small_blocks(monkeypatch):
    """128 columns of one row and head a block, so that there are several."""
    monkeypatch.setattr(flash_decode, "_FEW_BYTES", 0)
    monkeypatch.setattr(flash_decode, "_BYTES", 1)


def assert_reads(
    *written, dtype="float32", length=L, shape=(B, G, R, D), cap=None,
    window=None, tolerance=2e-5,
):  # fmt: skip
    """Compare the two; what may not be read is nan, and a row has no keys."""
    rows, groups, shared, size = shape
    rng = np.random.default_rng(0)
    query, *cache = (
        np.asarray(jnp.asarray(rng.normal(size=s), dtype))
        for s in ((rows, 1, groups * shared, size),)
        + ((N, rows, groups, length, size),) * 2
    )
    options = flash.Options(size**-0.5, cap, interpret=True)
    read = jax.jit(
        functools.partial(flash_decode.read, options=options, usual=length)
    )
    sizes = flash_decode.sizes_of(query, cache[0])
    column, padding = np.arange(length), np.array([0, 37, 5, length] * rows)
    for count in written:
        start = np.minimum(padding[:rows], count)
        if window:
            start = np.maximum(start, count - window)
        mask = (column >= start[:, None]) & (column < count)
        wanted = dense_attention(
            *map(jnp.asarray, (query, cache[0][LAYER], cache[1][LAYER])),
            mask[:, None], options.scale, cap,
        )  # fmt: skip
        poisoned = [np.full_like(x, np.nan) for x in cache]
        for row in range(rows):
            block = row // sizes.rows * sizes.rows
            begin = start[block : block + sizes.rows].min()
            begin = begin // sizes.keys * sizes.keys
            for x, y in zip(poisoned, cache, strict=True):
                x[LAYER, row, :, begin:count] = y[LAYER, row, :, begin:count]
        found = read(
            query, *poisoned, LAYER, flash_decode.as_numbers(mask),
            start, count - 1,
        )  # fmt: skip
        assert found.dtype == query.dtype and np.isfinite(found).all()
        np.testing.assert_allclose(
            found.astype(jnp.float32), wanted, rtol=tolerance, atol=tolerance
        )


def test_it_is_attention_over_what_is_written(small_blocks):
    # A block is of 128 columns, and the last one of 300 is not whole.
    assert_reads(40, 128, 129, 300)
    assert_reads(50, 290, 300, window=100, dtype="bfloat16", tolerance=0.02)


@pytest.mark.parametrize(
    "options",
    [
        dict(shape=(1, 1, 8, 128), length=100),
        dict(shape=(6, 4, 1, 32), window=20, cap=2.0),
        dict(shape=(6, 4, 1, 32)),  # rows begin in different blocks
    ],
)
def test_blocks_of_several_rows_and_heads(options):
    length = options.get("length", L)
    assert_reads(60, length, **options)


# In a decoder's rollout: the kernel interpreted in the place of XLA's.

CONFIG = DecoderConfig(
    vocab_size=41, layers=2, width=32, heads=4, kv_heads=2, head_dim=16,
    mlp_width=24, attention_softcap=3.0, window=20, sliding=(True, False),
)  # fmt: skip


def written_by(config):
    mask = np.arange(9) >= np.array([[0], [4], [8]])
    tokens = np.random.default_rng(0).integers(6, 41, (3, 9)) * mask
    tokens, mask = (np.pad(x, ((0, 0), (101, 0))) for x in (tokens, mask))
    prompts = Prompts(jnp.asarray(tokens, jnp.int32), jnp.asarray(mask))
    return rollout(
        make(config), prompts,
        jax.random.key(1), max_new_tokens=30, eos_ids=(3,), pad_id=0,
        samples=2,
    )  # fmt: skip


def test_a_rollout_by_the_kernel_has_the_same_tokens():
    """And where there is no TPU, by plain attention, a layer apart."""
    wanted = written_by(CONFIG)
    assert wanted.mask.sum() > 100
    config = CONFIG.replace(attention="flash")
    with interpreted_kernels() as calls:
        by_kernel = written_by(config)
    for found in (by_kernel, written_by(config.replace(unroll=2))):
        for name in ("tokens", "mask", "truncated"):
            np.testing.assert_array_equal(
                getattr(found, name), getattr(wanted, name)
            )
        np.testing.assert_allclose(
            found.logp, wanted.logp, rtol=2e-4, atol=2e-5
        )
    # Two blocks, and in the middle of the loop 15 tokens; half of the layers
    # see 20 columns.
    usual = (110 + 15 + 20) // 2
    told = {(shapes[1][3], keywords["usual"]) for _, shapes, keywords in calls}
    assert told == {(140, usual)}

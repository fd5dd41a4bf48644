"""Rollouts that hold fewer rows than they write."""

import jax
import jax.numpy as jnp
import numpy as np
from interpreted import interpreted_kernels
from small_run import refusal_of, settings_with
from test_rollout import KEY, Bigram, Tape, chain, prompt_of, some_prompts

from topd_jax.models import Decoder
from topd_jax.models.protocol import from_function
from topd_jax.parallel.sharding import MESH_AXES
from topd_jax.sampling import caches, rollout
from topd_jax.training.setup import check_batches

LENGTHS = (3, 5, 1, 4, 2, 5, 3, 1, 4, 2, 5)
WIDTH = 5 + 30 + 3  # columns of the cache of slots
RUN = dict(max_new_tokens=30, eos_ids=(7, 9, 11), pad_id=0)
SLIDING = dict(sliding=(True, False), window=4)


def assert_same(out, fixed):
    for name in ("prompt", "prompt_mask", "tokens", "mask", "truncated"):
        np.testing.assert_array_equal(
            getattr(out, name), getattr(fixed, name), err_msg=name
        )
    np.testing.assert_allclose(out.logp, fixed.logp, atol=1e-5)


def test_the_rollout_is_that_of_the_fixed_batch(student, monkeypatch):
    """By caches of every width, whose columns are dropped again and again."""
    monkeypatch.setattr(caches, "_SHORTEST", 7)
    limits = jnp.asarray(np.random.default_rng(0).integers(1, 12, 22))
    limits = limits.at[::4].set(99)
    run = RUN | dict(samples=2, limits=limits, top_p=0.9, top_k=30)
    model = Decoder(student.config.replace(**SLIDING), student.arrays)
    prompts = some_prompts(LENGTHS)
    fixed = rollout(model, prompts, KEY, **run)
    lengths = np.asarray(fixed.mask.sum(1))
    assert lengths.max() > 15 and lengths.sum() > 2 * WIDTH
    assert (lengths <= limits).all() and (lengths < limits).any()
    ended = np.isin(fixed.tokens, RUN["eos_ids"]) & fixed.mask
    np.testing.assert_array_equal(fixed.truncated, ~ended.any(1))
    assert fixed.truncated.any() and (lengths == limits).any()
    assert_same(rollout(model, prompts, KEY, slots=4, **run), fixed)


def test_the_kernel_reads_what_slots_hold(student, monkeypatch):
    """By scanned layers, in a single slot."""
    monkeypatch.setattr(caches, "_SHORTEST", 6)
    config = student.config.replace(attention="flash", unroll=1)
    prompts, run = some_prompts(LENGTHS), RUN | dict(max_new_tokens=12)
    model = Decoder(config, student.arrays)
    fixed = rollout(model, prompts, KEY, **run)
    with interpreted_kernels() as calls:
        out = rollout(model, prompts, KEY, slots=1, **run)
    assert_same(out, fixed)
    assert {shapes[0][0] for name, shapes, _ in calls if name == "read"} == {1}


def test_a_function_without_a_cache_begins_rows_anew(student, monkeypatch):
    """Prompts are so long that half a copy, 73 columns, is wider than all."""

    def read(params, tokens, positions, mask, cache):
        return student(tokens, positions, mask)

    monkeypatch.setattr(caches, "_SHORTEST", 3)
    model = from_function(read, {}, head=lambda _: student.head)
    prompts, run = some_prompts(LENGTHS, width=60), RUN | dict(max_new_tokens=8)
    fixed = rollout(student, prompts, KEY, **run)
    assert_same(rollout(model, prompts, KEY, slots=2, **run), fixed)


def test_every_slot_is_refilled_at_once():
    """Rows of 2, 3, 2, 3 and 1 tokens in two slots; one has no end."""
    calls = Tape()
    bigram = Bigram(chain(9, t1=2, t2=3, t3=4, t4=5), calls)
    prompts = prompt_of([3], [1], [3], [2], [4])
    out = rollout(
        bigram, prompts, KEY, max_new_tokens=3, eos_ids=(5,), pad_id=0,
        slots=2, limits=[40] * 5,
    )  # fmt: skip
    jax.block_until_ready(out)
    jax.effects_barrier()
    np.testing.assert_array_equal(out.mask.sum(1), [2, 3, 2, 3, 1])
    steps = [(2, 1)]
    one = [(1, 1)]
    # Rows 0, 2, 4 follow one another, and 1 and 3: five, and six steps.
    assert list(calls) == (
        2 * one + 2 * steps + 3 * (one + steps) + steps
    )  # fmt: skip


def test_slots_that_save_nothing_or_do_not_divide_are_one_line():
    small = dict(data__batch_size=8, eval__batch_size=16)
    said = refusal_of(lambda: settings_with(**small, rollout__slots=16))
    assert "rollout.slots=16 must be below 16, the rows of the" in said
    assert "0 writes all rows side by side" in said
    settings = settings_with(**small, rollout__slots=6)
    mesh = jax.sharding.AbstractMesh((4, 1, 1, 1, 1), MESH_AXES)
    said = refusal_of(lambda: check_batches(settings, mesh))
    assert "rollout.slots=6 must be divisible by the mesh's" in said
    assert "(4); try 8" in said

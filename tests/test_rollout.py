"""Rollouts: what is written, when they stop, what repeats and what differs."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import VOCAB, make_model
from flax import struct
from small_files import QWEN2, make

from topd_jax.models import Lora, init_decoder, unembed
from topd_jax.models.layerwise import unstack
from topd_jax.models.passes import trajectory_states
from topd_jax.sampling import checked, rollout, rollouts
from topd_jax.types import Prompts

KEY = jax.random.key(1)
IDS = dict(eos_ids=(7, 9), pad_id=0)
ZEROS = jnp.zeros((2, 3), jnp.int32)


@struct.dataclass
class BigramCache:
    columns: jax.Array  # [1, B, L]
    length: jax.Array


@struct.dataclass
class Bigram:
    """The next token depends on the last one only; counts its calls."""

    table: jax.Array  # f32[V, V] logits
    calls: list = struct.field(pytree_node=False, default=None)

    @property
    def head(self) -> jax.Array:
        return jnp.eye(self.table.shape[0])

    def init_cache(self, batch: int, columns: int) -> BigramCache:
        zeros = jnp.zeros((1, batch, columns))
        return BigramCache(zeros, jnp.zeros((), jnp.int32))

    def __call__(self, tokens, positions, mask, cache=None):
        assert mask.shape[-1] == cache.columns.shape[-1]
        if self.calls is not None:
            shape = tokens.shape
            jax.debug.callback(lambda _: self.calls.append(shape), tokens[0, 0])
        cache = cache.replace(length=cache.length + tokens.shape[1])
        return self.table[tokens], cache


class Tape(list):
    """A list that a pytree may carry as static data."""

    __hash__ = object.__hash__
    __eq__ = object.__eq__


def chain(size: int, **arrows: int) -> jax.Array:
    """Logits of a certain bigram: ``t3=5`` puts 5 after 3; else stays."""
    after = np.arange(size)
    for name, to in arrows.items():
        after[int(name[1:])] = to
    return jnp.where(jnp.arange(size) == after[:, None], 0.0, -200.0)


def some_prompts(lengths=(3, 5, 1, 4), width=5) -> Prompts:
    rng = np.random.default_rng(1)
    tokens = rng.integers(2, VOCAB, (len(lengths), width))
    mask = np.arange(width) >= width - np.array(lengths)[:, None]
    return Prompts(
        jnp.asarray(np.where(mask, tokens, 0), jnp.int32), jnp.asarray(mask)
    )


def prompt_of(*rows: list[int]) -> Prompts:
    return Prompts(jnp.array(rows), jnp.ones((len(rows), len(rows[0])), bool))


def test_end_is_counted_and_nothing_after_it():
    bigram = Bigram(chain(9, t1=2, t2=3, t3=4, t4=5, t5=1, t6=7, t7=8))
    prompts = prompt_of([0, 1], [1, 2], [3, 6], [3, 5])
    out = rollout(
        bigram, prompts, KEY, max_new_tokens=4, eos_ids=(4, 8), pad_id=0
    )
    np.testing.assert_array_equal(out.prompt, prompts.tokens)
    np.testing.assert_array_equal(
        out.tokens, [[2, 3, 4, 0], [3, 4, 0, 0], [7, 8, 0, 0], [1, 2, 3, 4]]
    )
    np.testing.assert_array_equal(out.mask.sum(1), [3, 2, 2, 4])
    np.testing.assert_array_equal(out.truncated, [False] * 4)
    np.testing.assert_array_equal(out.logp, np.zeros((4, 4)))


def test_stops_when_all_rows_have_ended_by_the_id_of_padding():
    calls = Tape()
    bigram = Bigram(chain(9, t1=2, t2=3, t3=4), calls)
    out = rollout(
        bigram, prompt_of([1], [2]), KEY, max_new_tokens=500, eos_ids=(4,),
        pad_id=4, samples=2,
    )  # fmt: skip
    np.testing.assert_array_equal(out.tokens[::2, :3], [[2, 3, 4], [3, 4, 4]])
    np.testing.assert_array_equal(out.mask.sum(1), [3, 3, 2, 2])
    assert not out.truncated.any()
    jax.block_until_ready(out)
    jax.effects_barrier()
    # One prefill of 2 prompts; 3 tokens in 4 rows: the last is never read.
    assert list(calls) == [(2, 1), (4, 1), (4, 1)]


def test_tokens_and_logp_are_those_of_a_full_forward(student):
    for temperature in (0.0, 0.7):
        out = rollout(
            student, some_prompts(), KEY, max_new_tokens=12,
            temperature=temperature, **IDS,
        )  # fmt: skip
        hidden = jax.jit(trajectory_states)(student, out)
        logits = unembed(student.head, hidden)
        if temperature == 0:
            best = jnp.where(out.mask, logits.argmax(-1), 0)
            np.testing.assert_array_equal(out.tokens, best)
            assert not out.logp.any()
    logp = jnp.take_along_axis(
        jax.nn.log_softmax(logits / temperature), out.tokens[..., None], -1
    )[..., 0]
    np.testing.assert_allclose(
        out.logp, jnp.where(out.mask, logp, 0), atol=1e-4
    )


def test_transitions_follow_the_tempered_softmax():
    table = jax.random.normal(jax.random.key(0), (6, 6)) * 2
    out = rollout(
        Bigram(table), prompt_of([1]), KEY, max_new_tokens=20, eos_ids=(),
        pad_id=0, samples=2000, temperature=0.7, vocab_size=5,
    )  # fmt: skip
    assert out.truncated.all() and out.mask.all(), "nothing is an end"
    p = np.asarray(jax.nn.softmax(table[:, :5] / 0.7))
    before = np.asarray(out.sequence[:, :-1])
    pairs = np.zeros((6, 5))  # the last id is hidden: nobody draws it
    np.add.at(pairs, (before, np.asarray(out.tokens)), 1)
    total = pairs[:5].sum(1, keepdims=True)
    deviation = np.sqrt(p[:5] * (1 - p[:5]) / total)
    assert (np.abs(pairs[:5] / total - p[:5]) < 5 * deviation + 1e-4).all()


def test_noise_depends_on_key_row_and_step_alone(student):
    """And the samples of a prompt are consecutive rows of their own noise."""
    run = dict(max_new_tokens=9, eos_ids=(), pad_id=0)
    prompts = some_prompts((3, 5))
    full = rollout(student, prompts, KEY, samples=3, **run)
    padded = jax.tree.map(
        lambda x: jnp.pad(jnp.repeat(x, 3, axis=0)[:4], ((0, 0), (3, 0))),
        prompts,
    )
    out = rollout(student, padded, KEY, **run | {"max_new_tokens": 4})
    np.testing.assert_array_equal(out.tokens, full.tokens[:4, :4])
    np.testing.assert_allclose(out.logp, full.logp[:4, :4], atol=1e-5)
    other = rollout(student, prompts, jax.random.key(2), samples=3, **run)
    assert (np.asarray(other.tokens) != np.asarray(full.tokens)).mean() > 0.5
    assert len(np.unique(np.asarray(full.tokens), axis=0)) == 6


def test_settings_do_not_recompile():
    bigram, compiled = Bigram(chain(VOCAB)), rollouts._rollout._cache_size
    run = dict(max_new_tokens=3, **IDS)
    rollout(bigram, some_prompts(), KEY, temperature=1.0, **run)
    before = compiled()
    for temperature in (0.3, 0.0, 2, jnp.float32(0.9)):
        rollout(bigram, some_prompts(), KEY, temperature=temperature, **run)
    assert compiled() == before
    for top_p in (0.5, 0.9):
        rollout(bigram, some_prompts(), KEY, top_p=top_p, **run)
        assert compiled() == before + 1


def test_bfloat16_and_scanned_layers_inside_another_jit():
    model = make(make_model(0).config.replace(dtype="bfloat16", unroll=1))
    run = dict(max_new_tokens=5, eos_ids=(), pad_id=0)
    outer = jax.jit(lambda *args: rollout(*args, **run))
    out = outer(model, some_prompts(), KEY)
    alone = rollout(model, some_prompts(), KEY, **run)
    np.testing.assert_array_equal(out.tokens, alone.tokens)
    assert out.logp.dtype == jnp.float32
    assert np.isfinite(out.logp).all()


def test_a_token_copies_no_stack_of_weights():
    """Of layers that are scanned, by programs that are optimized."""
    config = make_model(0).config.replace(layers=3, unroll=1)
    run = functools.partial(rollout, max_new_tokens=5, **IDS)
    model = jax.eval_shape(functools.partial(init_decoder, config), KEY)
    text = jax.jit(run).lower(model, some_prompts(), KEY).compile().as_text()
    width, inner = config.width, config.mlp_width
    assert re.search(rf"f32\[3,{width},{inner}\]", text)
    copies = rf"= f32\[3,(1,)?{width},{inner}\]\S* copy\("
    assert not re.findall(copies, text)


@pytest.mark.parametrize("targets", [(), ("v", "up")])
def test_products_of_a_loop_are_those_of_the_stack(targets):
    """One for the maps that read the same, but where one has an adapter."""
    lora = Lora(2, 4.0, targets) if targets else None
    config = QWEN2.replace(layers=2, unroll=2, lora=lora)
    model, length = make(config), 6
    tokens = jax.random.randint(KEY, (2, length), 0, config.vocab_size)
    positions = jnp.arange(length)[None].repeat(2, 0)
    seen = jnp.tri(length, dtype=bool)[None].repeat(2, 0)

    @jax.jit
    def run(model):
        def read(columns, cache):
            now = tokens[:, columns], positions[:, columns], seen[:, columns]
            return model(*now, cache)

        hidden, _ = model(tokens, positions, seen)
        first, cache = read(slice(4), model.init_cache(2, length))
        then, _ = read(slice(4, length), cache)
        return hidden, jnp.concatenate([first, then], axis=1), model

    want, _, _ = run(model)
    *got, reader = run(unstack(model, length))
    for states in got:
        np.testing.assert_allclose(states, want, atol=1e-5)
    merged = {name for name in reader.layers[0] if "+" in name}
    assert merged == {
        together
        for together in ("q+k+v", "gate+up")
        if not set(together.split("+")) & set(targets)
    }


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        (dict(max_new_tokens=0), "max_new_tokens=0 must be at least 1"),
        (dict(samples=0), "samples=0"),
        (dict(eos_ids=7), "sequence: \\(7,\\)"),
        (dict(eos_ids=(3, 40)), "eos_ids: 40 must lie in 0..39"),
        (dict(vocab_size=7), "\\(7, 9\\) must have one below vocab_size=7"),
        (dict(pad_id=-1), "pad_id: -1"),
        (dict(top_k=41), "top_k=41.*40"),
        (dict(limits=[1] * 3, samples=2), r"int32\[3\] and must be int32\[8\]"),
        (dict(limits=[1.5] * 4), "limits is float32"),
        (dict(sharding="columns"), "'columns' must be one of train, gathered"),
        (dict(slots=-1), "slots=-1 must be at least 1"),
        (dict(prompts=Prompts(ZEROS, ZEROS[0] > 0)), "one shape"),
        (dict(prompts=Prompts(ZEROS, ZEROS)), "mask has dtype int32.*!= 0"),
        (dict(prompts=Prompts(ZEROS * 1.0, ZEROS > 0)),
         "prompts.tokens has dtype float32"),
    ],
)  # fmt: skip
def test_rollout_refuses(student, setting, words):
    run = dict(prompts=some_prompts(), key=KEY, max_new_tokens=3, **IDS)
    with pytest.raises(ValueError, match=words):
        rollout(student, **run | setting)


def test_checked_refuses_values_of_prompts():
    bigram = Bigram(chain(VOCAB))
    for tokens, mask, words in (
        ([4, 5, 0], [1, 1, 0], "row 1 .* is not padded on the left"),
        ([0, 0, 0], [0, 0, 0], "row 1 .* has no token"),
        ([4, 40, 5], [1, 1, 1], "the id 40 and ids must lie in 0..39"),
        ([0, -1, 5], [0, 1, 1], "the id -1"),
    ):
        bad = Prompts(
            jnp.array([[4, 5, 6], tokens]), jnp.array([[1, 1, 1], mask], bool)
        )
        with pytest.raises(ValueError, match=words):
            checked(rollout)(bigram, bad, KEY, max_new_tokens=3, **IDS)


def test_checks_are_not_compiled_unless_asked_for():
    bigram, run = Bigram(chain(VOCAB)), dict(max_new_tokens=3, **IDS)
    out = checked(rollout)(bigram, some_prompts(), KEY, **run)
    same = rollout(bigram, some_prompts(), KEY, **run)
    np.testing.assert_array_equal(out.tokens, same.tokens)

    def operations():
        program = jax.jit(lambda *args: rollout(*args, **run))
        lowered = program.lower(bigram, some_prompts(), KEY)
        cost = lowered.compile().cost_analysis()
        return cost["flops"], cost["bytes accessed"]

    plain = operations()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rollouts, "check_prompt_values", lambda *args: None)
        rollouts._rollout.clear_cache()
        assert operations() == plain

"""Branches: a model's own continuations on the cache it has."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import PAD, VOCAB, make_trajectories
from foreign_model import make_foreign
from small_files import RECURRENT, make
from test_attention import CONFIG, GPT_OSS, forward

from topd_jax.models import unembed
from topd_jax.models.attention import core
from topd_jax.models.layerwise import unstack
from topd_jax.models.passes import branch_states, trajectory_cache
from topd_jax.sampling import branch, branch_columns, checked
from topd_jax.types import Candidates

K = 6
# With a fifth of the ids as ends, about half of the windows are cut short.
RUN = dict(length=K, eos_ids=tuple(range(3, 11)), pad_id=PAD, vocab_size=VOCAB)
POSITIONS = jnp.array([[0, 3, 8], [1, 2, 6], [0, 4, 5], [1, 0, 0]])


@pytest.fixture(scope="module")
def rows():
    return make_trajectories(rows=4, completion=9)


@pytest.fixture(scope="module")
def candidates(rows) -> Candidates:
    last = rows.mask.sum(1)[:, None] - 1
    mask = jnp.ones((4, 3), bool).at[3, 1:].set(False)
    return Candidates(jnp.minimum(POSITIONS, last), mask)


read = jax.jit(trajectory_cache, static_argnums=2)


def look_ahead(model, rows, candidates, **settings):
    settings = RUN | settings
    extra = branch_columns(candidates.positions.shape[1], settings["length"])
    model = unstack(model, 64)  # where the config unrolls
    hidden, cache = read(model, rows, rows.sequence.shape[1] + extra)
    return branch(model, cache, hidden, rows, candidates, **settings)


def texts(rows, candidates, windows):
    """Prompt, y_{<t} and branch of every candidate: tokens, and which exist."""
    start, columns = rows.prompt.shape[1], rows.sequence.shape[1]
    parts = (
        (rows.sequence, windows.tokens), (rows.sequence_mask, windows.mask)
    )  # fmt: skip
    read, behind = (np.asarray(x) for x in zip(*parts, strict=True))
    out = np.zeros((2, 4, 3, columns + K), int)
    out[..., columns:] = behind
    for row, m in np.ndindex(4, 3):
        end = start + int(candidates.positions[row, m])
        out[:, row, m, columns - end : columns] = read[:, row, :end]
    tokens, exists = out.reshape(2, 12, -1)
    return tokens, exists > 0


MODELS = {
    "foreign": make_foreign,
    "sinks, unrolled": functools.partial(make, GPT_OSS.replace(unroll=3)),
    "few behind": functools.partial(make, CONFIG),
    "recurrent": functools.partial(make, RECURRENT),
}


@pytest.mark.parametrize("name", MODELS)
def test_branches_equal_reading_their_text(name, rows, candidates, monkeypatch):
    """Their keys apart from the prefix, or where few are behind it, with it."""
    if name != "few behind":
        monkeypatch.setattr(core, "_FEW_BEHIND", 0)
    model = MODELS[name]()
    ids = model.head.shape[0]
    windows, written = look_ahead(
        model, rows, candidates, return_hidden=True, vocab_size=ids
    )
    mask = np.asarray(windows.mask)
    alone = jax.jit(forward)(model, *texts(rows, candidates, windows))
    alone = alone[:, -K - 1 : -1].reshape(4, 3, K, -1)
    likeliest = np.asarray(unembed(model.head, alone).argmax(-1))
    np.testing.assert_array_equal(windows.tokens, np.where(mask, likeliest, 0))
    ends = np.isin(likeliest, RUN["eos_ids"])
    used = np.asarray(candidates.mask)[..., None]
    np.testing.assert_array_equal(mask, used & (ends.cumsum(-1) - ends == 0))
    lengths = mask.sum(-1)[used[..., 0]]
    if name == "few behind":
        assert lengths.min() < K == lengths.max(), "some end and some do not"
    states, along = jax.jit(branch_states)(model, rows, candidates, windows)
    kept = np.where(mask[..., None], alone, 0)
    # Parameters that differ by 3e-7 move the recurrent states by 4e-4.
    near = 4e-4 if name == "recurrent" else 1e-5
    np.testing.assert_allclose(written, kept, 1e-4, near)
    np.testing.assert_allclose(along[mask], alone[mask], 1e-4, near)
    hidden, cache = read(model, rows, rows.sequence.shape[1])
    np.testing.assert_allclose(states, hidden, 1e-4, near)
    # The states of all prefixes would not fit.
    assert (cache is None) == (name == "recurrent")


def test_branches_do_not_see_each_other_nor_what_follows(
    student, rows, candidates
):
    together, states = look_ahead(student, rows, candidates)
    assert states is None
    single = jax.tree.map(lambda x: x[:, 1:2], candidates)
    later = jnp.arange(9) >= single.positions
    rows = rows.replace(tokens=jnp.where(later, 11, rows.tokens))
    alone, _ = look_ahead(student, rows, single)
    np.testing.assert_array_equal(alone.tokens[:, 0], together.tokens[:, 1])
    np.testing.assert_array_equal(alone.mask[:, 0], together.mask[:, 1])
    first, _ = look_ahead(student, rows, single, length=1)
    assert branch_columns(3, 1) == 0, "the first token needs no column"
    np.testing.assert_array_equal(first.tokens, alone.tokens[..., :1])
    none = candidates.replace(mask=jnp.zeros((4, 3), bool))
    nothing, _ = look_ahead(student, rows, none)
    assert not nothing.mask.any() and not nothing.tokens.any()


def test_first_tokens_follow_the_models_distribution_and_the_key(student, rows):
    """Slots that share a prefix draw apart."""
    same = Candidates(jnp.full((4, 4000), 2), jnp.ones((4, 4000), bool))
    windows, other = (
        look_ahead(
            student, rows, same, length=1, temperature=0.8, vocab_size=20,
            key=jax.random.key(k),
        )[0]
        for k in (0, 1)
    )  # fmt: skip
    assert (windows.tokens != other.tokens).mean() > 0.5
    hidden, _ = read(student, rows, rows.sequence.shape[1])
    logits = unembed(student.head, hidden[:, 2])[:, :20]
    p = np.asarray(jax.nn.softmax(logits / 0.8))
    for row, tokens in enumerate(np.asarray(windows.tokens)[..., 0]):
        share = np.bincount(tokens, minlength=20) / 4000
        assert len(share) == 20, "ids of the teacher alone are not drawn"
        deviation = np.sqrt(p[row] * (1 - p[row]) / 4000)
        assert (np.abs(share - p[row]) < 5 * deviation + 1e-4).all()


def test_branch_refuses(student, rows, candidates):
    def refuse(words, hidden=None, cache=None, candidates=candidates, **other):
        full, right = read(student, rows, rows.sequence.shape[1] + 15)
        hidden = full if hidden is None else hidden
        cache = right if cache is None else cache
        with pytest.raises(ValueError, match=words):
            branch(student, cache, hidden, rows, candidates, **RUN | other)

    refuse("needs a key", temperature=0.5)
    refuse("length=0 must be at least 1", length=0)
    refuse("vocab_size=41 must lie in 1..40", vocab_size=41)
    refuse("10\\) must have one below vocab_size=3", vocab_size=3)
    refuse(r"branch_columns\(3, 6\)\), 29 col", cache=student.init_cache(4, 9))
    refuse("completion coordinates", hidden=jnp.zeros((4, 8, 16)))
    refuse(r"\[B=4, M\]", candidates=jax.tree.map(lambda x: x[0], candidates))
    integers = candidates.replace(mask=candidates.mask.astype(int))
    refuse("candidates.mask has dtype int32.*mask != 0", candidates=integers)
    floats = candidates.replace(positions=POSITIONS * 1.0)
    refuse("positions has dtype float32", candidates=floats)


def test_checked_refuses_candidates_outside_the_completion(
    student, rows, candidates
):
    for wrong in (-1, 9):
        bad = candidates.replace(positions=POSITIONS.at[1, 2].set(wrong))
        with pytest.raises(ValueError, match=f"has {wrong} and.*in 0..8"):
            checked(look_ahead)(student, rows, bad, length=1)

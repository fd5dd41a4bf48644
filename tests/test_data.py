"""Streams of prompts, and the corpora of the tiny world."""

import json

import numpy as np
import pytest

from topd_jax.data import prompts, sources
from topd_jax.data.toy_world.pretraining import encode_pairs

PROMPTS = {"code": 3, "math": 5}


@pytest.fixture(scope="module")
def encoded(tokenizer) -> prompts.EncodedPrompts:
    records = sources.read_world("train", 37, seed=0)
    return prompts.encode_prompts(records, tokenizer, max_length=20)


def two_teachers(code: int = 7, math: int = 20) -> prompts.EncodedPrompts:
    """Prompts of increasing lengths; the teachers alternate at first."""
    names = ["code", "math"] * min(code, math)
    names += ["code"] * (code - math) + ["math"] * (math - code)
    return prompts.EncodedPrompts(
        tuple({"teacher": n, "prompt": str(i)} for i, n in enumerate(names)),
        tuple(np.full(1 + i % 9, i, np.int32) for i in range(len(names))),
        pad_id=0, max_length=16, skipped=0,
    )  # fmt: skip


def take(stream, count: int) -> list[prompts.PromptBatch]:
    return [next(stream) for _ in range(count)]


def assert_same(left: list, right: list) -> None:
    for a, b in zip(left, right, strict=True):
        np.testing.assert_array_equal(a.index, b.index)
        np.testing.assert_array_equal(a.prompts.tokens, b.prompts.tokens)
        np.testing.assert_array_equal(a.prompts.mask, b.prompts.mask)


def test_prompts_are_padded_on_the_left(encoded, tokenizer):
    for batch in take(prompts.prompt_stream(encoded, batch_size=4, seed=0), 9):
        # Always the full width, so that a run compiles once.
        assert batch.prompts.tokens.shape == batch.prompts.mask.shape == (4, 20)
        assert batch.prompts.tokens.dtype == np.int32
        for row, index in enumerate(batch.index):
            tokens, mask = batch.prompts.tokens[row], batch.prompts.mask[row]
            ids = tokenizer.chat(encoded.records[index]["prompt"])
            assert tokens[mask].tolist() == ids
            assert mask[-len(ids) :].all() and mask.sum() == len(ids)
            assert (tokens[~mask] == tokenizer.pad_id).all()


def test_epochs_hold_each_prompt_once_in_differing_orders(encoded):
    def batch(seed):
        stream = prompts.prompt_stream(encoded, batch_size=37, seed=seed)
        return [b.index.tolist() for b in take(stream, 2)]

    first, second = batch(3)
    assert sorted(first) == sorted(second) == list(range(37))
    assert first != second
    assert batch(4)[0] != first


def routed(data: prompts.EncodedPrompts) -> prompts.Stream:
    return prompts.prompt_stream(
        data, batch_size=8, seed=1, prompts_per_teacher=PROMPTS
    )


def test_every_batch_holds_the_same_number_of_each_teacher():
    data = two_teachers()
    batches = take(routed(data), 28)
    seen = {"code": [], "math": []}
    for batch in batches:
        names = [data.records[i]["teacher"] for i in batch.index]
        assert names == ["code"] * 3 + ["math"] * 5
        for name, i in zip(names, batch.index, strict=True):
            seen[name].append(int(i))
    # Each teacher's prompts once an epoch, in an order that changes.
    for name, count in (("code", 7), ("math", 20)):
        epochs = np.reshape(seen[name], (-1, count))
        assert (np.sort(epochs) == np.sort(epochs[0])).all()
        assert (epochs[0] != epochs[1]).any()
    # Prompts of one teacher do not change the order of the other's.
    more = take(routed(two_teachers(7, 25)), 6)
    both = list(zip(batches[:6], more, strict=True))
    assert all((a.index[:3] == b.index[:3]).all() for a, b in both)
    assert any((a.index != b.index).any() for a, b in both)
    with pytest.raises(ValueError, match="no prompt of the teacher 'code'"):
        routed(data.take([1, 3]))


def test_a_stream_resumes_identically_and_refuses_other_prompts():
    data = two_teachers()
    whole, started, resumed = take(routed(data), 12), routed(data), routed(data)
    assert_same(take(started, 7), whole[:7])
    state = json.loads(json.dumps(started.get_state()))
    resumed.set_state(state)
    assert_same(take(resumed, 5), whole[7:])
    assert_same(take(started, 5), whole[7:])
    for other in (data.take(range(26)), data.take([2, 1, 0, *range(3, 27)])):
        with pytest.raises(ValueError, match="made with other prompts"):
            routed(other).set_state(state)


def test_a_prompt_that_is_too_long_is_named_or_skipped(tokenizer):
    records = [
        sources.Record(prompt=p, answer="", index=i, source=f"q line {i + 1}")
        for i, p in enumerate(["1+1?", "1+1+1+1+1+1?", "2+2?"])
    ]

    def encode(max_length: int, on_long_prompt: str):
        return prompts.encode_prompts(
            records, tokenizer, max_length=max_length,
            on_long_prompt=on_long_prompt,
        )  # fmt: skip

    with pytest.raises(ValueError) as caught:
        encode(6, "error")
    for part in ("prompt 1", "line 2", "13 tokens", "is 6", "on_long_prompt"):
        assert part in str(caught.value)
    kept = encode(6, "skip")
    assert (kept.skipped, len(kept.records)) == (1, 2)
    assert kept.fingerprint() == encode(13, "error").take([0, 2]).fingerprint()
    assert kept.fingerprint() != kept.take([1, 0]).fingerprint()
    with pytest.raises(ValueError, match="no prompt is left: 3 of 3"):
        encode(2, "skip")


def test_ordered_batches_hold_each_prompt_once(encoded):
    batches = list(prompts.ordered_batches(encoded, batch_size=16))
    index = np.concatenate([b.index for b in batches])
    assert index.tolist() == [*range(37), *[-1] * 11]
    assert {b.prompts.tokens.shape for b in batches} == {(16, 20)}
    last = batches[-1].prompts.tokens
    assert (last[5:] == last[4]).all()


# --- corpora ------------------------------


def test_batches_learn_completions_alone(pairs, tokenizer):
    data = encode_pairs(pairs, tokenizer)
    # Each row once an epoch.
    rows = [data.batch(s, batch_size=100, seed=0) for s in range(8)]
    texts = []
    for tokens, mask in rows:
        assert tokens.shape == mask.shape == (100, data.tokens.shape[1])
        assert tokens.dtype == np.int32
        for ids, targets in zip(tokens, mask, strict=True):
            begin, end = np.flatnonzero(targets)[[0, -1]]
            assert targets[begin : end + 1].all()
            assert ids[end] == tokenizer.eos_ids[0]
            assert (ids[end + 1 :] == tokenizer.pad_id).all()
            assert ids[0] == tokenizer.bos_id
            prompt = tokenizer.decode(ids[1:begin])
            texts.append((prompt, tokenizer.decode(ids[begin:end])))
    assert sorted(texts[:400]) == sorted(texts[400:]) == sorted(pairs)
    assert texts[:400] != texts[400:]
    again = data.batch(3, batch_size=100, seed=0)
    np.testing.assert_array_equal(again[0], rows[3][0])
    assert (data.batch(3, batch_size=100, seed=1)[0] != again[0]).any()
    with pytest.raises(ValueError, match=r"batch_size=401 .* 1\.\.400"):
        data.batch(0, batch_size=401, seed=0)
    groups = data.by_length(3)
    assert [len(g.tokens) for g in groups] == [133] * 3
    longest = [g.length.max() for g in groups]
    assert [g.tokens.shape[1] for g in groups] == longest == sorted(longest)

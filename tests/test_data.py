"""Batches of prompts, of written solutions, and of truth labels."""

import json

import numpy as np
import pytest

from topd_jax.data import prompts, sources, tokenizers
from topd_jax.data.toy_world import corpus, problems, truth


@pytest.fixture(scope="module")
def pairs() -> dict[str, list[tuple[str, str]]]:
    sample = problems.problems("train", 400, seed=0)
    return {
        "teacher": corpus.world_pairs(sample, problems.TEACHER_STYLE, seed=0),
        "student": corpus.world_pairs(
            sample, problems.STUDENT_STYLE, problems.STUDENT_HABIT, seed=1
        ),
    }


@pytest.fixture(scope="module")
def tokenizer(pairs: dict) -> tokenizers.SentencePieceTokenizer:
    return corpus.train_tokenizer(pairs["teacher"], pairs["student"])


# --- truth, token by token ------------------------------


def test_labels_of_a_batch(pairs: dict, tokenizer):
    data = corpus.encode_pairs(pairs["student"], tokenizer)
    batch = corpus.trajectory_batch(data, batch_size=64, seed=0, step=0)
    rows = corpus.batch_rows(400, batch_size=64, seed=0, step=0)
    sample = [pairs["student"][i] for i in rows]
    labels = truth.label_batch(
        [problem for problem, _ in sample],
        batch.tokens,
        batch.mask,
        tokenizer,
        window=10,
    )
    width = batch.mask.shape[1]
    assert (labels.token[~batch.mask] == truth.AFTER).all()
    for row, (problem, text) in enumerate(sample):
        fork = labels.fork[row]
        begun = labels.token[row] == truth.FORK
        at = truth.fork_index(problem, [*text, None])
        if at is None:
            assert fork == width
            assert not begun.any()
            assert problems.is_correct(problem, text)
            continue
        assert np.flatnonzero(begun).tolist() == [fork]
        # The token with the first wrong character.
        said = len(tokenizer.decode(batch.tokens[row, :fork]))
        assert (
            said
            <= at
            < said + len(tokenizer.decode(batch.tokens[row, fork : fork + 1]))
        )
        near = np.flatnonzero(labels.window[row] == truth.FORK)
        assert near.tolist() == list(range(max(0, fork - 9), fork + 1))
        assert (labels.token[row, fork + 1 :] == truth.AFTER).all()
    assert 10 < (labels.fork < width).sum() < 54


def test_an_early_end_of_sequence_is_a_fork(tokenizer):
    ids = [*tokenizer.encode("= 5"), *tokenizer.eos_ids, tokenizer.pad_id]
    labels = truth.label_batch(
        ["2+3?"],
        np.array([ids]),
        np.array([[True, True, True, False]]),
        tokenizer,
        window=2,
    )
    ok, fork, after = truth.OK, truth.FORK, truth.AFTER
    assert labels.token.tolist() == [[ok, ok, fork, after]]
    assert labels.window.tolist() == [[ok, fork, fork, after]]
    assert labels.fork.tolist() == [2]


# --- batches of prompts ------------------------------


@pytest.fixture(scope="module")
def encoded(tokenizer) -> prompts.EncodedPrompts:
    records = sources.read_world("train", 37, seed=0)
    return prompts.encode_prompts(records, tokenizer, max_length=16)


def take(stream, count: int) -> list[prompts.PromptBatch]:
    return [next(stream) for _ in range(count)]


def assert_same(
    left: list[prompts.PromptBatch], right: list[prompts.PromptBatch]
) -> None:
    for a, b in zip(left, right, strict=True):
        np.testing.assert_array_equal(a.index, b.index)
        np.testing.assert_array_equal(a.prompts.tokens, b.prompts.tokens)
        np.testing.assert_array_equal(a.prompts.mask, b.prompts.mask)


def test_prompts_are_padded_on_the_left(encoded, tokenizer):
    (batch,) = take(prompts.prompt_stream(encoded, batch_size=8, seed=0), 1)
    assert batch.prompts.tokens.shape == batch.prompts.mask.shape == (8, 16)
    assert batch.prompts.tokens.dtype == np.int32
    for row, index in enumerate(batch.index):
        tokens, mask = batch.prompts.tokens[row], batch.prompts.mask[row]
        ids = tokenizer.chat(encoded.records[index]["prompt"])
        assert tokens[16 - len(ids) :].tolist() == ids
        assert (tokens[: 16 - len(ids)] == tokenizer.pad_id).all()
        assert mask.sum() == mask[16 - len(ids) :].sum() == len(ids)


def test_epochs_hold_each_prompt_once_in_differing_orders(encoded):
    stream = prompts.prompt_stream(encoded, batch_size=37, seed=3)
    first, second = take(stream, 2)
    assert sorted(first.index) == sorted(second.index) == list(range(37))
    assert first.index.tolist() != second.index.tolist()
    other = next(prompts.prompt_stream(encoded, batch_size=37, seed=4))
    assert other.index.tolist() != first.index.tolist()


def test_a_resumed_stream_goes_on_identically(encoded):
    def stream():
        return prompts.prompt_stream(encoded, batch_size=8, seed=1)

    whole = take(stream(), 12)
    started = stream()
    assert_same(take(started, 7), whole[:7])
    state = json.loads(json.dumps(started.get_state()))
    resumed = stream()
    resumed.set_state(state)
    assert_same(take(resumed, 5), whole[7:])
    assert_same(take(started, 5), whole[7:])


def test_orbax_saves_the_stream(encoded, tmp_path):
    import grain
    import orbax.checkpoint as ocp

    stream = prompts.prompt_stream(encoded, batch_size=8, seed=1)
    take(stream, 3)
    with ocp.CheckpointManager(tmp_path / "run") as manager:
        manager.save(
            3,
            args=ocp.args.Composite(
                data=grain.checkpoint.CheckpointSave(stream)
            ),
        )
        manager.wait_until_finished()
        expected = take(stream, 2)
        again = prompts.prompt_stream(encoded, batch_size=8, seed=1)
        manager.restore(
            3,
            args=ocp.args.Composite(
                data=grain.checkpoint.CheckpointRestore(again)
            ),
        )
    assert_same(take(again, 2), expected)


@pytest.mark.parametrize("count", [2, 4])
def test_processes_share_the_same_global_batch(encoded, count: int):
    buckets = (10, 11, 12, 16)
    whole = take(
        prompts.prompt_stream(encoded, batch_size=8, seed=2, buckets=buckets),
        6,
    )
    parts = [
        take(
            prompts.prompt_stream(
                encoded,
                batch_size=8,
                seed=2,
                buckets=buckets,
                process_index=index,
                process_count=count,
            ),
            6,
        )
        for index in range(count)
    ]
    for step, batch in enumerate(whole):
        shares = [part[step] for part in parts]
        assert {len(share.index) for share in shares} == {8 // count}
        np.testing.assert_array_equal(
            np.concatenate([share.index for share in shares]), batch.index
        )
        np.testing.assert_array_equal(
            np.concatenate([share.prompts.tokens for share in shares]),
            batch.prompts.tokens,
        )


def test_widths_are_buckets(encoded):
    assert prompts.default_buckets(16) == (16,)
    assert prompts.default_buckets(100) == (16, 32, 64, 100)
    assert prompts.default_buckets(128) == (16, 32, 64, 128)
    stream = prompts.prompt_stream(
        encoded, batch_size=1, seed=0, buckets=(9, 16)
    )
    lengths = [len(ids) for ids in encoded.ids]
    for batch in take(stream, 37):
        width = 9 if lengths[batch.index[0]] <= 9 else 16
        assert batch.prompts.tokens.shape == (1, width)
    with pytest.raises(ValueError, match="largest bucket"):
        prompts.prompt_stream(encoded, batch_size=1, seed=0, buckets=(5,))


def test_a_batch_that_processes_cannot_share_is_refused(encoded):
    with pytest.raises(ValueError, match=r"batch_size=10 .*\(4\); try 8"):
        prompts.prompt_stream(encoded, batch_size=10, seed=0, process_count=4)
    with pytest.raises(ValueError, match=r"batch_size=0"):
        prompts.prompt_stream(encoded, batch_size=0, seed=0)
    with pytest.raises(ValueError, match=r"process_index=4 .* 0\.\.3"):
        prompts.prompt_stream(
            encoded, batch_size=8, seed=0, process_index=4, process_count=4
        )


def test_a_prompt_that_is_too_long_is_named_or_skipped(tokenizer, tmp_path):
    path = tmp_path / "q.jsonl"
    path.write_text(
        '{"question": "1+1?"}\n'
        '{"question": "1+1+1+1+1+1?"}\n'
        '{"question": "2+2?"}\n'
    )
    records = sources.read_jsonl(path)
    with pytest.raises(ValueError) as caught:
        prompts.encode_prompts(records, tokenizer, max_length=6)
    for part in ("prompt 1", "line 2", "13 tokens", "is 6", "on_long_prompt"):
        assert part in str(caught.value)
    kept = prompts.encode_prompts(
        records, tokenizer, max_length=6, on_long_prompt="skip"
    )
    assert kept.skipped == 1
    assert [r["prompt"] for r in kept.records] == ["1+1?", "2+2?"]
    with pytest.raises(ValueError, match="no prompt is left: 3 of 3"):
        prompts.encode_prompts(
            records, tokenizer, max_length=2, on_long_prompt="skip"
        )
    with pytest.raises(ValueError, match="on_long_prompt='trim'"):
        prompts.encode_prompts(
            records, tokenizer, max_length=6, on_long_prompt="trim"
        )


def test_fingerprints_of_prompts_tell_them_apart(encoded, tokenizer):
    def fingerprint(count: int, seed: int) -> str:
        records = sources.read_world("train", count, seed)
        return prompts.encode_prompts(
            records, tokenizer, max_length=16
        ).fingerprint()

    assert fingerprint(37, 0) == encoded.fingerprint()
    assert fingerprint(36, 0) != encoded.fingerprint()
    assert fingerprint(37, 1) != encoded.fingerprint()


def test_ordered_batches_hold_each_prompt_once(encoded):
    batches = list(prompts.ordered_batches(encoded, batch_size=16))
    assert [len(b.index) for b in batches] == [16, 16, 16]
    index = np.concatenate([b.index for b in batches])
    assert index.tolist() == [*range(37), *[-1] * 11]


# --- corpora ------------------------------


def test_supervised_batches_learn_completions_alone(pairs: dict, tokenizer):
    data = corpus.encode_pairs(pairs["teacher"], tokenizer)
    tokens, mask = corpus.supervised_batch(data, batch_size=16, seed=0, step=3)
    rows = corpus.batch_rows(400, batch_size=16, seed=0, step=3)
    assert tokens.shape == mask.shape == (16, data.tokens.shape[1])
    assert tokens.dtype == np.int32
    for row, index in enumerate(rows):
        problem, text = pairs["teacher"][index]
        learnt = tokens[row, mask[row]].tolist()
        assert learnt == [*tokenizer.encode(text), 2]
        begin = int(mask[row].argmax())
        assert tokens[row, :begin].tolist() == tokenizer.chat(problem)
        end = begin + len(learnt)
        assert (tokens[row, end:] == tokenizer.pad_id).all()


def test_batches_are_a_function_of_seed_and_step():
    def rows(seed: int, step: int) -> list[int]:
        return corpus.batch_rows(
            10, batch_size=5, seed=seed, step=step
        ).tolist()

    assert rows(0, 1) == rows(0, 1)
    assert sorted(rows(0, 0) + rows(0, 1)) == list(range(10))
    assert sorted(rows(0, 2) + rows(0, 3)) == list(range(10))
    assert rows(0, 0) != rows(0, 2)
    assert rows(0, 0) != rows(1, 0)
    with pytest.raises(ValueError, match=r"batch_size=11 .* 1\.\.10"):
        corpus.batch_rows(10, batch_size=11, seed=0, step=0)


def test_trajectories_hold_the_same_pairs(pairs: dict, tokenizer):
    data = corpus.encode_pairs(pairs["teacher"], tokenizer)
    batch = corpus.trajectory_batch(data, batch_size=16, seed=0, step=3)
    tokens, mask = corpus.supervised_batch(data, batch_size=16, seed=0, step=3)
    for row in range(16):
        prompt = batch.prompt[row, batch.prompt_mask[row]]
        completion = batch.tokens[row, batch.mask[row]]
        begin = int(mask[row].argmax())
        np.testing.assert_array_equal(prompt, tokens[row, :begin])
        np.testing.assert_array_equal(completion, tokens[row, mask[row]])
        assert batch.prompt_mask[row, -1]
        assert batch.mask[row, 0]
        assert (np.diff(batch.prompt_mask[row].astype(int)) >= 0).all()
        assert (np.diff(batch.mask[row].astype(int)) <= 0).all()
    assert (batch.tokens[~batch.mask] == tokenizer.pad_id).all()
    assert (batch.prompt[~batch.prompt_mask] == tokenizer.pad_id).all()
    assert batch.logp.shape == batch.mask.shape
    assert not batch.truncated.any()


def test_bad_corpora_are_refused(tokenizer):
    with pytest.raises(ValueError, match="at least one"):
        corpus.encode_pairs([], tokenizer)
    long = [("1+1?", "= 2#2."), ("1+1?", "= 2; answer 2.")]
    with pytest.raises(ValueError, match=r"pair 1 has \d+ .*limit is 11"):
        corpus.encode_pairs(long, tokenizer, max_length=11)

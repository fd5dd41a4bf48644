"""Stage 1 on stored solutions: streams of rows, and a run."""

import dataclasses

import numpy as np
import pytest
from small_run import (
    assert_same_run,
    changed,
    interrupted,
    run_in,
    settings_with,
)

from topd_jax.data import solutions as solution_data
from topd_jax.data.packing import SolutionStream
from topd_jax.models.decoder import Decoder
from topd_jax.models.frequencies import RopeScaling
from topd_jax.training import loop
from topd_jax.training.logging import read_jsonl

EOS = 2


@pytest.fixture(scope="module")
def settings(written, world_cache):
    return settings_with(
        world_cache, train__stage="offline", train__steps=8,
        offline__path=str(written[0]), offline__pack_length=64,
    )  # fmt: skip


@pytest.fixture(scope="module")
def finished(settings, setup, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("finished")
    run_in(settings, workdir, setup).train()
    return workdir


def test_a_run_reads_the_set(finished, written):
    rows = read_jsonl(finished / "metrics.jsonl")
    assert [r["step"] for r in rows] == [1, 2, 3, 4, 5, 6, 7, 8]
    sizes = [
        len(s["completion_tokens"])
        for s in solution_data.read_solutions(str(written[0]))
    ]
    # 64 solutions in batches of 8: an epoch reads each token once.
    assert sum(r["num_tokens"] for r in rows) == sum(sizes)
    for row in rows:
        assert row["solutions"] == 8
        assert 0.5 < row["filled"] <= 1
        assert row["loss"] == pytest.approx(
            0.5 * row["divergence"] + 0.5 * row["cross_entropy"], rel=1e-5
        )
        assert row["length_mean"] == row["num_tokens"] / 8
    divergence = pytest.approx(rows[2]["divergence"], rel=1e-4)
    assert rows[2]["forward_kl"] == divergence


def test_a_stopped_run_resumes_bit_identically(
    settings, setup, finished, tmp_path
):
    with interrupted(4):
        run_in(settings, tmp_path, setup).train()
    run_in(settings, tmp_path, setup).train()
    assert_same_run(finished, tmp_path)


def test_what_does_not_fit_is_refused_early(settings, tmp_path):
    with pytest.raises(ValueError, match="pack_length=64 and offline.keep"):
        loop.train(changed(settings, "offline", path=""), tmp_path)
    chosen = dict(path="", pack_length=0, keep="correct")
    with pytest.raises(ValueError, match="keep=correct are for what topd g"):
        loop.train(changed(settings, "offline", **chosen), tmp_path)
    with pytest.raises(ValueError, match="no solutions"):
        loop.train(changed(settings, "offline", path=str(tmp_path)), tmp_path)


def solutions(count=20, seed=0):
    """Solutions of 3 prompt tokens and 1 to 9 more, an end in most."""
    rng = np.random.default_rng(seed)
    out = []
    for i in range(count):
        tokens = rng.integers(3, 30, rng.integers(1, 10)).astype(np.int32)
        if i % 4:
            tokens[-1] = EOS
        out.append(
            solution_data.Solution(
                index=i, sample=0, prompt="", answer="", completion="",
                prompt_tokens=np.array([1, 40 + i, 5], np.int32),
                completion_tokens=tokens, truncated=not i % 4,
                logp_mean=0.0, correct=None,
            )
        )  # fmt: skip
    return out


def test_solutions_of_prompts_that_are_held_out_are_left_out(settings, setup):
    more = dataclasses.replace(setup, test=setup.encoded.take(range(5)))
    settings = changed(settings, "offline", pack_length=0)
    batches = more.stream(changed(settings, "data", batch_size=59))
    rows, asked = next(batches), setup.encoded.ids
    assert rows.segments.max(axis=1).sum() == 59
    prompts = {
        tuple(row[: np.argmax(targets)])
        for row, targets in zip(rows.sequence, rows.targets, strict=True)
    }
    assert prompts == {tuple(ids) for ids in asked[5:]}


def test_rows_that_a_model_was_not_made_for_are_refused(settings, setup):
    """Of longrope, whose factors follow from rollout.max_new_tokens."""
    config = setup.student.config
    ones = (1.0,) * (config.head_dim // 2)
    short = RopeScaling(
        "longrope", 1.0, 20.0, short_factors=ones, long_factors=ones
    )
    config = config.replace(rope_scaling=short).for_rows(20)
    student = Decoder(config, setup.student.arrays)
    with pytest.raises(ValueError, match="more than 20 .*max_new_tokens"):
        dataclasses.replace(setup, student=student).stream(settings)
    config = config.for_rows(64)
    student = Decoder(config, setup.student.arrays)
    dataclasses.replace(setup, student=student).stream(settings)


def stream(data=None, **options):
    options = {"batch_size": 6, "length": 24, "unit": 2, "seed": 3} | options
    data = solutions() if data is None else data
    return SolutionStream(data, eos_ids=(EOS,), pad_id=0, **options)


def segments_of(rows):
    """Return (tokens, targets) of every segment, sorted."""
    out = []
    for row in range(len(rows.sequence)):
        for number in range(1, rows.segments[row].max() + 1):
            at = rows.segments[row] == number
            tokens, targets = rows.sequence[row][at], rows.targets[row][at]
            out.append((tuple(tokens.tolist()), tuple(targets.tolist())))
    return sorted(out)


def test_a_batch_holds_the_same_solutions_in_any_layout():
    packed, single = stream(), stream(length=0)
    seen = []
    for _ in range(7):
        a, b = next(packed), next(single)
        assert a.sequence.shape[1] == 24
        # The longest of all has 3 + 9 tokens; a multiple of 8.
        assert b.sequence.shape == (6, 16)
        assert len(a.sequence) < 6
        assert segments_of(a) == segments_of(b)
        assert a.truncated.sum() == b.truncated.sum()
        seen += [tokens[1] - 40 for tokens, _ in segments_of(a)]
    # Two epochs and a bit: 18 of 20 before any comes again.
    assert len(set(seen[:18])) == 18
    assert len(set(seen)) == 20


def test_the_first_end_counts_and_long_solutions_are_truncated():
    (solution,) = solutions(1)
    solution["completion_tokens"] = np.array([7, EOS, 8, EOS], np.int32)
    rows = next(stream([solution], batch_size=1, unit=1))
    assert rows.sequence[0, :6].tolist() == [1, 40, 5, 7, EOS, 0]
    assert rows.targets[0].sum() == 2
    assert rows.truncated.tolist() == [0]
    solution["completion_tokens"] = np.array([7, 8, 9, EOS], np.int32)
    rows = next(stream([solution], batch_size=1, unit=1, length=5))
    assert rows.sequence[0].tolist() == [1, 40, 5, 7, 8]
    assert rows.truncated.tolist() == [1]
    with pytest.raises(ValueError, match="prompt of solution 0 has 3 tokens"):
        stream([solution], batch_size=1, length=3)


def test_what_a_stream_cannot_do_is_refused():
    with pytest.raises(ValueError, match="made with other solutions"):
        stream(solutions(seed=1)).set_state(stream().get_state())
    with pytest.raises(ValueError, match="= 21 solutions .* exceed the 20"):
        stream(batch_size=21)
    with pytest.raises(ValueError, match="= 6 rows must be divisible by 4"):
        stream(length=0, unit=4)

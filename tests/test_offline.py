"""Stage 1 from a set: packed or not, resumed, and as several processes."""

import dataclasses

import jax
import numpy as np
import pytest
from small_run import small_config
from test_train import assert_same_run

from topd_jax.data import solutions as solution_data
from topd_jax.data.packing import SolutionStream
from topd_jax.training import loop as training
from topd_jax.training.config import settings_from
from topd_jax.training.generation import generate
from topd_jax.training.logging import read_jsonl

EOS = 2


@pytest.fixture(scope="module")
def written(world_cache, tmp_path_factory):
    config = small_config()
    config.world.cache = str(world_cache)
    workdir = tmp_path_factory.mktemp("written")
    return generate(settings_from(config), workdir, 40)["path"]


@pytest.fixture(scope="module")
def settings(written, world_cache):
    config = small_config()
    config.world.cache = str(world_cache)
    config.objective.stage = "offline"
    config.offline.path = written
    config.offline.pack_length = 64
    return settings_from(config)


@pytest.fixture(scope="module")
def finished(settings, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("finished")
    training.train(settings, workdir)
    return workdir


def changed(settings, **offline):
    part = dataclasses.replace(settings.offline, **offline)
    return dataclasses.replace(settings, offline=part)


def test_a_run_reads_the_set(finished, written):
    rows = read_jsonl(finished / "metrics.jsonl")
    assert [r["step"] for r in rows] == [1, 2, 3, 4, 5, 6]
    sizes = [
        len(s["completion_tokens"])
        for s in solution_data.read_solutions(written)
    ]
    # 40 solutions in batches of 8: the first epoch sees each token once.
    assert sum(r["num_tokens"] for r in rows[:5]) == sum(sizes)
    for row in rows:
        assert row["solutions"] == 8
        assert 0.5 < row["filled"] <= 1
        assert row["loss"] == pytest.approx(
            0.5 * row["divergence"] + 0.5 * row["cross_entropy"], rel=1e-5
        )
        assert row["length_mean"] == row["num_tokens"] / 8
    assert rows[2]["forward_kl"] == pytest.approx(
        rows[2]["divergence"], rel=1e-4
    )
    assert (finished / "completions.jsonl").read_text() == ""


@pytest.mark.slow
def test_packed_and_unpacked_take_the_same_steps(settings, finished, tmp_path):
    training.train(changed(settings, pack_length=0), tmp_path)
    ours = read_jsonl(finished / "metrics.jsonl")
    theirs = read_jsonl(tmp_path / "metrics.jsonl")
    for a, b in zip(ours, theirs, strict=True):
        for name in ("num_tokens", "length_mean", "truncated", "solutions"):
            assert a[name] == b[name]
        for name in ("loss", "divergence", "cross_entropy"):
            assert a[name] == pytest.approx(b[name], rel=2e-4)


def test_a_stopped_run_ends_bit_identical(
    settings, finished, tmp_path, monkeypatch
):
    plain = training.Run._one_step

    def stopping(self):
        if self.step == 3:
            raise KeyboardInterrupt
        return plain(self)

    monkeypatch.setattr(training.Run, "_one_step", stopping)
    with pytest.raises(KeyboardInterrupt):
        training.train(settings, tmp_path)
    monkeypatch.undo()
    training.train(settings, tmp_path)
    for name in ("metrics", "evals"):
        assert read_jsonl(tmp_path / f"{name}.jsonl")
    (tmp_path / "completions.jsonl").write_text('{"step": 0}\n')
    (finished / "completions.jsonl").write_text('{"step": 0}\n')
    assert_same_run(finished, tmp_path, settings)


def test_other_solutions_are_refused(settings, finished, world_cache):
    folder = solution_data.find_set(settings.offline.path)[0].folder
    shard = next(folder.glob("*.array_record-*"))
    before = shard.read_bytes()
    files = solution_data.find_set(settings.offline.path)[0]
    kept = list(files.read(0))
    try:
        files.write(0, [*kept[1:], kept[0]])
        with pytest.raises(ValueError, match="made with other solutions"):
            training.train(settings, finished)
    finally:
        shard.write_bytes(before)


def test_what_does_not_fit_is_refused_early(settings, tmp_path):
    with pytest.raises(ValueError, match="pack_length=64 packs what topd gen"):
        training.train(changed(settings, path=""), tmp_path)
    with pytest.raises(ValueError, match="no solutions"):
        training.train(changed(settings, path=str(tmp_path)), tmp_path)
    with pytest.raises(ValueError, match="needs objective.stage=offline"):
        dataclasses.replace(
            settings,
            objective=dataclasses.replace(
                settings.objective, stage="on_policy"
            ),
        )


def made(count=20, seed=0):
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


def stream(solutions, **options):
    options = {"batch_size": 6, "length": 24, "unit": 2, "seed": 3} | options
    return SolutionStream(solutions, eos_ids=(EOS,), pad_id=0, **options)


def pairs_in(rows):
    """Every segment as (tokens, targets), in no order."""
    out = []
    for row in range(len(rows.sequence)):
        for number in range(1, rows.segments[row].max() + 1):
            at = rows.segments[row] == number
            out.append(
                (
                    tuple(rows.sequence[row][at].tolist()),
                    tuple(rows.targets[row][at].tolist()),
                )
            )
    return sorted(out)


def test_a_batch_holds_the_same_solutions_however_it_is_laid_out():
    packed, apart = stream(made()), stream(made(), length=0)
    seen = []
    for _ in range(7):
        a, b = next(packed), next(apart)
        assert a.sequence.shape[1] == 24
        assert len(a.sequence) < len(b.sequence) == 6
        assert pairs_in(a) == pairs_in(b)
        assert a.truncated.sum() == b.truncated.sum()
        seen += [tokens[1] - 40 for tokens, _ in pairs_in(a)]
    # Three epochs and a bit: 18 of 20 before any comes again.
    assert len(set(seen[:18])) == 18
    assert len(set(seen)) == 20


@pytest.mark.parametrize("length", [0, 24])
def test_processes_share_one_batch(length):
    options = {"length": length, "unit": 6}
    whole = stream(made(), **options)
    parts = [
        stream(made(), **options, process_index=i, process_count=3)
        for i in range(3)
    ]
    for _ in range(4):
        want = next(whole)
        shares = [next(p) for p in parts]
        got = jax.tree.map(lambda *x: np.concatenate(x), *shares)
        for a, b in zip(
            jax.tree.leaves(got), jax.tree.leaves(want), strict=True
        ):
            np.testing.assert_array_equal(a, b)


def test_a_stream_goes_on_from_its_state():
    one, two = stream(made()), stream(made())
    for _ in range(5):
        next(one)
    two.set_state(one.get_state())
    for _ in range(3):
        a, b = next(one), next(two)
        assert all(
            np.array_equal(x, y)
            for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
        )
    with pytest.raises(ValueError, match="made with other solutions"):
        stream(made(seed=1)).set_state(one.get_state())


def test_the_first_end_counts_and_long_solutions_are_cut():
    (solution,) = made(1)
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


def test_what_a_stream_cannot_do_is_said():
    with pytest.raises(ValueError, match="= 21 solutions .* exceed the 20"):
        stream(made(), batch_size=21)
    with pytest.raises(ValueError, match="= 6 rows must be divisible by 4"):
        stream(made(), length=0, unit=4)

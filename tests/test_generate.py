"""Solutions of a teacher: written once, killed, resumed, read back."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from small_run import small_config

from topd_jax.cli import main
from topd_jax.data import solutions as solution_data
from topd_jax.data import sources
from topd_jax.data.toy_world import problems
from topd_jax.training.config import Settings, settings_from
from topd_jax.training.generation import generate
from topd_jax.training.setup import load_pair

# Dies while the third shard lies there without its name.
CHILD = """
import os, pathlib, signal, sys
sys.path.insert(0, sys.argv[1])
from small_run import small_config
from topd_jax.training import generation
from topd_jax.data import solutions
from topd_jax.training.config import settings_from

plain = solutions._into_place

def deadly(fresh, path):
    if "00002-of" in path.name:
        os.kill(os.getpid(), signal.SIGKILL)
    plain(fresh, path)

solutions._into_place = deadly
config = small_config()
config.world.cache = sys.argv[2]
config.offline.shard_size = 16
generation.generate(settings_from(config), pathlib.Path(sys.argv[3]))
"""


def settings_for(cache: Path, **offline: object) -> Settings:
    config = small_config()
    config.world.cache = str(cache)
    config.offline.shard_size = 16
    config.offline.update(offline)
    return settings_from(config)


def changed(settings: Settings, section: str, **fields: object) -> Settings:
    part = dataclasses.replace(getattr(settings, section), **fields)
    return dataclasses.replace(settings, **{section: part})


def contents(folder: Path) -> dict[str, bytes]:
    return {
        p.name: p.read_bytes() for p in folder.iterdir() if p.suffix != ".part"
    }


def equal(a, b) -> bool:
    return a.keys() == b.keys() and all(
        np.array_equal(a[name], b[name]) for name in a
    )


@pytest.fixture(scope="module")
def settings(world_cache):
    return settings_for(world_cache)


@pytest.fixture(scope="module")
def written(settings, tmp_path_factory):
    """A set that nothing disturbed: 64 prompts, 4 shards of 16."""
    workdir = tmp_path_factory.mktemp("written")
    return workdir, generate(settings, workdir)


@pytest.fixture(scope="module")
def found(written):
    return solution_data.read_solutions(str(written[0]))


def test_every_prompt_has_its_solution(written, found, settings):
    workdir, told = written
    pair = load_pair(settings, workdir)
    ends = pair.tokenizer.eos_ids
    assert [s["index"] for s in found] == list(range(64))
    for solution, record, ids in zip(
        found, pair.encoded.records, pair.encoded.ids, strict=True
    ):
        tokens = solution["completion_tokens"]
        assert solution["prompt"] == record["prompt"]
        assert solution["answer"] == record["answer"]
        np.testing.assert_array_equal(solution["prompt_tokens"], ids)
        text = pair.tokenizer.decode(tokens.tolist())
        assert solution["completion"] == text
        assert solution["correct"] == problems.is_correct(
            record["prompt"], text
        )
        assert not np.isin(tokens[:-1], ends).any()
        assert solution["truncated"] == (tokens[-1] not in ends)
        assert solution["truncated"] <= (len(tokens) == 16)
        assert solution["logp_mean"] < 0
    assert told["solutions"] == 64
    assert told["tokens"] == sum(len(s["completion_tokens"]) for s in found)
    assert told["tokens_now"] == told["tokens"]
    assert told["truncated"] == np.mean([s["truncated"] for s in found])
    assert 0 < told["truncated"] < 1
    assert told["rate_tokens"] > 0


def test_a_killed_job_ends_with_the_same_bytes(written, settings, tmp_path):
    workdir, _ = written
    done = subprocess.run(
        [
            sys.executable, "-c", CHILD, Path(__file__).parent,
            settings.world.cache, tmp_path,
        ],
        env=dict(os.environ, JAX_PLATFORMS="cpu"),
        capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == -signal.SIGKILL, done.stderr[-2000:]
    with pytest.raises(ValueError, match="has 2 of 4 shards; the same topd"):
        solution_data.read_solutions(str(tmp_path))
    told = generate(settings, tmp_path)
    assert 0 < told["tokens_now"] < told["tokens"]
    want = contents(workdir / "solutions")
    assert contents(tmp_path / "solutions") == want
    assert sum(".array_record-" in name for name in want) == 4
    # And once more there is nothing to do.
    assert generate(settings, tmp_path)["tokens_now"] == 0


def test_tfds_and_grain_read_the_set(written, found):
    import grain
    import tensorflow_datasets as tfds

    folder = written[0] / "solutions"
    source = tfds.builder_from_directory(folder).as_data_source(split="train")
    assert len(source) == 64
    assert source[37]["completion"].decode() == found[37]["completion"]
    np.testing.assert_array_equal(
        source[37]["completion_tokens"], found[37]["completion_tokens"]
    )
    paths = sorted(str(p) for p in folder.glob("*.array_record-*"))
    raw = grain.sources.ArrayRecordDataSource(paths)
    assert len(raw) == 64
    assert found[37]["completion"].encode() in raw[37]
    records = sources.read_tfds(
        str(folder), prompt_field="prompt", answer_field="answer"
    )
    assert [r["prompt"] for r in records] == [s["prompt"] for s in found]
    assert [r["answer"] for r in records] == [s["answer"] for s in found]


def test_jsonl_holds_the_same(written, found, world_cache, tmp_path, capsys):
    config = Path(__file__).parent / "small_run.py"
    main.run([
        "generate", f"--config={config}", f"--workdir={tmp_path}", "--count=20",
        f"--config.world.cache={world_cache}", "--config.offline.format=jsonl",
        "--config.offline.shard_size=16",
    ])  # fmt: skip
    told = json.loads(capsys.readouterr().out)
    names = {p.name for p in Path(told["path"]).iterdir()}
    assert names == {
        "set.json",
        "solutions-train-00000-of-00002.jsonl",
        "solutions-train-00001-of-00002.jsonl",
    }
    got = solution_data.read_solutions(told["path"])
    assert len(got) == told["solutions"] == 20
    # The last batch is filled up; what fills it is not written.
    assert all(equal(a, b) for a, b in zip(got, found[:20], strict=True))
    first = sources.read_jsonl(
        Path(told["path"]) / "solutions-train-00000-of-00002.jsonl",
        prompt_field="prompt",
    )
    assert [r["prompt"] for r in first] == [s["prompt"] for s in found[:16]]


def test_several_solutions_of_a_prompt(settings, tmp_path):
    settings = changed(settings, "data", samples=2)
    generate(settings, tmp_path, 12)
    got = solution_data.read_solutions(str(tmp_path))
    assert [(s["index"], s["sample"]) for s in got] == [
        (i, n) for i in range(12) for n in range(2)
    ]
    pairs = zip(got[::2], got[1::2], strict=True)
    assert all(a["prompt"] == b["prompt"] for a, b in pairs)
    pairs = zip(got[::2], got[1::2], strict=True)
    assert any(a["completion"] != b["completion"] for a, b in pairs)


def test_prompts_without_answers_are_not_graded(
    settings, tmp_path, world_cache
):
    lines = [
        {"question": "1+2?", "answer": "3"},
        {"question": "4+5?"},
        *[{"question": f"{i}+1?", "answer": f"{i + 1}"} for i in range(2, 9)],
    ]
    path = tmp_path / "q.jsonl"
    path.write_text("".join(json.dumps(x) + "\n" for x in lines))
    settings = changed(
        settings, "data", source="jsonl", path=str(path), held_out=1
    )
    told = generate(settings, tmp_path)
    got = solution_data.read_solutions(str(tmp_path))
    assert [s["correct"] is None for s in got] == [True] + [False] * 7
    assert told["exact_match"] is not None
    with pytest.raises(ValueError, match="1 of 8 solutions .* no reference"):
        solution_data.read_solutions(str(tmp_path), "correct")


def test_what_is_kept_is_chosen_when_it_is_read(written, found):
    path = str(written[0])
    kept = solution_data.read_solutions(path, "complete")
    assert 0 < len(kept) < 64
    assert [s["index"] for s in kept] == [
        s["index"] for s in found if not s["truncated"]
    ]
    right = [s["index"] for s in found if s["correct"]]
    if right:
        kept = solution_data.read_solutions(path, "correct")
        assert [s["index"] for s in kept] == right
    else:
        with pytest.raises(ValueError, match="leaves none of the 64"):
            solution_data.read_solutions(path, "correct")


def test_a_set_of_other_settings_is_refused(written, settings):
    for other, message in (
        (
            changed(settings, "offline", temperature=0.7),
            ": 0.6 there, 0.7",
        ),
        (dataclasses.replace(settings, seed=5), "seed: 0 there, 5 here"),
        (changed(settings, "rollout", max_new_tokens=8), "max_new_tokens: 16"),
        (changed(settings, "offline", format="jsonl"), "format: 'array_reco"),
    ):
        with pytest.raises(ValueError, match=message):
            generate(other, written[0])
    with pytest.raises(ValueError, match="prompts: 64 there, 20 here"):
        generate(settings, written[0], 20)


def test_what_is_not_a_set_is_named(written, tmp_path):
    with pytest.raises(ValueError, match="no solutions .no set.json.*generate"):
        solution_data.find_set(str(tmp_path))
    with pytest.raises(ValueError, match="another tokenizer .*ffff here"):
        solution_data.read_solutions(str(written[0]), tokenizer="ffff")


def test_generate_is_one_process(capsys, small_arguments, tmp_path):
    with pytest.raises(SystemExit):
        main.run([
            "generate", *small_arguments, f"--workdir={tmp_path}",
            "--coordinator=localhost:1", "--processes=2", "--process=0",
        ])  # fmt: skip
    assert "topd generate runs as one process" in capsys.readouterr().err

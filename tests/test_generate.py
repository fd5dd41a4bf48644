"""Solutions of a teacher: written once, killed, resumed, read back."""

import dataclasses
import json
import types
from pathlib import Path

import numpy as np
import pytest
from small_run import changed, settings_with

from topd_jax.data import solutions as solution_data
from topd_jax.data import sources
from topd_jax.data.prompts import ordered_batches
from topd_jax.data.toy_world import problems
from topd_jax.training import generation
from topd_jax.training.generation import generate


def contents(folder: Path) -> dict[str, bytes]:
    return {
        p.name: p.read_bytes() for p in folder.iterdir() if p.suffix != ".part"
    }


@pytest.fixture(scope="module")
def settings(world_cache):
    return settings_with(world_cache, offline__shard_size=16)


@pytest.fixture(scope="module")
def solutions(written):
    return solution_data.read_solutions(str(written[0]))


def test_every_prompt_has_its_solution(written, solutions, setup):
    _, told = written
    ends = setup.tokenizer.eos_ids
    assert [s["index"] for s in solutions] == list(range(64))
    for solution, record, ids in zip(
        solutions, setup.encoded.records, setup.encoded.ids, strict=True
    ):
        tokens = solution["completion_tokens"]
        assert solution["prompt"] == record["prompt"]
        assert solution["answer"] == record["answer"]
        np.testing.assert_array_equal(solution["prompt_tokens"], ids)
        text = setup.tokenizer.decode(tokens.tolist())
        assert solution["completion"] == text
        assert solution["correct"] == problems.is_correct(
            record["prompt"], text
        )
        assert not np.isin(tokens[:-1], ends).any()
        assert solution["truncated"] == (tokens[-1] not in ends)
        assert solution["truncated"] <= (len(tokens) == 16)
        assert solution["logp_mean"] < 0
    assert told["solutions"] == 64
    assert told["tokens"] == sum(len(s["completion_tokens"]) for s in solutions)
    assert told["tokens_now"] == told["tokens"]
    assert told["truncated"] == np.mean([s["truncated"] for s in solutions])
    assert 0 < told["truncated"] < 1
    assert told["rate_tokens"] > 0


def test_a_killed_job_ends_with_the_same_bytes(
    written, settings, tmp_path, monkeypatch
):
    replace = Path.replace

    def deadly(partial, path):
        if "00002-of" in path.name:
            raise KeyboardInterrupt
        return replace(partial, path)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", deadly)
        with pytest.raises(KeyboardInterrupt):
            generate(settings, tmp_path)
    # As a kill leaves it: the third shard lies there without its name.
    assert len(list((tmp_path / "solutions").glob("*00002-of*.part"))) == 1
    with pytest.raises(ValueError, match="has 2 of 4 shards; rerun topd"):
        solution_data.read_solutions(str(tmp_path))
    told = generate(settings, tmp_path)
    assert 0 < told["tokens_now"] < told["tokens"]
    want = contents(written[0] / "solutions")
    assert contents(tmp_path / "solutions") == want
    assert sum(name.endswith(".jsonl") for name in want) == 4
    # And once more there is nothing to do.
    assert generate(settings, tmp_path)["tokens_now"] == 0


def test_a_part_of_the_set_in_slots_is_the_same(solutions, settings, tmp_path):
    slots = changed(settings, "rollout", slots=3)
    folder = Path(generate(slots, tmp_path, 20)["path"])
    files = [f"solutions-train-0000{i}-of-00002.jsonl" for i in range(2)]
    assert {p.name for p in folder.iterdir()} == {"set.json", *files}
    got = solution_data.read_solutions(str(folder))
    # The last batch is filled up; what fills it is not written.
    for a, b in zip(got, solutions[:20], strict=True):
        assert a.pop("logp_mean") == pytest.approx(b["logp_mean"], abs=1e-5)
        assert a.keys() == b.keys() - {"logp_mean"}
        assert all(np.array_equal(a[name], b[name]) for name in a)
    # A shard serves as prompts.
    fields = sources.Fields(("prompt",), "completion")
    first = sources.read_source("jsonl", folder / files[0], fields=fields)
    assert [(r["prompt"], r["answer"]) for r in first] == [
        (s["prompt"], s["completion"]) for s in solutions[:16]
    ]
    with pytest.raises(ValueError, match="slots: .* there"):
        generate(settings, tmp_path, 20)


def test_several_solutions_of_prompts_without_answers(settings, tmp_path):
    lines = [
        {"question": "1+2?", "answer": "3"},
        {"question": "4+5?"},
        *[{"question": f"{i}+1?", "answer": f"{i + 1}"} for i in range(2, 9)],
    ]
    path = tmp_path / "q.jsonl"
    path.write_text("".join(json.dumps(x) + "\n" for x in lines))
    settings = changed(
        settings, "data", source="jsonl", path=str(path), held_out=1, samples=2
    )
    told = generate(settings, tmp_path)
    got = solution_data.read_solutions(str(tmp_path))
    assert [(s["index"], s["sample"]) for s in got] == [
        (i, n) for i in range(8) for n in range(2)
    ]
    pairs = list(zip(got[::2], got[1::2], strict=True))
    assert all(a["prompt"] == b["prompt"] for a, b in pairs)
    assert any(a["completion"] != b["completion"] for a, b in pairs)
    ungraded = [s["correct"] is None for s in got]
    assert ungraded == [True] * 2 + [False] * 14
    assert told["exact_match"] is not None
    with pytest.raises(ValueError, match="2 of 16 solutions .* no reference"):
        solution_data.read_solutions(str(tmp_path), "correct")


def test_a_task_is_graded_where_it_has_no_answer(settings, setup):
    plain = setup.encoded.records[0] | {"answer": ""}
    records = (plain, plain | {"task": "graph_color"})
    encoded = dataclasses.replace(setup.encoded.take([0, 1]), records=records)
    (batch,) = ordered_batches(encoded, batch_size=2)
    rows = types.SimpleNamespace(
        tokens=np.full((2, 3), 5), mask=np.ones((2, 3), bool),
        truncated=np.ones(2, bool), logp=np.zeros((2, 3)),
    )  # fmt: skip
    own = dataclasses.replace(setup, grade=lambda r, _: [True] * len(r))
    found = generation._solutions(settings, own, encoded, batch, rows)
    assert [s["correct"] for s in found] == [None, True]


def test_what_to_keep_is_chosen_when_it_is_read(written, solutions, tmp_path):
    path = str(written[0])
    kept = solution_data.read_solutions(path, "complete")
    assert 0 < len(kept) < 64
    assert [s["index"] for s in kept] == [
        s["index"] for s in solutions if not s["truncated"]
    ]
    about = {"shards": 1, "tokenizer": ""}
    files = solution_data.open_set(tmp_path / "solutions", about)
    graded = [s | {"correct": i == 2} for i, s in enumerate(solutions[:4])]
    files.write(0, graded)
    (kept,) = solution_data.read_solutions(str(tmp_path), "correct")
    assert kept["index"] == 2
    files.write(0, graded[:2])
    with pytest.raises(ValueError, match="leaves none of the 2"):
        solution_data.read_solutions(str(tmp_path), "correct")


def test_another_set_is_refused(written, settings, tmp_path):
    path = str(written[0])
    for other, message in (
        (changed(settings, "offline", temperature=0.7), ": 0.6 there, 0.7"),
        (dataclasses.replace(settings, seed=5), "seed: 0 there, 5 here"),
        (changed(settings, "rollout", max_new_tokens=8), "max_new_tokens: 16"),
    ):
        with pytest.raises(ValueError, match=message):
            generate(other, written[0])
    with pytest.raises(ValueError, match="prompts: 64 there, 20 here"):
        generate(settings, written[0], 20)
    with pytest.raises(ValueError, match="no solutions .no set.json.*generate"):
        solution_data.find_set(str(tmp_path))
    with pytest.raises(ValueError, match="another tokenizer .*ffff here"):
        solution_data.read_solutions(path, tokenizer="ffff")

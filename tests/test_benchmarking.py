"""topd eval: what is asked, what is recorded, and runs side by side."""

import json

import jax
import pytest
from small_run import small_config

from topd_jax.cli import main
from topd_jax.data.benchmarks import benchmark_name, read_benchmark
from topd_jax.evaluation import benchmarking, grading
from topd_jax.evaluation.evaluator import Evaluator
from topd_jax.training.config import settings_from
from topd_jax.training.setup import load_pair


def write(path, rows):
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path


def test_a_benchmark_has_problems_or_questions(tmp_path):
    one = write(tmp_path / "one.jsonl", [{"problem": "1+1?", "answer": 2}])
    two = write(
        tmp_path / "two.jsonl", [{"question": "2?", "answer": "#### 2"}]
    )
    assert read_benchmark(str(one))[0]["answer"] == "2"
    assert read_benchmark(str(two))[0]["prompt"] == "2?"
    assert benchmark_name(str(one)) == "one"
    assert benchmark_name("hub:owner/aime") == "owner/aime"


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"task": "1+1?", "answer": "2"}], 'line 1 has no text in the field'),
        ([{"problem": "1?", "answer": "1"}, {"problem": "1+1?"}],
         'line 2 has nothing in the field "answer"'),
        ([], "holds no records"),
    ],
)  # fmt: skip
def test_a_benchmark_that_cannot_be_used(tmp_path, rows, message):
    with pytest.raises(ValueError, match=message):
        read_benchmark(str(write(tmp_path / "x.jsonl", rows)))
    with pytest.raises(ValueError, match="no file at nowhere.jsonl"):
        read_benchmark("nowhere.jsonl")


@pytest.fixture(scope="module")
def config(world_cache):
    config = small_config()
    config.world.cache = str(world_cache)
    config.eval.final_problems = 5
    config.eval.batch_size = 4
    config.eval.samples = 3
    return config


@pytest.fixture(scope="module")
def pair(config, tmp_path_factory):
    return load_pair(settings_from(config), tmp_path_factory.mktemp("pair"))


def test_every_problem_is_answered_as_often_as_asked(config, pair):
    settings = settings_from(config)
    with jax.set_mesh(pair.mesh):
        found = benchmarking.evaluate_all(settings, pair, pair.student, 7)
        final = Evaluator(settings, pair)(pair.student, 7, final=True)
    assert found["step"] == 7 and list(found["benchmarks"]) == ["test"]
    records = found["benchmarks"]["test"]["records"]
    tests = pair.test.records[:5]
    assert [r["problem"] for r in records] == [r["prompt"] for r in tests]
    for record, asked in zip(records, tests, strict=True):
        texts = record["completions"]
        assert len(texts) == 3
        assert record["right"] == pair.grade([asked] * 3, texts)
        assert record["answers"] == [pair.final_answer(t) for t in texts]
        assert all(1 <= n <= 16 for n in record["lengths"])
    assert len({t for r in records for t in r["completions"]}) > 5
    summary = found["benchmarks"]["test"]["summary"]
    assert summary["runs"][0] == final["exact_match"]
    brief = benchmarking.summaries(found)["benchmarks"]["test"]
    assert brief == summary and "records" not in brief
    assert {"pass@1", "pass@2", "pass@3", "maj@3", "cut_off"} <= set(summary)


def test_without_answers_there_are_statistics_only(config, pair):
    settings = settings_from(config)
    with jax.set_mesh(pair.mesh):
        found = benchmarking.run_benchmark(
            Evaluator(settings, pair), pair.student, pair, pair.test,
            samples=1, temperature=0.0, grade=lambda *_: None,
            final_answer=str,
        )  # fmt: skip
    assert found["records"] == []
    assert found["summary"]["reverse_kl"] > 0
    assert "pass@1" not in found["summary"]


def test_eval_and_compare_from_the_command_line(
    trained, small_arguments, tmp_path, capsys, monkeypatch
):
    # The tiny world's tokenizer reads no more than its own problems.
    path = write(
        tmp_path / "sums.jsonl",
        [{"problem": f"{i}+{i}+1+1?", "answer": f"{2 * i + 2}"}
         for i in range(1, 6)],
    )  # fmt: skip
    asked = []

    def grade(records, texts):
        asked.append([r["answer"] for r in records])
        return [i % 5 == 0 for i in range(len(texts))]

    monkeypatch.setattr(grading, "grade_answers", grade)

    def run(*arguments):
        capsys.readouterr()
        main.run([str(a) for a in arguments])
        return json.loads(capsys.readouterr().out)

    for which in ("latest", "start"):
        found = run(
            "eval", *small_arguments, f"--workdir={trained}",
            f"--which={which}", "--config.eval.samples=2",
            f"--config.eval.benchmarks={path}",
        )["benchmarks"]  # fmt: skip
        assert found["sums"]["pass@1"]["value"] == 0.2
    assert asked[0] == ["4", "6", "8", "10", "12"] * 2
    # Two directories: the start's file under the latest's name.
    other = tmp_path / "other"
    other.mkdir()
    text = (trained / "eval-start.json").read_text()
    (other / "eval-latest.json").write_text(text)
    found = run("compare", "--a", trained, "--b", other)["sums"]
    assert found["difference"] == 0 and found["problems"] == 5
    assert found["mcnemar_p"] == 1.0


def test_runs_that_cannot_be_compared(tmp_path):
    def run(name, problems):
        folder = tmp_path / name
        folder.mkdir()
        records = [{"problem": p} for p in problems]
        (folder / "eval-latest.json").write_text(
            json.dumps({"benchmarks": {"test": {"records": records}}})
        )
        return folder

    one, two, none = run("1", "ab"), run("2", "ac"), run("3", "")
    for a, b, message in (
        ([one], [two], "not answered the same problems of test"),
        ([one, two], [one], "--a names 2 runs and --b 1"),
        ([], [], "--a names 0 runs"),
        ([one], [none], "no graded benchmark in common: test; test"),
        ([one], [tmp_path], "no file at .*eval-latest.json; run topd eval"),
    ):
        with pytest.raises(ValueError, match=message):
            benchmarking.compare_runs(a, b, "latest")
    (tmp_path / "eval-latest.json").write_text("[]")
    with pytest.raises(ValueError, match="not what topd eval writes"):
        benchmarking.compare_runs([one], [tmp_path], "latest")

"""topd eval: what is asked, what is recorded, and runs side by side."""

import dataclasses
import json

import jax
import pytest
from small_run import settings_with

from topd_jax.cli import evaluate
from topd_jax.data.toy_world import problems
from topd_jax.evaluation import benchmarking, grading
from topd_jax.evaluation.benchmarking import read_benchmark


def write(path, *rows):
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path


def test_a_benchmark_has_problems_or_questions(tmp_path, monkeypatch):
    one = write(tmp_path / "one.jsonl", {"problem": "1+1?", "answer": 2})
    two = write(tmp_path / "two.jsonl", {"question": "2?", "answer": "#### 2"})
    name, (record,) = read_benchmark(str(one))
    assert (name, record["answer"]) == ("one", "2")
    _, (record,) = read_benchmark(str(two))
    assert record["prompt"] == "2?"
    monkeypatch.setattr(benchmarking, "read_source", lambda *_: [record])
    assert read_benchmark("hub:owner/aime") == ("owner/aime", [record])


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"task": "1+1?", "answer": "2"}],
         'line 1 has no text in the field "problem" or "question"'),
        ([{"problem": "1?", "answer": "1"}, {"problem": "1+1?"}],
         'line 2 has nothing in the field "answer"'),
    ],
)  # fmt: skip
def test_a_benchmark_that_cannot_be_used(tmp_path, rows, message):
    with pytest.raises(ValueError, match=message):
        read_benchmark(str(write(tmp_path / "x.jsonl", *rows)))


@pytest.fixture(scope="module")
def settings(world_cache):
    return settings_with(
        world_cache, eval__final_problems=5, eval__batch_size=4,
        eval__samples=3,
    )  # fmt: skip


@pytest.fixture(scope="module")
def evaluator(settings, setup):
    return setup.evaluator(settings)


def test_every_problem_is_answered_as_often_as_asked(
    settings, setup, evaluator
):
    with jax.set_mesh(setup.mesh):
        evaluation = benchmarking.evaluate_all(
            evaluator, setup.student, settings.data, 7
        )
    assert evaluation["step"] == 7
    assert list(evaluation["benchmarks"]) == ["test"]
    records = evaluation["benchmarks"]["test"]["records"]
    tests = setup.test.records[:5]
    assert [r["problem"] for r in records] == [r["prompt"] for r in tests]
    for record, asked in zip(records, tests, strict=True):
        texts = record["completions"]
        assert len(texts) == 3
        assert record["right"] == setup.grade([asked] * 3, texts)
        assert record["answers"] == [
            problems.final_answer(t) or "" for t in texts
        ]
        assert all(1 <= n <= 16 for n in record["lengths"])
    assert len({t for r in records for t in r["completions"]}) > 5
    summary = evaluation["benchmarks"]["test"]["summary"]
    brief = benchmarking.summaries(evaluation)["benchmarks"]
    assert brief == {"test": summary}
    assert {"pass@1", "pass@2", "pass@3", "maj@3", "cut_off"} <= set(summary)


def test_benchmarks_are_mathematics(
    settings, setup, evaluator, tmp_path, monkeypatch
):
    # The tokenizer of the tiny world knows only its own problems.
    rows = [{"problem": f"{i}+1?", "answer": f"{i + 1}"} for i in range(1, 6)]
    path = str(write(tmp_path / "sums.jsonl", *rows))
    asked = []

    def grade(records, texts):
        asked.append([r["answer"] for r in records])
        return [i % 5 == 0 for i in range(len(texts))]

    monkeypatch.setattr(grading, "grade_answers", grade)
    with jax.set_mesh(setup.mesh):
        evaluation = benchmarking.evaluate_all(
            evaluator, setup.student, settings.data, 7,
            benchmarks=benchmarking.read_benchmarks([path]),
        )  # fmt: skip
    summary = evaluation["benchmarks"]["sums"]["summary"]
    assert summary["pass@1"]["value"] == 0.2
    assert asked == [["2", "3", "4", "5", "6"] * 3]
    options = dataclasses.replace(settings.eval, benchmarks=(path, path))
    monkeypatch.setattr(evaluate, "open_run", None)  # before models are loaded
    with pytest.raises(ValueError, match="second benchmark of the name 'sums'"):
        evaluate.evaluate(
            dataclasses.replace(settings, eval=options), tmp_path, "start"
        )


def test_without_answers_there_are_statistics_only(setup, evaluator):
    silent = grading.Grader(lambda *_: None, str)
    with jax.set_mesh(setup.mesh):
        benchmark = benchmarking.run_benchmark(
            evaluator, setup.student, setup.test.take(range(4)), silent
        )
    assert benchmark["records"] == []
    assert benchmark["summary"]["reverse_kl"] > 0
    assert "pass@1" not in benchmark["summary"]


def test_runs_are_compared_on_the_same_problems(tmp_path):
    def run(
        name, problems, right=(), temperature=1.0, samples=1, answer="7",
        seed=0,
    ):  # fmt: skip
        folder = tmp_path / name
        folder.mkdir()
        records = [
            {"problem": p, "right": [p in right] * samples,
             "answers": [p] * samples, "reference": answer}
            for p in problems
        ]  # fmt: skip
        (folder / "eval-latest.json").write_text(
            json.dumps(
                {
                    "temperature": temperature,
                    "max_new_tokens": 16,
                    "benchmarks": {"test": {"records": records}},
                    "seed": seed,
                }
            )
        )
        return folder

    one, two, none = run("1", "ab", "a"), run("2", "ac"), run("3", "")
    better, greedy = run("4", "ab", "ab"), run("5", "ab", "ab", 0.0)
    often = run("6", "ab", "ab", samples=3)
    other = run("7", "ab", "ab", answer="8")
    seeds = [run(f"seed {i}", "ab", "a", seed=i) for i in range(2)]
    benchmarking.compare_runs(seeds, seeds, "latest")
    benchmarking.compare_runs(seeds[:1], seeds[1:], "latest")  # one run each
    compared = benchmarking.compare_runs([one], [better], "latest")["test"]
    assert (compared["problems"], compared["difference"]) == (2, 0.5)
    for a, b, message in (
        ([one], [two], "not answered the same problems of test"),
        ([one], [often], "the same problems of test equally often"),
        ([one], [other], "not answered the same problems of test"),
        (seeds, seeds[::-1], r"--a have config.seed \(0, 1\) .*--b \(1, 0\);"),
        (seeds[:1] * 2, seeds[:1] * 2, r"seed \(0, 0\) .* each seed once"),
        ([one], [greedy], "not evaluated alike: .*1.0.*; .*0.0"),
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

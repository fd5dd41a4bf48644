"""What the commands do as a user types them, also where a disk is full."""

import json
from pathlib import Path

import pytest
from small_files import LLAMA, assert_same, make, write_gguf
from small_step import assert_trees_equal

from topd_jax.data.tokenizers import SentencePieceTokenizer
from topd_jax.evaluation import benchmarking, grading
from topd_jax.models import load
from topd_jax.training import loop as training
from topd_jax.training.logging import read_jsonl
from topd_jax.training.restore import load_student

TESTS = Path(__file__).parent


# The happy path.


def test_the_same_command_again_does_nothing(
    topd, trained, small_arguments, monkeypatch
):
    def forbidden(self):
        raise AssertionError("a finished run was trained again")

    monkeypatch.setattr(training.Run, "_one_step", forbidden)
    before = {p.name: p.read_text() for p in trained.iterdir() if p.is_file()}
    row = json.loads(topd("train", *small_arguments, f"--workdir={trained}"))
    assert row == read_jsonl(trained / "evals.jsonl")[-1]
    assert row["final"] is True and row["step"] == 6
    for name, text in before.items():
        assert (trained / name).read_text() == text


def test_eval_of_the_latest_is_the_runs_own(topd, trained, small_arguments):
    row = json.loads(topd("eval", *small_arguments, f"--workdir={trained}"))
    final = read_jsonl(trained / "evals.jsonl")[-1]
    summary = row["benchmarks"]["test"]
    assert summary["runs"] == [final["exact_match"]]
    for name in ("reverse_kl", "length_mean", "teacher_nll", "problems"):
        assert summary[name] == final[name], name
    written = json.loads((trained / "eval-latest.json").read_text())
    assert written["step"] == row["step"] == final["step"]
    assert written["benchmarks"]["test"]["summary"] == summary
    start = json.loads(topd(
        "eval", *small_arguments, f"--workdir={trained}", "--which=start"
    ))  # fmt: skip
    assert start["step"] == 0
    assert start["benchmarks"]["test"]["reverse_kl"] != summary["reverse_kl"]
    # It may read otherwise than it was trained.
    best = json.loads(topd(
        "eval", *small_arguments, f"--workdir={trained}", "--which=best",
        "--config.eval.temperature=0", "--config.eval.final_problems=5",
        "--config.rollout.max_new_tokens=8",
    ))  # fmt: skip
    assert best["step"] in (0, 4)
    summary = best["benchmarks"]["test"]
    assert best["temperature"] == 0 and summary["problems"] == 5
    assert summary["length_mean"] <= 8


def test_sample_completes_prompts(topd, trained, small_arguments, refused):
    line = ["sample", *small_arguments, f"--workdir={trained}"]
    found = json.loads(topd(*line))
    assert len(found) == 3
    assert all(set(f) == {"prompt", "completion"} for f in found)
    line.append("--config.rollout.temperature=0")
    found = json.loads(topd(*line, "--prompt=3+4*5?", "--prompt=2+2?"))
    assert [f["prompt"] for f in found] == ["3+4*5?", "2+2?"]
    assert found[0]["completion"]
    message = refused(*line, "--prompt=" + "+".join(["12"] * 9))
    assert "(--prompt) has " in message and "the limit is 16" in message


def test_an_export_is_the_student(
    trained, settings, setup, topd, small_arguments, tmp_path, refused
):
    exported = tmp_path / "model"
    line = ["export", *small_arguments, f"--workdir={trained}"]
    topd(*line, f"--output={exported}")
    student, step = load_student(settings, trained, setup, "latest")
    assert step == 6
    model, tokenizer = load(exported)
    assert_trees_equal(student.arrays, model.arrays)
    generation = json.loads((exported / "generation_config.json").read_text())
    assert generation["eos_token_id"] == setup.tokenizer.eos_ids[0]
    text = setup.test.records[0]["prompt"]
    assert tokenizer.encode(text, add_special_tokens=False) == (
        setup.tokenizer.encode(text)
    )
    # It serves as the start of another run, its template and ids included.
    row = json.loads(topd(
        "eval", *small_arguments, "--which=start", f"--workdir={tmp_path}",
        f"--config.student.source={exported}",
    ))  # fmt: skip
    final = read_jsonl(trained / "evals.jsonl")[-1]
    assert row["benchmarks"]["test"]["reverse_kl"] == final["reverse_kl"]
    assert row["benchmarks"]["test"]["runs"] == [final["exact_match"]]
    # It takes no place that is taken.
    before = sorted(p.name for p in exported.iterdir())
    message = refused(*line, f"--output={exported}")
    assert "is not empty; remove it, or choose another directory" in message
    assert sorted(p.name for p in exported.iterdir()) == before
    (tmp_path / "file").write_text("mine")
    assert "is not empty" in refused(*line, f"--output={tmp_path / 'file'}")
    assert (tmp_path / "file").read_text() == "mine"


def test_questions_are_trained_on_graded_and_exported(topd, tmp_path):
    """As GSM8K is published, by a GGUF pair, with OPD."""
    gguf = write_gguf(tmp_path / "model.gguf", make(LLAMA))
    rows = [
        {
            "question": f"tom has {i} and gets 4",
            "answer": f"{i}+4\n#### {i + 4}",
        }
        for i in range(7)
    ]
    path = tmp_path / "train.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    questions = [
        f"--config={TESTS / 'small_run.py'}",
        f"--config.student.source={gguf}",
        f"--config.teacher.source={gguf}",
        "--config.student.keep_layers=0,2",
        "--config.data.source=jsonl",
        f"--config.data.path={path}",
        "--config.data.held_out=3",
        "--config.data.batch_size=4",
        "--config.data.max_prompt_length=32",
        "--config.objective=opd",
        "--config.train.steps=1",
        "--config.eval.every=0",
        "--config.eval.batch_size=4",
        f"--workdir={tmp_path / 'run'}",
    ]
    row = json.loads(topd("train", *questions))
    assert row["problems"] == 3
    assert row["exact_match"] is not None and row["reverse_kl"] > 0
    (found,) = json.loads(topd("sample", *questions, "--prompt", "tom has 3"))
    assert found["prompt"] == "tom has 3"
    topd("export", *questions, f"--output={tmp_path / 'out'}")
    model, tokenizer = load(tmp_path / "out")
    assert model.config.layers == 2
    assert tokenizer.chat_template is not None
    assert tokenizer.eos_token_id == 0
    # The work directory itself serves as a source, without what it came from.
    student, own = load(tmp_path / "run")
    assert_same(student, model)
    assert own("tom has 3").input_ids == tokenizer("tom has 3").input_ids
    assert own.chat_template == tokenizer.chat_template


def test_eval_resumes_after_the_last_finished_benchmark(
    topd, command, tmp_path, monkeypatch
):
    paths = []
    for name, count in (("one", 3), ("two", 4)):
        paths.append(tmp_path / f"{name}.jsonl")
        rows = [{"problem": f"{i}+1?", "answer": f"{i}"} for i in range(count)]
        paths[-1].write_text("".join(json.dumps(r) + "\n" for r in rows))
    monkeypatch.setattr(grading, "grade_answers", lambda r, _: [True] * len(r))
    plain, asked = benchmarking.run_benchmark, []

    def run(evaluator, student, encoded, grader):
        asked.append(len(encoded.records))
        if asked == [3, 4]:
            raise KeyboardInterrupt
        return plain(evaluator, student, encoded, grader)

    monkeypatch.setattr(benchmarking, "run_benchmark", run)
    places = ",".join(map(str, paths))
    line = command(
        "eval", "--which=start", f"--config.eval.benchmarks={places}"
    )
    with pytest.raises(KeyboardInterrupt):
        topd(*line)
    told = topd(*line)
    assert asked == [3, 4, 4]
    assert list(json.loads(told)["benchmarks"]) == ["one", "two"]
    (written,) = (tmp_path / "run").glob("eval-*")
    text = written.read_text()
    # Done, it is read back; but not what depends on anything that changed.
    assert topd(*line) == told and asked == [3, 4, 4]
    assert written.read_text() == text
    paths[0].write_text(paths[0].read_text().replace("+", "*"))
    alone = command(
        "eval", "--which=start", f"--config.eval.benchmarks={paths[0]}"
    )
    # What was not asked for is kept.
    assert set(json.loads(topd(*alone))["benchmarks"]) == {"one", "two"}
    topd(*line)
    assert asked == [3, 4, 4, 3]
    # One is answered more often, and the other stays.
    told = json.loads(topd(*alone, "--config.eval.samples=2"))["benchmarks"]
    assert [told[n]["samples"] for n in ("one", "two")] == [2, 1]
    topd(*alone, "--config.eval.samples=2")
    assert asked[4:] == [3]
    topd(*line, "--config.eval.temperature=0.5")
    assert asked[5:] == [3, 4]
    # Another chat template, of the same weights.
    chat = SentencePieceTokenizer.chat
    monkeypatch.setattr(
        SentencePieceTokenizer, "chat", lambda self, q: chat(self, f"1{q}")
    )
    topd(*line, "--config.eval.temperature=0.5")
    assert asked[7:] == [3, 4]

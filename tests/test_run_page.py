"""The page of a run: its data (see test_pages_browser.py)."""

import json
import re

import pytest
from html_page import Page
from small_logs import HOSTILE, answer, evaluation, metrics, records, write_run

from topd_jax.cli import main
from topd_jax.experiments.run_page import (
    RunRecords,
    facts_of,
    page_data,
    read_run,
    report,
)


def chart(data, title):
    (found,) = [c for c in data["curves"] if c["title"] == title]
    return found


def series(data, title):
    return {s["name"]: s for s in chart(data, title)["series"]}


def test_what_a_run_wrote_is_read_back(tmp_path):
    run = records("one")
    found = read_run(write_run(run, tmp_path / "one"))
    assert page_data([found]) == page_data([run])
    assert found == run


def test_the_page_carries_all_and_asks_for_nothing(tmp_path):
    run = records("<i>one")
    found = report([write_run(run, tmp_path / "<i>one")], None)
    assert found == {
        "page": str(tmp_path / "<i>one" / "report.html"),
        "runs": {"<i>one": "step 40 of 40, finished with 80.0 % right"},
    }
    text = (tmp_path / "<i>one" / "report.html").read_text(encoding="utf-8")
    page = Page(text)
    assert len(page.scripts) == 2  # none is ended or begun by a completion
    assert json.loads(page.scripts[0]) == page_data([run])
    assert HOSTILE in {p["problem"] for p in page_data([run])["problems"]}
    assert "<i>" not in text and "onerror" not in page.scripts[1]
    assert all(a == "data:," or a.startswith("#") for a in page.addresses)
    namespace = "http://www.w3.org/2000/svg"  # a name that nothing fetches
    assert not re.search(
        r"https?://|@import|url\(|fetch\(", text.replace(namespace, "")
    )


def test_curves_are_the_numbers_of_the_logs():
    data = page_data([records()])
    loss = series(data, "Loss")
    assert list(loss) == ["training"]
    assert loss["training"]["steps"] == list(range(1, 41))
    assert loss["training"]["values"][7] == 0.25
    right = series(data, "Right answers")
    assert list(right) == ["validation", "test"]
    assert right["test"]["steps"] == [40]
    assert (right["test"]["low"], right["test"]["high"]) == ([0.7], [0.9])
    assert right["validation"]["values"][1] == pytest.approx(0.34)
    kl = series(data, "Reverse KL")
    assert kl["training"]["steps"] == [10, 20, 30, 40]
    assert len({s["colour"] for s in kl.values()}) == 3
    assert set(series(data, "Seconds of a phase")) == {"rollout", "update"}
    assert chart(data, "skipped")["more"] and not chart(data, "Loss")["more"]
    titles = {c["title"] for c in data["curves"]}
    assert not titles & {"problems", "grades", "exact match low", "step"}


def test_speed_leaves_the_step_that_compiles_out():
    data = page_data([records()])
    (speed,) = [t for t in data["tables"] if t["section"] == "speed"]
    rows = {row[0]: row[1:] for row in speed["rows"]}
    assert rows["step, seconds"] == [39, 0.5, 0.5]
    assert rows["rollout, seconds"] == [4, 0.25, 0.25]
    assert rows["tokens a second"] == [39, 1280.0, None]
    assert series(data, "Speed")["training"]["values"] == [1280.0] * 4


def test_a_long_run_is_drawn_by_means_and_ends_where_it_ends():
    data = page_data([records(steps=1300)])
    line = series(data, "Loss")["training"]
    assert data["thinned"] == 3
    assert line["steps"][:2] == [3, 6] and line["steps"][-1] == 1300
    assert line["values"][0] == pytest.approx(11 / 9, rel=1e-5)
    assert line["values"][-1] == pytest.approx(2 / 1300, rel=1e-5)


def test_what_is_missing_or_not_finite_leaves_a_gap():
    rows = metrics(4)
    rows[1]["loss"] = None
    rows[2]["loss"] = float("nan")
    rows[3] |= {"loss": float("inf"), "seconds": None, "odd": "text"}
    last = evaluation(4, 0.5, final=True) | {"exact_match": None}
    run = records(metrics=rows[::-1], evals=[last], benchmarks={}, problems=[])
    data = page_data([run])
    json.dumps(data, allow_nan=False)
    assert series(data, "Loss")["training"]["values"] == [2.0, None, None, None]
    assert "odd" not in {c["title"] for c in data["curves"]}
    assert "Right answers" not in {c["title"] for c in data["curves"]}
    (table,) = [t for t in data["tables"] if t["section"] == "evaluations"]
    assert table["rows"][0][:3] == [4, "test", None]
    assert facts_of([run])["state"] == "step 4 of 40, finished"


def test_several_teachers_are_lines_of_one_chart():
    rows = [
        {"step": s, "loss": 1.0, "loss/a": 0.5, "loss/b": 1.5} for s in (1, 2)
    ]
    last = evaluation(2, 0.5) | {"exact_match/a": 0.25,
                                 "exact_match_low/a": 0.125,
                                 "exact_match_high/a": 0.375}  # fmt: skip
    data = page_data([records(metrics=rows, evals=[last])])
    found = series(data, "Loss")
    assert set(found) == {"training", "a, training", "b, training"}
    assert len({s["colour"] for s in found.values()}) == 3
    own = series(data, "Right answers")["a, validation"]
    assert (own["low"], own["high"]) == ([0.125], [0.375])


def test_answers_to_one_problem_stand_together():
    late = [answer(40, "learned", True), answer(0, "learned", None)]
    found = page_data([records(problems=late)])["problems"]
    assert len(found) == 1
    assert [a["step"] for a in found[0]["answers"]] == [0, 40]
    assert [a["right"] for a in found[0]["answers"]] == [None, True]
    found = page_data([records()])["problems"]
    assert [p["problem"] for p in found] == ["learned", "lost", HOSTILE, "2+8?"]
    assert [len(p["answers"]) for p in found] == [11, 11, 11, 1]
    assert [p["final"] for p in found] == [False, False, False, True]


def test_settings_tell_what_is_not_the_default():
    found = {s["name"]: s for s in page_data([records()])["settings"]}
    rate = found["optimizer.learning_rate"]
    assert rate["differs"] and rate["values"] == ["0.001"]
    assert rate["default"] == "0.0003"
    assert not found["objective.window"]["differs"]
    assert found["seed"] == {
        "name": "seed", "values": ["3"], "default": "–", "differs": True
    }  # fmt: skip


def test_runs_are_laid_over_each_other():
    other = records("b", metrics=metrics(9, loss=1.0), evals=[])
    other.settings["optimizer"] = {"learning_rate": 3e-4}
    data = page_data([records("a"), other])
    loss = series(data, "Loss")
    assert list(loss) == ["a, training", "b, training"]
    assert [s["colour"] for s in loss.values()] == [0, 1]
    assert len(loss["b, training"]["steps"]) == 9
    found = {s["name"]: s for s in data["settings"]}
    assert found["optimizer.learning_rate"]["values"] == ["0.001", "0.0003"]
    assert list(series(data, "Seconds of update")) == ["a"]
    assert {a["run"] for a in data["problems"][0]["answers"]} == {0, 1}
    assert {c["run"] for c in data["completions"]} == {0, 1}
    (table, *_) = data["tables"]
    assert table["heads"][:2] == ["step", "run"]
    assert facts_of([records("a"), other])["b"] == "step 9 of 40, not finished"


def test_an_empty_run_has_a_page_too(tmp_path):
    data = page_data([RunRecords("none")])
    assert not any(data[name] for name in ("curves", "tables", "problems"))
    (tmp_path / "settings.json").write_text("{}")
    found = report([tmp_path], tmp_path / "deep" / "page.html")
    assert found["runs"] == {tmp_path.name: "step 0, not finished"}
    assert (tmp_path / "deep" / "page.html").is_file()


def test_a_line_that_is_half_written_is_passed_over(tmp_path):
    workdir = write_run(records(), tmp_path / "run")
    log = workdir / "metrics.jsonl"
    log.write_bytes(log.read_bytes() + '{"step": 41, "é'.encode()[:-1])
    assert len(read_run(workdir).metrics) == 40


def test_what_is_no_run_is_refused(tmp_path):
    def refused(*workdirs):
        with pytest.raises(ValueError) as error:
            report(workdirs, None)
        return str(error.value)

    assert "no directory at" in refused(tmp_path / "none")
    assert "topd train writes them" in refused(tmp_path)
    one = write_run(records(), tmp_path / "one")
    assert "there are runs below it: one" in refused(tmp_path)
    assert "the same run is given twice" in refused(one, tmp_path / "." / "one")
    (one / "eval-best.json").write_text("[]")
    assert "must hold a JSON object" in refused(one)
    (one / "eval-best.json").write_text("{")
    assert "is not JSON" in refused(one)
    (one / "eval-best.json").unlink()
    (one / "evals.jsonl").write_text('{"step": 1}\n{"loss": 2}\n')
    assert "evals.jsonl: record 2 has no step" in refused(one)
    (one / "evals.jsonl").write_text("nonsense\n")
    assert "evals.jsonl line 1 is not JSON" in refused(one)


def test_runs_of_one_name_are_told_apart(tmp_path):
    for parent in ("a", "b"):
        write_run(records(), tmp_path / parent / "run")
    found = report([tmp_path / p / "run" for p in ("a", "b")], None)
    assert list(found["runs"]) == ["a/run", "b/run"]


def test_report_from_the_command_line(trained, capsys, tmp_path):
    capsys.readouterr()
    main.run(["report", f"--workdir={trained}"])
    found = json.loads(capsys.readouterr().out)
    page = Page((trained / "report.html").read_text(encoding="utf-8"))
    assert found["page"] == str(trained / "report.html")
    data = json.loads(page.scripts[0])
    assert len(data["problems"]) == 16  # of validation and of the test
    assert {"Loss", "Right answers", "Seconds of a phase"} <= {
        c["title"] for c in data["curves"]
    }
    with pytest.raises(SystemExit):
        main.run(["report", "--workdir", str(tmp_path / "none")])
    assert "topd: no directory at" in capsys.readouterr().err

"""The numbers and texts of a run's page (see test_pages_browser.py)."""

import json

import pytest
from small_logs import (
    HOSTILE,
    answer,
    evaluation,
    metrics,
    records,
    text_of,
    write_run,
)

from topd_jax.experiments.run_curves import curves_of
from topd_jax.experiments.run_page import (
    problems_of,
    report,
    settings_of,
    state_of,
    tables_of,
)
from topd_jax.experiments.run_records import RunRecords, read_run


def traces(title, *runs):
    """Line -> its plotly trace, of the one chart with that title."""
    (chart,) = [c for c in curves_of(runs) if c["title"] == title]
    return {t["meta"]: t for t in chart["traces"]}


def titles(*runs):
    return {chart["title"] for chart in curves_of(runs)}


def test_the_page_carries_all_and_asks_for_nothing(tmp_path):
    run = records("<i>one")
    workdir = write_run(run, tmp_path / "<i>one")
    assert read_run(workdir, "<i>one") == run
    state = "topd(window=20), step 40 of 40, finished"
    assert report(workdir) == {
        "page": str(workdir / "report.html"), "runs": {"<i>one": state}
    }  # fmt: skip
    page = (workdir / "report.html").read_text(encoding="utf-8")
    assert "default-src 'none'" in page
    assert "<i>" not in page and "<img" not in page
    shown = text_of(page)
    assert "learned at 40" in shown and f"<i>one: {state}" in shown
    # A problem, its 11 answers, 4 completions and a setting.
    assert shown.count(HOSTILE) == 17


def test_curves_are_the_numbers_of_the_logs():
    run = records()
    (loss,) = traces("Loss", run).values()
    assert loss["x"] == list(range(1, 41)) and loss["y"][7] == 0.25
    right = traces("Right answers", run)
    assert list(right) == ["validation", "test"]
    assert right["validation"]["y"][1] == pytest.approx(0.34)
    test = right["test"]
    assert test["x"] == [40] and test["text"] == [" (0.700 to 0.900)"]
    assert test["error_y"]["array"] == pytest.approx([0.1])
    assert test["error_y"]["arrayminus"] == pytest.approx([0.1])
    kl = traces("Reverse KL", run)
    assert kl["training"]["x"] == [10, 20, 30, 40]
    assert len({t["line"]["color"] for t in kl.values()}) == 3
    more = {c["title"]: c["more"] for c in curves_of([run])}
    assert more["skipped"] and not more["Loss"]
    assert not set(more) & {"problems", "grades", "exact match low", "step"}


def test_what_is_missing_or_not_finite_leaves_a_gap():
    rows = metrics(4)
    rows[1]["loss"] = None
    rows[2]["loss"] = float("nan")
    rows[3] |= {"loss": float("inf"), "odd": "text"}
    last = evaluation(4, 0.5, final=True) | {"exact_match": None}
    run = records(metrics=rows[::-1], evals=[last], benchmarks={})
    json.dumps(curves_of([run]), allow_nan=False)
    assert traces("Loss", run)["training"]["y"] == [2.0, None, None, None]
    assert not titles(run) & {"odd", "Right answers"}
    (table,) = tables_of([run])
    assert table["heads"] == [
        "step", "problems of", "right", "problems", "reverse KL"
    ]  # fmt: skip
    assert table["rows"] == [["4", "test", "–", "100", "0.500"]]


def test_several_teachers_are_lines_of_one_chart():
    rows = [
        {"step": s, "loss": 1.0, "loss/a": 0.5, "loss/b": 1.5} for s in (1, 2)
    ]
    last = evaluation(2, 0.5) | {"exact_match/a": 0.25,
                                 "exact_match_low/a": 0.125,
                                 "exact_match_high/a": 0.375}  # fmt: skip
    run = records(metrics=rows, evals=[last])
    loss = traces("Loss", run)
    assert set(loss) == {"training", "a, training", "b, training"}
    assert len({t["line"]["color"] for t in loss.values()}) == 3
    right = traces("Right answers", run)["a, validation"]
    assert right["text"] == [" (0.125 to 0.375)"]


def test_answers_to_one_problem_stand_together():
    late = [answer(40, "learned", True), answer(0, "learned", None)]
    (problem,) = problems_of([records(problems=late)])
    assert [a["step"] for a in problem["answers"]] == [0, 40]
    *others, last = problems_of([records()])
    assert [p["problem"] for p in others] == ["learned", "lost", HOSTILE]
    assert {len(p["answers"]) for p in others} == {11}
    assert (last["problem"], last["final"]) == ("2+8?", True)


def test_runs_are_laid_over_each_other():
    one = records("a")
    two = records("b", metrics=metrics(9, loss=1.0), evals=[])
    two.settings["optimizer"] = {"learning_rate": 3e-4}
    loss = traces("Loss", one, two)
    assert list(loss) == ["a, training", "b, training"]
    assert loss["b, training"]["x"] == list(range(1, 10))
    right = traces("Right answers", one, two, records("c"))
    assert [t["showlegend"] for t in right.values()] == [True, False] * 2
    # A chart that one run lacks names the other, in its own color.
    guided = [row | {"guidance": 1.0} for row in metrics(9)]
    three = records("c", metrics=guided)
    (own,) = traces("Guidance loss", two, three).values()
    assert own["showlegend"] and own["name"] == "c"
    assert own["line"] == traces("Loss", two, three)["c, training"]["line"]
    settings = {s["name"]: s for s in settings_of([one, two])}
    assert settings["optimizer.learning_rate"] == {
        "name": "optimizer.learning_rate", "values": ["0.001", "0.0003"],
        "default": "0.0003", "differs": True,
    }  # fmt: skip
    (unknown,) = settings_of([records(settings={"gone": 1})])
    assert unknown["default"] == "–" and unknown["differs"]
    assert settings["objective"]["values"] == ["topd(window=20)"] * 2
    answers = problems_of([one, two])[0]["answers"]
    assert [(a["step"], a["run"]) for a in answers[:3]] == [
        (0, "a"), (0, "b"), (4, "a")
    ]  # fmt: skip
    evaluations, benchmarks = tables_of([one, two])
    assert evaluations["heads"][:2] == ["step", "run"]
    assert evaluations["rows"][-1][:4] == [
        "40", "a", "test", "0.800 (0.700 to 0.900)"
    ]  # fmt: skip
    assert benchmarks["rows"][0] == [
        "gsm", "a", "best", "20", "pass@1", "0.500 (0.250 to 0.750)"
    ]  # fmt: skip
    assert state_of(two).endswith("step 9 of 40, not finished")


def test_an_empty_run_has_a_page_too(tmp_path):
    run = RunRecords("none")
    assert not (curves_of([run]) or tables_of([run]) or problems_of([run]))
    settings = {"objective": "opd", "train": {"steps": 9}}
    (tmp_path / "settings.json").write_text(json.dumps(settings))
    result = report(tmp_path, output=tmp_path / "deep" / "page.html")
    assert result["runs"] == {tmp_path.name: "opd, step 0 of 9, not finished"}
    shown = text_of((tmp_path / "deep" / "page.html").read_text())
    assert "Nothing is logged yet." in shown and "None yet." in shown


def test_runs_are_read_while_they_write_and_told_apart(tmp_path):
    workdirs = [write_run(records(), tmp_path / p / "run") for p in "ab"]
    with (workdirs[0] / "metrics.jsonl").open("ab") as log:
        log.write('{"step": 41, "é'.encode()[:-1])
    result = report(workdirs[0], [workdirs[1]])
    assert list(result["runs"]) == ["a/run", "b/run"]
    assert "step 40 of 40" in result["runs"]["a/run"]


def test_what_is_no_run_is_refused(tmp_path):
    def refused(*workdirs):
        with pytest.raises(ValueError) as error:
            report(workdirs[0], workdirs[1:])
        return str(error.value)

    for workdir in (tmp_path, tmp_path / "none"):
        assert f"no run at {workdir}: it has no settings" in refused(workdir)
    one = write_run(records(), tmp_path / "one")
    (one / "eval-best.json").write_text("{")
    assert "is not JSON" in refused(one)
    (one / "eval-best.json").unlink()
    (one / "evals.jsonl").write_text("nonsense\n")
    assert "evals.jsonl line 1 is not JSON" in refused(one)


def test_report_from_the_command_line(trained, topd):
    result = json.loads(topd("report", f"--workdir={trained}"))
    assert result["page"] == str(trained / "report.html")
    run = read_run(trained, "run")
    assert len(problems_of([run])) == 16  # of validation and of the test
    assert {"Loss", "Right answers", "Speed", "Rollout"} <= titles(run)

"""The report of a sweep: intervals, comparisons, table and pictures."""

import json

import numpy as np
import pytest
from matplotlib import image
from matplotlib.axes import Axes

from topd_jax.evaluation.evaluator import _accuracy
from topd_jax.experiments import plots, report
from topd_jax.experiments.report import (
    grades_of,
    interval,
    markdown,
    summarise,
    write_report,
)


def evaluation(grades, **fields):
    """An evaluation's line with these grades, as the evaluator packs them."""
    return {
        "problems": len(grades),
        "reverse_kl": 0.5,
        "length_mean": 9.0,
        **_accuracy([bool(g) for g in grades]),
        **fields,
    }


def draw(seed, share, count=200):
    return np.random.default_rng(seed).random(count) < share


def line(name, seed, grades, **fields):
    row = {
        "name": name,
        "seed": seed,
        "machine": "a machine",
        "evaluation": evaluation(grades),
        "greedy": {"exact_match": float(np.mean(grades))},
    }
    if name not in ("start", "teacher"):
        row |= {
            "steps": 20,
            "tokens": 1000.0,
            "seconds_step": 0.5,
            "seconds_phases": {"rollout": 0.2, "annotate": 0.1, "update": 0.2},
            "curve": [
                {"step": s, "tokens": 50.0 * s, "exact_match": a,
                 "reverse_kl": 1 - a}
                for s, a in ((0, 0.4), (10, 0.55), (20, 0.65))
            ],
        }  # fmt: skip
    return row | fields


def detector_entry():
    numbers = {"auc": 0.8, "precision": 0.6, "recall": 0.7}
    label = {"share": 0.2, "distance": numbers, "loss": dict(numbers, auc=None)}
    return {
        "candidates": 12,
        "flagged": 8,
        "fork": label,
        "window_fork": label,
        "histogram": {
            "edges": [0.0, 0.5, 1.0],
            "surface": [5, 1],
            "fork": [2, 4],
        },
    }


@pytest.fixture(scope="module")
def rows():
    found = []
    for seed in (0, 1):
        weak, strong = draw(seed, 0.5), draw(seed, 0.5) | draw(9, 0.3)
        found += [
            line("start", seed, draw(7, 0.3), detector=detector_entry()),
            line("opd", seed, weak),
            line("topd:teacher", seed, strong, seconds_step=0.75),
        ]
    return found


@pytest.mark.parametrize("count", [1, 4, 7, 8, 13])
def test_grades_survive_their_packing(count):
    for seed in range(4):
        grades = draw(seed, 0.3, count)
        grades[0] = seed % 2  # leading zeros as well
        row = json.loads(json.dumps(evaluation(grades)))
        np.testing.assert_array_equal(grades_of(row), grades)


def test_an_interval_holds_the_truth_about_as_often_as_it_says():
    inside = 0
    for seed in range(60):
        low, high = interval(draw(seed, 0.6, 150)[None].astype(float))
        inside += low <= 0.6 <= high
    assert 52 <= inside <= 60  # 57 are expected


def test_an_interval_is_that_of_the_binomial_and_shrinks():
    for count in (100, 1600):
        low, high = interval(draw(1, 0.5, count)[None].astype(float))
        assert high - low == pytest.approx(2 * 0.98 / count**0.5, rel=0.1)


def test_an_interval_counts_seeds_as_well_as_problems():
    alike = np.tile(draw(1, 0.5)[None].astype(float), (4, 1))
    differing = np.stack([np.full(200, v) for v in (0.2, 0.4, 0.6, 0.8)])
    low, high = interval(differing)
    assert low < 0.35 and high > 0.65
    assert interval(alike) == interval(alike[:1])  # the same problems again
    assert interval(np.ones((2, 5))) == (1.0, 1.0)


def test_variants_are_compared_on_the_same_problems(rows):
    summary = summarise(rows)
    assert summary["seeds"] == [0, 1]
    by_name = {v["name"]: v for v in summary["variants"]}
    assert list(by_name) == ["start", "opd", "topd:teacher"]
    opd, topd = by_name["opd"], by_name["topd:teacher"]
    assert "gain" not in opd and "gain" not in by_name["start"]
    gains = [
        topd_grades.mean() - opd_grades.mean()
        for topd_grades, opd_grades in (
            (draw(s, 0.5) | draw(9, 0.3), draw(s, 0.5)) for s in (0, 1)
        )
    ]
    assert topd["gain"] == pytest.approx(np.mean(gains))
    low, high = topd["gain_interval"]
    assert 0 < low < topd["gain"] < high
    # Paired: narrower than the two intervals side by side.
    assert high - low < topd["interval"][1] - topd["interval"][0]
    assert opd["overhead"] == 1.0
    assert topd["overhead"] == 1.5
    assert "overhead" not in by_name["start"]


def test_milestones_are_the_first_crossings(rows):
    opd = summarise(rows)["variants"][1]
    assert opd["milestones"]["0.5"] == {"steps": 10.0, "tokens": 500.0}
    assert opd["milestones"]["0.6"] == {"steps": 20.0, "tokens": 1000.0}
    assert opd["milestones"]["0.7"] is None


def test_a_milestone_that_one_seed_misses_is_missed(rows):
    slow = line("opd", 1, draw(1, 0.5))
    slow["curve"] = [dict(p, exact_match=0.45) for p in slow["curve"]]
    assert report._crossing([rows[1]["curve"], slow["curve"]], 0.5) is None


def test_the_table_has_a_line_a_variant(rows):
    text = markdown(summarise(rows))
    lines = text.splitlines()
    columns = lines[0].count("|")
    named = {
        title: next(x for x in lines if x.startswith(f"| {title} |"))
        for title in ("student before distillation", "OPD",
                      "TOPD, context teacher")
    }  # fmt: skip
    assert all(x.count("|") == columns for x in named.values())
    assert "10 (0k) / 20 (1k) / – / –" in named["OPD"]
    assert named["OPD"].endswith("| 0.500 | 1.00 |")
    assert "Seeds 0, 1; a machine." in text
    assert "the token is the fork: by distance | 0.200 | 0.800 |" in text
    assert "by loss alone | 0.200 | – | 0.600 | 0.700 |" in text


def test_a_report_without_grades_or_candidates_still_stands(tmp_path, rows):
    ungraded = [
        line(
            name,
            0,
            [1],
            evaluation={
                "problems": 4, "exact_match": None, "reverse_kl": 0.25,
                "length_mean": 3.0,
            },
            greedy={"exact_match": None},
        )
        for name in ("start", "opd")
    ]  # fmt: skip
    for point in ungraded[1]["curve"]:
        point["exact_match"] = None
    nothing = detector_entry()
    nothing["fork"] = dict(nothing["fork"], share=None)
    ungraded[0]["detector"] = nothing
    files = write_report(ungraded, tmp_path)
    table = (tmp_path / "table.md").read_text()
    assert "| OPD | 1 |  |  |  |  |  | 0.250 | – / – / – / – |" in table
    assert "the token is the fork: by distance | – | 0.800" in table
    assert_picture(files["curves"])


def assert_picture(path):
    with open(path, "rb") as file:
        assert file.read(8) == b"\x89PNG\r\n\x1a\n"
    pixels = image.imread(path)[..., :3]
    assert pixels.shape[0] > 200 and pixels.shape[1] > 400
    colourful = pixels.max(-1) - pixels.min(-1) > 0.2
    assert colourful.mean() > 0.001  # lines or bars, not only black axes


def test_all_files_are_written_and_the_pictures_are_not_blank(
    tmp_path, rows, capsys
):
    files = write_report(rows, tmp_path / "deep" / "report")
    assert set(files) == {"report", "table_file", "curves", "distances"}
    assert_picture(files["curves"])
    assert_picture(files["distances"])
    summary = json.loads((tmp_path / "deep/report/report.json").read_text())
    assert summary == json.loads(json.dumps(summarise(rows)))
    assert summary["detector"]["fork"]["distance"]["auc"] == 0.8
    assert (tmp_path / "deep/report/table.md").read_text() in (
        capsys.readouterr().out
    )


def test_more_variants_than_colours_are_all_drawn(tmp_path, monkeypatch):
    drawn = []
    plain = Axes.plot

    def plot(self, *args, **fields):
        drawn.append(fields["label"])
        return plain(self, *args, **fields)

    monkeypatch.setattr(Axes, "plot", plot)
    names = [f"v{i}" for i in range(9)]
    plots.curves([line(n, 0, [1]) for n in names], {"v1": "one"}, tmp_path)
    titles = ["v0", "one", *names[2:]]
    assert sorted(drawn) == sorted(2 * titles)
    drawn.clear()
    names = ["opd", *(f"opd/window={i}" for i in range(20))]
    plots.curves([line(n, 0, [1]) for n in names], report.TITLES, tmp_path)
    assert drawn == ["OPD", "OPD"]


def test_a_title_tells_what_was_changed():
    assert report.title("opd") == "OPD"
    assert report.title("topd:teacher/window=5/siblings.gamma=0.1") == (
        "TOPD, context teacher, window 5, gamma 0.1"
    )
    assert report.title("topd+suppress:teacher/branch_loss=forward_kl") == (
        "TOPD, false alarms capped, branch loss forward_kl"
    )
    assert report.title("own") == "own"


def test_p_values_grow_with_the_number_of_comparisons():
    def variant(gain, error):
        half = 1.959964 * error
        return {"gain": gain, "gain_interval": (gain - half, gain + half)}

    two = [variant(0.02, 0.01), variant(-0.03, 0.01)]
    report._adjust(two)
    # Two-sided normal tails: z = 3 twice, z = 2 once.
    assert two[1]["p"] == pytest.approx(2 * 0.0026998, rel=1e-3)
    assert two[0]["p"] == pytest.approx(0.0455003, rel=1e-3)
    alone = [variant(0.02, 0.01)]
    report._adjust(alone)
    assert alone[0]["p"] == pytest.approx(0.0455003, rel=1e-3)
    many = [variant(0.02, 0.01) for _ in range(40)]
    report._adjust(many)
    assert {v["p"] for v in many} == {1.0}


def test_many_gains_are_drawn_as_a_picture(tmp_path, rows):
    more = [
        dict(rows[2], name=f"topd:teacher/window={i}") for i in range(8)
    ]  # fmt: skip
    files = write_report([*rows[:2], *more], tmp_path)
    assert_picture(files["gains"])

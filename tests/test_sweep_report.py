"""The tables and pictures of a sweep; test_results has their numbers."""

import numpy as np
from matplotlib import image
from matplotlib.axes import Axes

from topd_jax.evaluation.metrics import accuracy
from topd_jax.experiments import plots
from topd_jax.experiments.sweep_report import write_report


def draw(seed, share, count=200):
    return np.random.default_rng(seed).random(count) < share


def line(name, seed, grades, **fields):
    row = {
        "name": name,
        "seed": seed,
        "machine": "a machine",
        "evaluation": {
            "problems": len(grades),
            "reverse_kl": 0.5,
            "length_mean": 28.0,
            **accuracy(grades.tolist()),
        },
        "greedy": {"exact_match": float(grades.mean())},
    }
    if name not in ("start", "teacher"):
        row |= {
            "seconds_step": 0.5,
            "curve": [
                {"step": s, "exact_match": a, "reverse_kl": 1 - a}
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
        "histogram": {"edges": [0.0, 1.0]},  # of an older record
    }


def test_what_is_unknown_is_empty_in_the_tables(tmp_path):
    unknown = {"problems": 4, "exact_match": None, "reverse_kl": 0.25}
    ungraded = [
        line(name, 0, draw(0, 1.0), evaluation=unknown,
             greedy={"exact_match": None})
        for name in ("start", "opd")
    ]  # fmt: skip
    untimed = line("tip", 0, draw(0, 1.0), evaluation=unknown,
                   greedy={"exact_match": None}, seconds_step=None)  # fmt: skip
    ungraded.append(untimed)
    for point in (*ungraded[1]["curve"], *untimed["curve"]):
        point["exact_match"] = None
    nothing = detector_entry()
    nothing["fork"] = dict(nothing["fork"], share=None)
    ungraded[0]["detector"] = nothing
    files = write_report(ungraded, tmp_path)
    table = (tmp_path / "table.md").read_text()
    assert "| opd | 1 |  |  |  |  |  | 0.250 | 0.500 | 1.00 |" in table
    assert "| tip | 1 |  |  |  |  |  | 0.250 |  |  |" in table
    assert "the token is the fork: by distance | – | 0.800" in table
    assert "by loss alone | 0.200 | – | 0.600 | 0.700 |" in table
    assert "Seeds 0; a machine." in table
    assert "One seed: intervals and p are of these students" in table
    assert set(files) == {"report", "table_file", "curves"}
    assert image.imread(files["curves"]).std() > 0.01
    write_report(ungraded, tmp_path, baseline="start")  # which has no seconds
    assert "| s a step | ÷ start |" in (tmp_path / "table.md").read_text()


def test_a_single_seed_is_told(tmp_path):
    lines = [line("opd", seed, draw(seed, 0.5)) for seed in (0, 1)]
    write_report(lines, tmp_path)
    table = (tmp_path / "table.md").read_text()
    assert "One seed" not in table and "| 0.650 | 0.500 | 0.500 |" in table
    for row in lines:  # eval.every=0: evaluated before the first step alone
        row["curve"] = row["curve"][:1]
    write_report(lines, tmp_path)
    assert "|  | 0.500 | 0.500 |" in (tmp_path / "table.md").read_text()


def test_as_many_curves_are_drawn_as_can_be_told_apart(tmp_path, monkeypatch):
    drawn = []
    plain = Axes.plot

    def plot(self, *args, **fields):
        drawn.append(fields["label"])
        return plain(self, *args, **fields)

    monkeypatch.setattr(Axes, "plot", plot)
    names = [f"v{i}" for i in range(25)]
    lines = [line(name, 0, draw(0, 1.0)) for name in names]
    plots.curves(lines, tmp_path / "curves.png")
    # Seven colors, solid, dashed and dash-dotted; both pictures have each.
    assert sorted(drawn) == sorted(2 * names[:21])

"""The results' README says what its records hold."""

import functools
import re
from pathlib import Path

import families_table
import numpy as np

from topd_jax.configs import tiny
from topd_jax.experiments.sweep_report import markdown, summarize
from topd_jax.training.logging import read_jsonl

RESULTS = Path(__file__).parents[1] / "notebooks" / "results"
README = (RESULTS / "README.md").read_text()
FREE = "topd(guidance_weight=0.3, detector='future_loss')"


@functools.cache
def certainty_of(world):
    """Lines of the record of one world, and its table."""
    rows = read_jsonl(RESULTS / "certainty.jsonl")
    rows = [r for r in rows if r["world"] == world]
    return rows, markdown(summarize(rows))


def cells(line):
    return [c.strip().strip("*") for c in line.strip("|").split("|")]


def section_of(title):
    return README.partition(title)[2].partition("\n## ")[0]


def table_of(text):
    return [cells(x) for x in text.splitlines() if x.startswith("| ")]


def lines_of(text):
    """First cell -> the others, of table lines; the first of a name counts."""
    rows = [cells(x) for x in text.splitlines() if x.startswith("|")]
    return {first: rest for first, *rest in reversed(rows)}


def test_the_variants_are_those_of_the_record():
    names = ("start", "teacher", "opd", "topd:teacher", "fire")
    rows = read_jsonl(RESULTS / "factors.jsonl")
    summary = summarize([r for r in rows if r["name"] in names])
    printed, shown = lines_of(markdown(summary)), lines_of(README)
    for variant in summary["variants"]:
        title = variant["name"]
        _, accuracy, gain, _, greedy, validation, kl, _, ratio = printed[title]
        # p is adjusted for the number of comparisons, which are fewer here.
        here = shown[title][:2] + shown[title][3:]
        assert here == [accuracy, gain, greedy, validation, kl, ratio]
    for label, score in (
        ("transport distance (the paper's)", "distance"),
        ("loss of the token", "loss alone"),
        ("mean loss of the window", "mean loss of the window"),
        ("teacher's entropy", "teacher entropy"),
    ):
        _, fork, *_ = printed[f"the token is the fork: by {score}"]
        _, *window = printed[f"the fork lies in the window: by {score}"]
        expected = [fork, window[0], f"{window[1]} / {window[2]}"]
        assert shown[label][:3] == expected


def test_the_gains_by_certainty_are_those_of_the_record():
    section = section_of("## When does it help?")
    table = {k: v for k, v in lines_of(section).items() if len(v) == 5}
    shares, (forks, opd) = table["share read without precedence"], (
        table["p of the right token at forks"], table["OPD"]
    )  # fmt: skip
    for column, share in enumerate(shares):
        _, printed = certainty_of(f"world.student_left_to_right={share}")
        assert f"median probability of {forks[column]} (q" in printed
        accuracy = lines_of(printed)["opd"][1].partition(" ")[0]
        assert opd[column].startswith(accuracy)
        gains = [
            cells[column] for name, cells in table.items()
            if cells not in (shares, forks, opd) and "---" not in name
        ]  # fmt: skip
        assert sum(map(bool, gains)) >= 12
        assert all(f"| {gain} |" in printed for gain in gains if gain)
    five, early = FREE[:-1] + ", window=5)", tiny.EARLY
    for name, base, where in (
        (FREE, "opd;train.steps=405", ("0.99", "1.0")),
        (five, "opd;train.steps=405", ("0.99", "1.0")),
        (early, "opd;train.steps=325", shares),
    ):
        for share in where:
            rows, _ = certainty_of(f"world.student_left_to_right={share}")
            of_world = [r for r in rows if r["name"] in (name, base)]
            longer = markdown(summarize(of_world, base)).splitlines()
            (line,) = (x for x in longer if x.startswith(f"| {name} |"))
            assert cells(line)[3] in " ".join(section.split())


def test_the_gains_by_sharpness_are_those_of_the_record():
    section = README.partition("| factor of the logits |")[2]
    head, _, *lines = section.splitlines()[:8]
    lines = [cells(line)[1:] for line in lines]
    for column, factor in enumerate(cells(head)):
        world = "world.student_left_to_right=0.99"
        world += "" if factor == "1" else f";world.student_sharpness={factor}"
        _, printed = certainty_of(world)
        median, low, start, opd, free, early = (x[column] for x in lines)
        assert f"median probability of {median} (quartiles {low}" in printed
        shown = lines_of(printed)
        for name, accuracy in (("start", start), ("opd", opd)):
            assert shown[name][1].startswith(f"{accuracy} ")
        assert free == shown[FREE][2] and early == shown[tiny.EARLY][2]


def test_the_runs_on_sums_are_those_of_the_record():
    teacher, student, *rows = read_jsonl(RESULTS / "reasoning.jsonl")
    section = section_of("## A real tokenizer")
    for row in (teacher, student):
        *found, last = (f"{e['exact_match']:.2f}" for e in row["evals"][1:-1])
        assert f"{', '.join(found)} and {last} after" in " ".join(
            section.split()
        )
    probes = [row for row in rows if "mean" in row]
    runs = [row for row in rows if "evaluation" in row]
    summary = summarize(runs)
    printed = lines_of(markdown(summary))
    lines = table_of(section)[1:]
    for line, variant in zip(lines, summary["variants"], strict=True):
        name = variant["name"]
        _, accuracy, gain, _, greedy, _, kl, *_ = printed[name]
        told = [r["evaluation"] for r in runs if r["name"] == name]
        length, distinct = (
            np.mean([e[what] for e in told])
            for what in ("length_mean", "distinct_3")
        )
        futures = [p["mean"] for p in probes if p["name"] == name]
        apart = [
            f"{np.mean([means[group] for means in futures]):.3f}"
            for group in ("high", "random")
            if futures
        ]
        assert line[1:] == [
            accuracy, gain, greedy, kl, f"{length:.1f}", f"{distinct:.3f}",
            " / ".join(apart),
        ]  # fmt: skip


def test_the_privileged_teachers_are_those_of_the_record():
    printed = markdown(summarize(read_jsonl(RESULTS / "privileged.jsonl")))
    lines = table_of(section_of("## A teacher that sees more"))[1:8]
    for shown, (_, _, accuracy, gain, _, greedy, _, kl, *_) in zip(
        lines, table_of(printed)[2:9], strict=True
    ):
        assert shown[1:] == [accuracy, gain, greedy, kl]


def test_the_model_that_teaches_itself_is_that_of_the_record():
    clipped, plain = read_jsonl(RESULTS / "privileged_smollm2.jsonl")
    for row in (clipped, plain):
        for name, digits in (("loss", 3), ("student_entropy", 2)):
            told = [f"{m[name]:.{digits}f}" for m in row["metrics"][4::5]]
            assert ", ".join(told) in " ".join(README.split())
    names = ("forward_kl", "reverse_kl", "student_entropy", "teacher_nll")
    # Of the last step there are two, and both begin with the same student.
    evals = [*clipped["evals"][:3], *plain["evals"][1:3]]
    lines = README.partition("| start | clipped, 15 steps |")[2].splitlines()
    for line, name in zip(lines[2:6], names, strict=True):
        assert cells(line)[1:] == [f"{e[name]:.3f}" for e in evals]


def test_the_corrections_are_those_of_the_record():
    for row in read_jsonl(RESULTS / "correct.jsonl"):
        assert len(row["methods"]) == 4
        for numbers in row["methods"].values():
            low, high = numbers["interval"]
            assert f"| {numbers['mean']:.3f} ({low:.3f}–{high:.3f}) |" in README


def test_every_file_that_is_named_exists():
    names = re.findall(r"\]\((\w+\.png)\)|`(\w+\.jsonl)`", README)
    assert len(names) > 8
    for name in map("".join, names):
        assert (RESULTS / name).exists(), name


def test_the_table_of_families_is_that_of_the_registry():
    readme = families_table.README.read_text()
    again = "run python tests/families_table.py"
    assert readme == families_table.updated(readme), again

"""Problems of reasoning-gym: read, graded, solved by rule and learned from."""

import importlib.util
import os
import sys
from pathlib import Path

import pytest
from small_hub import hub_directory
from small_run import changed, refusal_of, settings_with

from topd_jax.data import gym
from topd_jax.data.solutions import read_solutions
from topd_jax.data.sources import read_source
from topd_jax.evaluation.benchmarking import read_benchmark
from topd_jax.evaluation.grading import grade_answers
from topd_jax.experiments import worked
from topd_jax.training.setup import load_setup

TASK = "chain_sum(min_terms=2, max_terms=3, max_digits=1, size={}, seed={})"


@pytest.fixture(autouse=True, scope="module")
def package():
    """Stands in for reasoning_gym where it is missing, also in workers."""
    gym.open_task.cache_clear()
    with pytest.MonkeyPatch.context() as patch:
        if importlib.util.find_spec("reasoning_gym") is None:
            folder = str(Path(__file__).with_name("stand_in"))
            patch.syspath_prepend(folder)
            old = os.environ.get("PYTHONPATH", "")
            patch.setenv("PYTHONPATH", f"{folder}{os.pathsep}{old}")
        yield
        gym.open_task.cache_clear()
        for name in [n for n in sys.modules if n.startswith("reasoning_gym")]:
            del sys.modules[name]


def terms(record):
    return record["prompt"].partition(":")[2].partition("=")[0]


def test_questions_come_once_and_the_same_ones_again():
    records = read_source(gym.SOURCE, TASK.format(2000, 3))
    assert records == read_source(gym.SOURCE, TASK.format(2000, 3))
    prompts = [r["prompt"] for r in records]
    assert len(set(prompts)) == len(prompts) < 2000
    assert prompts != sorted(prompts)
    dataset = gym.open_task(TASK.format(2000, 3))
    for record in records[::100]:
        assert int(record["answer"]) == eval(terms(record))
        assert record["prompt"].endswith("\nPut the final answer in \\boxed{}.")
        assert terms(record) in dataset[record["index"]]["question"]
    # Without a seed too.
    assert dict(gym.open_task("leg_counting")[3]) == dict(
        gym.open_task("leg_counting(seed=0, size=9)")[3]
    )


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ("chain_sun", "no dataset 'chain_sun'; the nearest of .* chain_sum"),
        ("chain_sum(terms=3)", "no option terms; the options of chain_sum: m"),
        ("ransom_note", "ransom_note draws other problems in every process"),
        ("chain_sum(max_terms=1)", "max_terms=1.*: max_terms must be >= min"),
        ("chain_sum(seed='a')", "reasoning_gym=.*seed='a' must be of type int"),
        ("chain_sum(size={[]: 1})", "cannot be read"),
        ("chain_sum(", "cannot be read; write NAME or .*, for instance chain_"),
    ],
)
def test_a_task_that_cannot_be_made(task, message):
    with pytest.raises(ValueError, match=message):
        read_source(gym.SOURCE, task)


def test_without_the_package(monkeypatch):
    gym.open_task.cache_clear()
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    line = refusal_of(lambda: read_source(gym.SOURCE, "chain_sum"))
    assert "needs the package reasoning-gym" in line
    assert line.endswith("pip install reasoning-gym")


def test_answers_are_graded_by_their_dataset():
    name, records = read_benchmark(
        f"{gym.SOURCE}:chain_sum(min_digits=4, min_terms=3, size=20)"
    )
    assert name == "chain_sum(min_digits=4, min_terms=3, size=20)"
    numbers = [int(r["answer"]) for r in records]
    assert max(numbers) > 1000
    records = [records[numbers.index(max(numbers))]] * 8
    right = max(numbers)
    texts = [
        f"= 7\n\\boxed{{{right}}}",
        f"\\boxed{{{right:,}}}",
        f"The answer is ${right}$.",
        f"1 + 1 = 2, so it is {right}",
        # For half of it there is credit, which does not count.
        f"\\boxed{{{right} or 5}}",
        f"\\boxed{{{right + 1}}}, not {right}",
        "\\boxed{}",
        "",
    ]
    records = [r | {"answer": ""} for r in records]  # none is known for some
    assert grade_answers(records, texts) == [True] * 4 + [False] * 4


def test_rules_and_habits():
    problem = {"expression": "9 - 4 + 2"}
    right = ["9 - 4 = 5", "5 + 2 = 7"]
    assert worked.chain_sum(problem, False) == (right, 7)
    wrong = ["4 + 2 = 6", "9 - 6 = 3"]
    assert worked.chain_sum(problem, True) == (wrong, 3)
    gym.open_task("leg_counting")
    problem = {"animals": {"snake": 2, "spider": 3, "dog": 1}}
    products = ["2 snake: 2 * 0 = 0", "3 spider: 3 * 8 = 24"]
    sums = ["1 dog: 1 * 4 = 4", "0 + 24 = 24", "24 + 4 = 28"]
    found = worked.leg_counting(problem, False)
    assert found == ([*products, *sums], 28)
    lines, answer = worked.leg_counting(problem, True)
    assert lines[1] == "3 spider: 3 * 4 = 12"
    assert answer == 16


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    model = hub_directory(tmp_path_factory.mktemp("model") / "hub")
    return settings_with(
        student__source=model, teacher__source=model,
        data__source=gym.SOURCE,
        data__path="chain_sum(min_terms=3, max_terms=4, max_digits=2, size=40)",
        data__held_out=3, data__max_prompt_length=200,
    )  # fmt: skip


def test_a_share_of_problems_is_solved_with_the_habit(settings, tmp_path):
    right = worked.solve(settings, tmp_path / "right")
    assert (right["solutions"], right["exact_match"]) == (37, 1.0)
    wrong = worked.solve(settings, tmp_path / "wrong", habit=0.9)
    assert 0.1 < wrong["exact_match"] < 0.7
    # A finished set stays as it is, and another is refused.
    assert worked.solve(settings, tmp_path / "wrong", habit=0.9) == wrong
    assert "habit: 0.9 there, 0.1 here" in refusal_of(
        lambda: worked.solve(settings, tmp_path / "wrong", habit=0.1)
    )
    sets = [read_solutions(s["path"]) for s in (right, wrong)]
    texts = [[s["completion"] for s in part] for part in sets]
    commas = [sum(", so " in text for text in part) for part in texts]
    assert commas[0] < 18 < commas[1]
    alike = sum(a == b for a, b in zip(*texts, strict=True))
    assert 0 < alike < 8
    # Stage 1 reads it.
    stage1 = changed(settings, "train", stage="offline")
    stage1 = changed(stage1, "offline", path=wrong["path"])
    rows = next(load_setup(stage1, tmp_path).stream(stage1))
    assert rows.segments.max(axis=1).sum() == 8


def test_only_tasks_with_a_rule_are_solved(settings, tmp_path, world_cache):
    for plain in (
        settings_with(world_cache),
        settings_with(data__source=gym.SOURCE, data__path="gcd(size=9)"),
    ):
        line = refusal_of(lambda s=plain: worked.solve(s, tmp_path / "no"))
        assert "the path chain_sum or leg_counting with options" in line
    assert not (tmp_path / "no").exists()

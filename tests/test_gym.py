"""Problems of reasoning-gym: read, held apart and graded."""

import os
import sys
from pathlib import Path

import pytest
from small_run import refusal_of

from topd_jax.data import gym
from topd_jax.data.settings import DataSettings, WorldSettings
from topd_jax.data.sources import read_records, read_source
from topd_jax.evaluation.benchmarking import read_benchmark
from topd_jax.evaluation.grading import grade_answers

TASK = "chain_sum(min_terms=2, max_terms=3, max_digits=1, size={}, seed={})"


@pytest.fixture(autouse=True, scope="module", params=["stand_in", "package"])
def package(request):
    """What is imported as reasoning_gym, here and in workers."""
    with pytest.MonkeyPatch.context() as patch:
        for name in [n for n in sys.modules if n.startswith("reasoning_gym")]:
            patch.delitem(sys.modules, name)
        if request.param == "package":
            pytest.importorskip("reasoning_gym")
        else:
            folder = str(Path(__file__).with_name("stand_in"))
            patch.syspath_prepend(folder)
            old = os.environ.get("PYTHONPATH", "")
            patch.setenv("PYTHONPATH", f"{folder}{os.pathsep}{old}")
        gym.open_task.cache_clear()
        yield request.param
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


def test_no_training_prompt_is_held_out():
    def read(**data):
        parts = read_records(
            DataSettings(source=gym.SOURCE, **data), WorldSettings(),
            problems=1, final_problems=1,
        )  # fmt: skip
        train, *held_out = ([r["prompt"] for r in part] for part in parts)
        assert held_out[0] == held_out[1]
        assert not set(train) & set(held_out[0])
        return train, held_out[0]

    whole = [r["prompt"] for r in read_source(gym.SOURCE, TASK.format(90, 0))]
    train, held_out = read(path=TASK.format(90, 0), held_out=7)
    assert held_out + train == whole
    # Half of the seeds are those of training.
    train, held_out = read(
        path=TASK.format(90, 0), eval_path=TASK.format(90, 45)
    )
    assert set(train) == set(whole) - set(held_out)
    assert len(train) < 60


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ("chain_sun", "no dataset 'chain_sun'; the nearest of .* chain_sum"),
        (
            "chain_sum(terms=3)",
            "no option terms; the options of chain_sum: min",
        ),
        ("chain_sum(max_terms=1)", "max_terms=1.*: max_terms must be >= min"),
        ("chain_sum(seed='a')", "reasoning_gym=.*seed='a'.*: "),
        ("chain_sum(", "cannot be read; write NAME or .*, for instance chain_"),
    ],
)
def test_a_task_that_cannot_be_made(task, message):
    for read in (
        read_source,
        lambda source, t: read_benchmark(f"{source}:{t}"),
    ):
        with pytest.raises(ValueError, match=message):
            read(gym.SOURCE, task)


def test_without_the_package(monkeypatch):
    gym.open_task.cache_clear()
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    line = refusal_of(lambda: read_source(gym.SOURCE, "chain_sum"))
    assert "needs the package reasoning-gym" in line
    assert line.endswith("pip install reasoning-gym")


def test_answers_are_graded_by_their_dataset(monkeypatch):
    name, records = read_benchmark(
        f"{gym.SOURCE}:chain_sum(min_digits=4, min_terms=3, size=20)"
    )
    assert name == "chain_sum(min_digits=4, min_terms=3, size=20)"
    numbers = [int(r["answer"]) for r in records]
    assert max(numbers) > 1000
    records = [records[numbers.index(max(numbers))]] * 8
    right = max(numbers)
    monkeypatch.setattr("os.cpu_count", lambda: 1)
    assert (
        grade_answers(
            [r | {"answer": ""} for r in records],  # none is known for some
            [
                f"= 7\n\\boxed{{{right}}}",
                f"\\boxed{{{right:,}}}",
                f"The answer is ${right}$.",
                f"1 + 1 = 2, so it is {right}",
                # For half of it there is credit, which does not count.
                f"\\boxed{{{right} or 5}}",
                f"\\boxed{{{right + 1}}}, not {right}",
                "\\boxed{}",
                "",
            ],
        )
        == [True] * 4 + [False] * 4
    )

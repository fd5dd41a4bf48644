"""``topd solve``: solutions by rule of two tasks of reasoning-gym, for stage 1.

Supervised training on them makes, from any pretrained model, a teacher that
can, and a student with a habit of real errors: in ``chain_sum`` it begins at
the right end, so that 9 - 4 + 2 is 9 - 6; in ``leg_counting`` no animal has
more than four legs. As in the tiny world, the two also differ in surface form,
and the share of problems with the habit says how sure the student is of it.
"""

import pathlib
import random
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from topd_jax.data import gym, vocabulary
from topd_jax.data import solutions as solution_data
from topd_jax.data.solutions import Solution
from topd_jax.parallel import lock
from topd_jax.training.config import Settings
from topd_jax.training.setup import Setup, load_setup

_CONNECTIVES = ("\n", ", so ")
# Probability of the second connective at each step, without and with the habit.
_COMMA = (0.05, 0.8)
# Legs that an animal has at most, by the habit.
_MOST_LEGS = 4

# (lines of a solution, its answer)
Steps = tuple[list[str], int]


def chain_sum(metadata: Mapping[str, Any], habit: bool) -> Steps:
    """Sum one term after the other; by the habit from the right end.

    Args:
      metadata: of the problem; "expression" is "9 - 4 + 2".
      habit: whether to err.

    Returns:
      (["9 - 4 = 5", "5 + 2 = 7"], 7), or (["4 + 2 = 6", "9 - 6 = 3"], 3).
    """
    words, lines = metadata["expression"].split(), []
    while len(words) > 1:
        at = len(words) - 3 if habit else 0
        a, sign, b = words[at : at + 3]
        value = int(a) + int(b) if sign == "+" else int(a) - int(b)
        lines.append(f"{a} {sign} {b} = {value}")
        words[at : at + 3] = [str(value)]
    return lines, int(words[0])


def leg_counting(metadata: Mapping[str, Any], habit: bool) -> Steps:
    """Multiply animal by animal, then sum; by the habit few have many legs.

    Args:
      metadata: of the problem; "animals" is {"dog": 3, "ant": 2}.
      habit: whether to err.

    Returns:
      (["3 dog: 3 * 4 = 12", "2 ant: 2 * 6 = 12", "12 + 12 = 24"], 24).
    """
    # Here, not above: the package is optional.
    from reasoning_gym.arithmetic.leg_counting import ANIMALS

    lines, terms = [], []
    for animal, count in metadata["animals"].items():
        legs = min(ANIMALS[animal], _MOST_LEGS) if habit else ANIMALS[animal]
        lines.append(f"{count} {animal}: {count} * {legs} = {count * legs}")
        terms.append(str(count * legs))
    sums, total = chain_sum({"expression": " + ".join(terms)}, habit=False)
    return lines + sums, total


_RULES: Mapping[str, Callable[[Mapping[str, Any], bool], Steps]] = {
    "chain_sum": chain_sum,
    "leg_counting": leg_counting,
}


def solve(
    settings: Settings, workdir: pathlib.Path, habit: float = 0.0
) -> dict[str, Any]:
    """Write ``WORKDIR/solutions``, one of every training prompt.

    Args:
      settings: of the prompts and the tokenizer.
      workdir: where the set is written.
      habit: share of problems that are solved with the habit, 0..1.

    Returns:
      JSON-able: the set's path, its solutions, and the share that is correct.

    Raises:
      ValueError: for other prompts than those of a task that has a rule, or a
        set there of other settings.
    """
    data = settings.data
    name = data.path.partition("(")[0].strip()
    if data.source != gym.SOURCE or name not in _RULES:
        raise ValueError(
            f"topd solve has no rule for data.path={data.path!r} of "
            f"data.source={data.source!r}; the source must be {gym.SOURCE}, "
            f"the path {' or '.join(_RULES)} with options"
        )
    with lock.held(workdir):
        setup = load_setup(settings, workdir)
        about = {
            "shards": 1,
            "rule": name,
            "habit": habit,
            "seed": settings.seed,
            "tokenizer": vocabulary.fingerprint(setup.tokenizer),
            "prompt_tokens": setup.encoded.fingerprint(),
        }
        files = solution_data.open_set(workdir / "solutions", about)
        if files.missing():
            solutions = _solutions(settings, setup, _RULES[name], habit)
            files.write(0, solutions)
    written = list(files.read(0))
    return {
        "path": str(files.folder),
        "solutions": len(written),
        "exact_match": np.mean([s["correct"] for s in written]).item(),
    }


def _solutions(
    settings: Settings,
    setup: Setup,
    rule: Callable[[Mapping[str, Any], bool], Steps],
    habit: float,
) -> list[Solution]:
    dataset, tokenizer = gym.open_task(settings.data.path), setup.tokenizer
    out = []
    for index, record in enumerate(setup.encoded.records):
        problem = dataset[record["index"]]
        # Of the problem alone: the same in a set of any size.
        rng = random.Random(f"{settings.seed} {record['prompt']}")
        errs = rng.random() < habit
        lines, answer = rule(problem["metadata"], errs)
        text, *more = *lines, f"\\boxed{{{answer}}}"
        for line in more:
            text += _CONNECTIVES[rng.random() < _COMMA[errs]] + line
        ids = [*tokenizer.encode(text), tokenizer.eos_ids[0]]
        out.append(
            Solution(
                index=index,
                sample=0,
                prompt=record["prompt"],
                answer=record["answer"],
                completion=text,
                prompt_tokens=setup.encoded.ids[index],
                completion_tokens=np.asarray(ids, np.int32),
                truncated=False,
                logp_mean=0.0,
                correct=str(answer) == problem["answer"],
            )
        )
    return out

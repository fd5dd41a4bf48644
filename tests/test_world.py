"""The tiny world, and the truth about every token of its solutions."""

import collections
import functools
import random
import re
import types

import numpy as np
import pytest

from topd_jax.data.toy_world import problems, truth

PROBLEM = "6*3+19-4?"
SOLUTION = "= 18+19-4; so get 37-4, then do 37-4: 33; answer 33."
PLAIN = problems.Style((1, 0, 0), (1, 0, 0), (1, 0), (1, 0, 0))


def fork_of(problem: str, text: str, ended: bool = True) -> int | None:
    return truth.fork_index(problem, [*text, *[None] * ended])


def test_arithmetic_by_hand():
    for problem, value in (
        ("6*3+19-4?", 33), ("2+3*4?", 14), ("9-4-3?", 2), ("2*3*4-5?", 19),
        ("7?", 7),
    ):  # fmt: skip
        assert problems.answer(problem) == str(value)
    for a, b, wrong in (
        (18, 9, 17), (95, 17, 102), (8, 9, 17), (12, 25, 37), (199, 1, 190),
    ):  # fmt: skip
        assert problems.add_without_carry(a, b) == wrong
    for text in ("", "3++4?", "3+x?", "3+4=?", "-3+4?"):
        with pytest.raises(ValueError, match="numbers joined by"):
            problems.parse(text)


def test_problems_keep_their_bounds_in_either_order():
    rng = random.Random(0)
    for _ in range(300):
        problem = problems.sample_problem(rng)
        for order in (problems.first_by_precedence, problems.first_from_left):
            expression = problems.parse(problem)
            assert len(expression) == 7
            while len(expression) > 1:
                i = order(expression)
                value = problems.compute(*expression[i - 1 : i + 2])
                assert 0 <= value <= problems.LARGEST_VALUE
                expression = problems.reduce_at(expression, i, value)


def test_problems_have_carries_and_precedence_to_get_wrong():
    sample = problems.problems("train", 400, seed=0)

    def written(*habit: float) -> list[tuple[str, str]]:
        return problems.world_pairs(
            sample, problems.STUDENT_STYLE, problems.Habit(*habit), seed=0
        )

    def right(*habit: float) -> float:
        pairs = written(*habit)
        return np.mean([problems.is_correct(p, t) for p, t in pairs])

    assert written() == written()

    assert right(0.0, 0.0) == 1.0
    assert 0.3 < right(1.0, 0.0) < 0.6
    assert 0.5 < right(0.0, 1.0) < 0.8
    assert 0.4 < right() < 0.6


def test_splits_are_disjoint_and_repeatable():
    for split in problems.SPLITS:
        sample = problems.problems(split, 99, seed=0)
        assert len(set(sample)) == 99
        assert {problems.split_of(p) for p in sample} == {split}
        assert problems.problems(split, 20, seed=0) == sample[:20]
    assert problems.problems("train", 9, 1) != problems.problems("train", 9, 0)
    with pytest.raises(ValueError, match="validation"):
        problems.problems("valid", 1, seed=0)


def test_surface_forms_have_the_frequencies_of_the_style():
    rng = random.Random(0)
    style = problems.STUDENT_STYLE
    text = "".join(problems.solution(PROBLEM, rng, style) for _ in range(1000))
    opened = dict(zip(problems.CONNECTIVES, style.connective, strict=True))
    worded = {"get ": style.phrasing[1], "do ": style.phrasing[2]}
    for form, probability in (opened | worded).items():
        assert text.count(form) / 3000 == pytest.approx(probability, abs=0.04)
    announced = text.count("answer ") / 1000
    assert announced == pytest.approx(style.ending[1], abs=0.05)
    # "do 6x3", in one phrasing of three.
    signs = text.count("x") / (text.count("x") + text.count("*"))
    assert signs == pytest.approx(style.sign[1], abs=0.1)


def test_the_habit_in_full():
    for problem, habit, text in (
        ("2+3*4?", (1.0, 0.0), "= 5*4= 20#20."),
        ("2+3*4?", (0.0, 1.0), "= 2+12= 14#14."),
        ("18+9-4?", (0.0, 1.0), "= 17-4= 13#13."),
        # Without its carry this sum would lead below zero.
        ("18+9-20?", (0.0, 1.0), "= 27-20= 7#7."),
    ):
        rng, habit = random.Random(0), problems.Habit(*habit)
        assert problems.solution(problem, rng, PLAIN, habit) == text


def test_final_answer():
    for text, answer in (
        (SOLUTION, "33"), ("= 33#33.", "33"), ("= 33, done 33. ", "33"),
        ("= 33#33", None), ("#12.= 33", None), ("", None), ("= 33#3.", "3"),
        ("= 33#133.", "133"),
    ):  # fmt: skip
        assert problems.final_answer(text) == answer
        assert problems.is_correct(PROBLEM, text) == (answer == "33")


# --- truth ---------------------------------------------------------------


def test_fork_by_hand():
    for problem, text, fork in (
        (PROBLEM, SOLUTION, None),
        # Several reductions in one step, in any order that holds.
        ("8*2+3*4?", "= 8x2+12= 28#28.", None),
        # The pair that is named must be the pair that is worked out.
        ("8*2+3*4?", "= do 8*2: 16+3x4= 28#28.", None),
        ("8*2+3*4?", "= do 8*2: 8*2+12", len("= do 8*2: ")),
        # Carry dropped. 18+5 is right too, so the fork is the 7 of 17.
        ("18+9-4?", "= 17-4= 13#13.", len("= 1")),
    ):
        assert fork_of(problem, text) == fork


def test_being_cut_off_is_no_fork_and_ending_early_is():
    for length in range(len(SOLUTION)):
        assert fork_of(PROBLEM, SOLUTION[:length], ended=False) is None
        assert fork_of(PROBLEM, SOLUTION[:length]) == length


def test_a_fork_belongs_to_the_token_that_holds_it():
    pieces = ["= ", "1", "8", "+19-4", "= 38", "-4", None]
    assert truth.fork_index(PROBLEM, pieces) == 4
    tokenizer = types.SimpleNamespace(
        eos_ids=(6,), pieces=lambda ids: [pieces[i] or "" for i in ids]
    )
    # A wrong number, a row that is cut off, one that ends early.
    tokens = np.array([[*range(7), 0], [0, 1, 2] + [0] * 5, [0, 6] + [0] * 6])
    mask = np.arange(8) < np.array([[7], [3], [2]])
    ok, fork, after = truth.OK, truth.FORK, truth.AFTER
    right = [ok] * 3 + [after] * 5
    for window, expected in (
        (1, [ok, ok, ok, ok, fork, after, after, after]),
        (3, [ok, ok, fork, fork, fork, after, after, after]),
        (99, [fork, fork, fork, fork, fork, after, after, after]),
    ):
        labels = truth.label_batch(
            [PROBLEM] * 3, tokens, mask, tokenizer, window=window
        )
        assert labels.window[:2].tolist() == [expected, right]
    assert labels.token.tolist() == [
        [ok] * 4 + [fork] + [after] * 3, right, [ok, fork] + [after] * 6
    ]  # fmt: skip
    assert labels.fork.tolist() == [4, 8, 1]


# An independent account of what is correct: every solution of a small
# problem, written out, by text and Python's own arithmetic.


def _single(text: str) -> set[tuple[str, str]]:
    found = set()
    for match in re.finditer(r"(?=(\b\d+[-+*]\d+\b))", text):
        pair, begin = match.group(1), match.start(1)
        value = eval(pair)
        after = text[:begin] + str(value) + text[begin + len(pair) :]
        if value >= 0 and eval(after) == eval(text):
            found.add((pair, after))
    return found


def _closure(texts: set[str]) -> set[str]:
    more = {after for text in texts for _, after in _single(text)}
    return texts if more <= texts else _closure(texts | more)


def _signs(text: str) -> set[str]:
    return {text, text.replace("*", "x")}


@functools.cache
def all_solutions(text: str) -> frozenset[str]:
    if text.isdigit():
        return frozenset({f"#{text}.", f"; answer {text}.", f", done {text}."})
    steps = collections.defaultdict(set)
    for pair, first in _single(text):
        for after in _closure({first}):
            for said in _signs(after):
                steps[after] |= {said, f"get {said}"}
                steps[after] |= {f"do {p}: {said}" for p in _signs(pair)}
    return frozenset(
        opening + said + rest
        for after, wordings in steps.items()
        for said in wordings
        for opening in ("= ", "; so ", ", then ")
        for rest in all_solutions(after)
    )


def small_problems() -> list[str]:
    rng = random.Random(0)
    shorter = [
        re.sub(r"[-+*]\d+\?$", "?", problems.sample_problem(rng))
        for _ in range(60)
    ]
    return [p for p in shorter if re.search(r"\+.*\*|-.*\+|\+.*-", p)][:8]


@pytest.mark.parametrize("problem", small_problems())
def test_forks_are_those_of_the_written_out_language(problem: str):
    language = all_solutions(problem[:-1])
    prefixes = {text[:n] for text in language for n in range(len(text) + 1)}
    rng = random.Random(problem)

    def expected(text: str) -> int | None:
        for n in range(1, len(text) + 1):
            if text[:n] not in prefixes:
                return n - 1
        return None if text in language else len(text)

    texts = []
    for _ in range(40):
        habit = problems.Habit(0.8, 0.8)
        text = problems.solution(problem, rng, problems.STUDENT_STYLE, habit)
        at = rng.randrange(len(text))
        letter = rng.choice("0123456789+-*x=,;:. abdegnorstw#")
        texts += [text, text[:at] + letter + text[at + 1 :], text[:at]]
    forks = [expected(t) for t in texts]
    assert [fork_of(problem, t) for t in texts] == forks
    assert len({f for f in forks if f is not None}) > 5


def test_wrong_solutions_have_a_fork():
    sample = problems.problems("validation", 150, seed=0)
    for style in (problems.TEACHER_STYLE, problems.STUDENT_STYLE):
        for problem, text in problems.world_pairs(sample, style, seed=0):
            assert fork_of(problem, text) is None
    forks = []
    for problem, text in problems.world_pairs(
        sample, problems.STUDENT_STYLE, problems.STUDENT_HABIT, seed=0
    ):
        forks.append(fork_of(problem, text))
        assert (forks[-1] is None) == problems.is_correct(problem, text)
    assert 40 < sum(fork is not None for fork in forks) < 150

"""A tiny world with known ground truth: arithmetic with precedence.

The paper has no such world. A problem is an expression, ``6*3+19-4?``. A
solution rewrites it step by step::

    = 18+19-4; so get 37-4, then do 37-4: 33; answer 33.

Two things vary independently:

* *Surface form*: which connective opens a step, whether the step says what
  it does, which sign stands for multiplication, how the answer is announced.
  Each is drawn at every use, with the probabilities of a :class:`Style`, and
  none of them changes the reasoning.
* *Errors*: a :class:`Habit` ignores precedence, working from left to right,
  and drops carries in sums of several digits.

Teacher and student differ in both, so a disagreement between them is either
surface or a reasoning fork, and :mod:`topd_jax.data.toy_world.truth` says
which.
"""

import dataclasses
import functools
import hashlib
import random
import re
from collections.abc import Callable, Iterator, Sequence

LARGEST_VALUE = 99
SPLITS = ("train", "validation", "test")

CONNECTIVES = ("= ", "; so ", ", then ")
PHRASINGS = ("{after}", "get {after}", "do {pair}: {after}")
SIGNS = ("*", "x")
ENDINGS = ("#{answer}.", "; answer {answer}.", ", done {answer}.")

# Multiplication is twice as likely as either other operator.
_OPERATORS = "+-**"
# A number beside no multiplication has two digits (10..39) with this
# probability, one beside a multiplication (10..19) with the other.
_TWO_DIGITS, _TWO_DIGIT_FACTOR = 0.3, 0.05
_TRIES = 12

_FINAL = re.compile(
    "(?:"
    + "|".join(re.escape(e).replace(r"\{answer\}", r"(\d+)") for e in ENDINGS)
    + r")\s*$"
)

Expression = tuple[int | str, ...]


@dataclasses.dataclass(frozen=True)
class Style:
    """Probabilities of the surface forms, each drawn at every use.

    Attributes:
      connective: of each of ``CONNECTIVES``, which open a step.
      phrasing: of each of ``PHRASINGS``, the wording of a step.
      sign: of each of ``SIGNS``, the sign of multiplication; drawn once for
        each expression that is written.
      ending: of each of ``ENDINGS``, which announce the answer.
    """

    connective: tuple[float, ...]
    phrasing: tuple[float, ...]
    sign: tuple[float, ...]
    ending: tuple[float, ...]


@dataclasses.dataclass(frozen=True)
class Habit:
    """Real errors of reasoning.

    Attributes:
      left_to_right: probability, for each problem, of ignoring precedence.
      drop_carry: probability, for each sum in which a carry goes from one
        column to the next, of dropping its carries.
    """

    left_to_right: float = 0.8
    drop_carry: float = 0.3


# The teacher is nearly certain of its style, so a difference of form costs as
# many nats as a wrong step: the ambiguity that the paper starts from.
TEACHER_STYLE = Style(
    connective=(0.98, 0.015, 0.005),
    phrasing=(0.98, 0.015, 0.005),
    sign=(0.98, 0.02),
    ending=(0.98, 0.015, 0.005),
)
STUDENT_STYLE = Style(
    connective=(0.2, 0.3, 0.5),
    phrasing=(0.35, 0.4, 0.25),
    sign=(0.3, 0.7),
    ending=(0.2, 0.3, 0.5),
)
STUDENT_HABIT = Habit()


def sample_problem(rng: random.Random) -> str:
    """Draw a problem: four numbers, three operators, e.g. ``6*3+19-4?``.

    Every intermediate value, in the correct order and from left to right,
    lies in 0..99, and every product has a factor of 2..9, so that small
    networks learn the world in minutes.

    Args:
      rng: source of randomness.
    """
    while True:
        operators = rng.choices(_OPERATORS, k=3)
        # Redraw numbers before operators: products suit few numbers, and
        # would be rare otherwise.
        for _ in range(_TRIES):
            expression = _sample_expression(rng, operators)
            if _is_easy(expression):
                return write(expression) + "?"


def _sample_expression(rng: random.Random, operators: list[str]) -> Expression:
    padded = ["+", *operators, "+"]
    expression: Expression = ()
    for i, following in enumerate(padded[1:]):
        factor = "*" in (padded[i], following)
        if rng.random() < (_TWO_DIGIT_FACTOR if factor else _TWO_DIGITS):
            numbers = range(10, 20 if factor else 40)
        else:
            numbers = range(2 if factor else 1, 10)
        (number,) = rng.choices(numbers)
        expression += (number, following)
    return expression[:-1]


def _is_easy(expression: Expression) -> bool:
    for order in (first_by_precedence, first_from_left):
        for a, operator, b in _pairs(expression, order):
            if not 0 <= compute(a, operator, b) <= LARGEST_VALUE:
                return False
            if operator == "*" and not 2 <= min(a, b) <= 9:
                return False
    return True


def _pairs(
    expression: Expression, order: Callable[[Expression], int]
) -> Iterator[Expression]:
    """Yield each ``a operator b`` that is computed, in the given order."""
    while len(expression) > 1:
        i = order(expression)
        pair = expression[i - 1 : i + 2]
        yield pair
        expression = reduce_at(expression, i, compute(*pair))


def parse(problem: str) -> Expression:
    """Return the numbers and operators of a problem, in order.

    Raises:
      ValueError: if the text is not an expression, with the text.
    """
    body = problem.removesuffix("?")
    if not re.fullmatch(r"\d+(?:[-+*]\d+)*", body):
        raise ValueError(
            f"problem {problem!r} is not numbers joined by + - *; "
            "sample_problem makes valid ones"
        )
    parts = re.findall(r"\d+|[-+*]", body)
    return tuple(int(p) if p.isdigit() else p for p in parts)


def write(expression: Expression, sign: str = "*") -> str:
    """Return the text of an expression with a sign of multiplication."""
    text = "".join(map(str, expression))
    return text if sign == "*" else text.replace("*", sign)


def compute(a: int, operator: str, b: int) -> int:
    """Return the value of ``a operator b``."""
    if operator == "*":
        return a * b
    return a + b if operator == "+" else a - b


def reduce_at(expression: Expression, i: int, value: int) -> Expression:
    """Replace operator ``i`` and its two numbers by a value."""
    return expression[: i - 1] + (value,) + expression[i + 2 :]


def first_by_precedence(expression: Expression) -> int:
    """Return the index of the first operator: the leftmost ``*``, or 1."""
    return expression.index("*") if "*" in expression else 1


def first_from_left(expression: Expression) -> int:
    """Return the index of the leftmost operator: the student's habit."""
    return 1


def evaluate(expression: Expression) -> int:
    """Return the correct value of an expression."""
    while len(expression) > 1:
        i = first_by_precedence(expression)
        value = compute(*expression[i - 1 : i + 2])
        expression = reduce_at(expression, i, value)
    return expression[0]


def answer(problem: str) -> str:
    """Return the correct answer of a problem, as text."""
    return str(evaluate(parse(problem)))


def solution(
    problem: str,
    rng: random.Random,
    style: Style,
    habit: Habit | None = None,
    steps: int | None = None,
) -> str:
    """Write a solution, step by step, in a style and with a habit of errors.

    Args:
      problem: a problem's text.
      rng: source of randomness.
      style: probabilities of the surface forms.
      habit: the writer's errors; None writes a correct solution.
      steps: the first ones alone, without the answer; None writes all.

    Returns:
      The text after the problem, without end-of-sequence token.
    """
    expression = parse(problem)
    order = first_by_precedence
    if habit is not None and rng.random() < habit.left_to_right:
        order = first_from_left
    text = ""
    for _ in range(len(expression) // 2 if steps is None else steps):
        i = order(expression)
        pair = expression[i - 1 : i + 2]
        value = compute(*pair)
        if habit is not None and pair[1] == "+":
            slip = add_without_carry(pair[0], pair[2])
            if slip != value and _stays_positive(
                reduce_at(expression, i, slip), order
            ):
                value = slip if rng.random() < habit.drop_carry else value
        expression = reduce_at(expression, i, value)
        (connective,) = rng.choices(CONNECTIVES, style.connective)
        (phrasing,) = rng.choices(PHRASINGS, style.phrasing)
        # Draw both signs in every phrasing: the distribution is the same.
        said, left = rng.choices(SIGNS, style.sign, k=2)
        after = write(expression, left)
        text += connective + phrasing.format(
            pair=write(pair, said), after=after
        )
    if steps is not None:
        return text
    (ending,) = rng.choices(ENDINGS, style.ending)
    return text + ending.format(answer=expression[0])


def privileged(problem: str) -> dict[str, str]:
    """Return what a teacher that sees more may read of a problem.

    Args:
      problem: its text.

    Returns:
      "solution": a correct one in the teacher's style, always the same;
      "hint": its first step.
    """
    write_steps = functools.partial(solution, problem, style=TEACHER_STYLE)
    return {
        "solution": write_steps(rng=random.Random(problem)),
        "hint": write_steps(rng=random.Random(problem), steps=1),
    }


def _stays_positive(
    expression: Expression, order: Callable[[Expression], int]
) -> bool:
    return all(compute(*pair) >= 0 for pair in _pairs(expression, order))


def add_without_carry(a: int, b: int) -> int:
    """Add without passing on carries: 18 + 9 is 17, 95 + 17 is 102.

    The leading column is written in full, so that 8 + 9 is 17.
    """
    total, place = 0, 1
    while max(a, b) >= 10:
        total += (a + b) % 10 * place
        a, b, place = a // 10, b // 10, place * 10
    return total + (a + b) * place


def final_answer(text: str) -> str | None:
    """Return the answer that a solution ends with; None if there is none."""
    match = _FINAL.search(text)
    return next(g for g in match.groups() if g) if match else None


def is_correct(problem: str, text: str) -> bool:
    """Return whether a solution ends with the right answer (exact match)."""
    return final_answer(text) == answer(problem)


def split_of(problem: str) -> str:
    """Return the split of a problem, by a hash of its text.

    80 % are train, 10 % validation, 10 % test. The splits cannot overlap,
    whatever was sampled and in what order.
    """
    digest = hashlib.blake2b(problem.encode(), digest_size=8).digest()
    bucket = int.from_bytes(digest, "big") % 10
    return {8: "validation", 9: "test"}.get(bucket, "train")


@functools.cache  # seconds; the preflight and the run ask for the same
def problems(split: str, count: int, seed: int) -> tuple[str, ...]:
    """Sample distinct problems of a split, the same for the same arguments.

    Args:
      split: "train", "validation" or "test".
      count: how many; the world holds millions.
      seed: of the sample. A longer list starts with the shorter one.

    Raises:
      ValueError: for an unknown split.
    """
    if split not in SPLITS:
        raise ValueError(f"split={split!r}; the world has {SPLITS}")
    rng = random.Random(f"topd world {split} {seed}")
    sample: dict[str, None] = {}
    while len(sample) < count:
        problem = sample_problem(rng)
        if split_of(problem) == split:
            sample[problem] = None
    return tuple(sample)


def world_pairs(
    prompts: Sequence[str],
    style: Style,
    habit: Habit | None = None,
    *,
    seed: int,
) -> list[tuple[str, str]]:
    """Write one solution for each problem, in a style and with a habit.

    Args:
      prompts: the problems.
      style: as in :func:`solution`.
      habit: as there.
      seed: of the draws.

    Returns:
      (problem, solution) pairs.
    """
    rng = random.Random(f"topd solutions {seed}")
    return [(p, solution(p, rng, style, habit)) for p in prompts]

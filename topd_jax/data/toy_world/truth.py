"""Label every token of the tiny world: surface form, or a reasoning fork.

The paper could only infer these labels. Token t is a *fork* if y_{<t} can
still be completed to a correct solution in some surface form and y_{≤t}
cannot. Any other disagreement of two models is surface form. Tokens after a
fork belong to it and are left out of every count.

A nondeterministic automaton over characters decides what can be completed. A
state is the rest of a phrase and the expression that holds after it; at the
end of a phrase, every correct next phrase begins. A step is correct if it
makes one or more reductions, each of two neighboring numbers, each with the
right result and each leaving the value of the whole unchanged. So any order
that precedence allows is correct, and so are several reductions in one step.
"""

import dataclasses
import functools
from collections.abc import Sequence

import numpy as np

from topd_jax.data.tokenizers import Tokenizer
from topd_jax.data.toy_world import problems
from topd_jax.data.toy_world.problems import Expression

#: Labels of tokens: no fork so far; the fork; after the fork.
OK, FORK, AFTER = 0, 1, 2

# (rest of the phrase, the expression after it; None after the answer)
State = tuple[str, Expression | None]


@dataclasses.dataclass(frozen=True)
class TruthLabels:
    """Labels of a batch of completions.

    Attributes:
      token: i8[B, T] ``OK``, ``FORK`` or ``AFTER``; ``AFTER`` outside the
        mask.
      window: i8[B, T] ``FORK`` where the fork lies within the window that
        starts at the token, ``OK`` where it does not, ``AFTER`` after the
        fork and outside the mask.
      fork: i32[B] index of the fork; T where there is none.
    """

    token: np.ndarray
    window: np.ndarray
    fork: np.ndarray


@functools.lru_cache(maxsize=100_000)
def reductions(
    expression: Expression,
) -> tuple[tuple[Expression, Expression], ...]:
    """Return every correct single reduction: (its pair, what is left)."""
    total = problems.evaluate(expression)
    correct = []
    for i in range(1, len(expression), 2):
        pair = expression[i - 1 : i + 2]
        value = problems.compute(*pair)
        after = problems.reduce_at(expression, i, value)
        if value >= 0 and problems.evaluate(after) == total:
            correct.append((pair, after))
    return tuple(correct)


@functools.lru_cache(maxsize=100_000)
def reachable(expression: Expression) -> frozenset[Expression]:
    """Return the expressions that one or more correct reductions lead to."""
    expressions = set()
    for _, after in reductions(expression):
        expressions |= {after} | reachable(after)
    return frozenset(expressions)


@functools.lru_cache(maxsize=100_000)
def phrases(expression: Expression) -> tuple[State, ...]:
    """Return every correct next phrase, with the expression after it.

    Multiplication is written ``*``; texts are compared with this sign.
    """
    if len(expression) == 1:
        number = str(expression[0])
        return tuple((e.format(answer=number), None) for e in problems.ENDINGS)
    # One phrasing names the pair first; the others do not.
    steps = {("", after) for after in reachable(expression)}
    for pair, first in reductions(expression):
        for after in {first} | reachable(first):
            steps.add((problems.write(pair), after))
    states = set()
    for pair, after in steps:
        for phrasing in problems.PHRASINGS:
            if ("{pair}" in phrasing) != bool(pair):
                continue
            text = phrasing.format(pair=pair, after=problems.write(after))
            for connective in problems.CONNECTIVES:
                states.add((connective + text, after))
    # Sorted: the order of a set of texts changes from run to run.
    return tuple(sorted(states))


def _advance(states: frozenset[State], character: str) -> frozenset[State]:
    if character in problems.SIGNS:
        character = problems.SIGNS[0]
    after = set()
    for rest, expression in states:
        if rest:
            options = ((rest, expression),)
        else:
            options = phrases(expression) if expression is not None else ()
        for phrase, then in options:
            if phrase[0] == character:
                after.add((phrase[1:], then))
    return frozenset(after)


def fork_index(problem: str, token_pieces: Sequence[str | None]) -> int | None:
    """Return the token at which a solution goes wrong for good.

    Args:
      problem: the problem's text.
      token_pieces: the text of each token of the completion; None for the
        end-of-sequence token, which ends the sequence.

    Returns:
      The index of the first token after which no correct completion is
      left; None if there is always one. Ending before the solution is
      complete is a fork; being cut off is not.
    """
    states = frozenset({("", problems.parse(problem))})
    for index, piece in enumerate(token_pieces):
        if piece is None:
            return None if ("", None) in states else index
        for character in piece:
            states = _advance(states, character)
        if not states:
            return index
    return None


def label_batch(
    problems: Sequence[str],
    tokens: np.ndarray,
    mask: np.ndarray,
    tokenizer: Tokenizer,
    *,
    window: int,
) -> TruthLabels:
    """Label a batch of completions.

    Args:
      problems: B problems.
      tokens: i32[B, T] completions, padded on the right.
      mask: bool[B, T] which tokens exist, end-of-sequence included.
      tokenizer: that wrote the tokens.
      window: K, tokens of a window, the first one included.

    Returns:
      The labels.
    """
    tokens, mask = np.asarray(tokens), np.asarray(mask)
    token, windows = np.full((2, *tokens.shape), AFTER, np.int8)
    fork = np.full(len(tokens), tokens.shape[1], np.int32)
    for row, problem in enumerate(problems):
        ids = tokens[row, mask[row]].tolist()
        ends = set(tokenizer.eos_ids)
        pieces = [
            None if i in ends else piece
            for i, piece in zip(ids, tokenizer.pieces(ids), strict=True)
        ]
        at = fork_index(problem, pieces)
        token[row, : len(ids)] = windows[row, : len(ids)] = OK
        if at is not None:
            fork[row] = at
            token[row, at:] = windows[row, at:] = AFTER
            token[row, at] = FORK
            windows[row, max(at - window + 1, 0) : at + 1] = FORK
    return TruthLabels(token, windows, fork)

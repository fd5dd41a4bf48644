"""Statistics of evaluations with n samples a problem, and of comparisons.

Uncertainty is over problems: an interval resamples problems with all of
their samples (a cluster bootstrap, so that samples of one problem do not
count as independent), and seeds too where runs of several are given.
"""

import functools
from collections import Counter
from collections.abc import Sequence
from math import comb
from typing import Any

import numpy as np
from scipy.stats import binomtest, norm

_RESAMPLES = 4000


def unpack_grades(evaluation: dict[str, Any]) -> np.ndarray:
    """Return which problems of an evaluation's record were right.

    Args:
      evaluation: with "problems", N, and "grades", N bits as hexadecimal text.

    Returns:
      bool[N], in the order of the problems.
    """
    count = evaluation["problems"]
    bits = f"{int(evaluation['grades'], 16):0{count}b}"
    return np.array([bit == "1" for bit in bits])


def bootstrap_interval(values: np.ndarray) -> tuple[float, float]:
    """Return the 95 % bootstrap interval of a mean over seeds and problems.

    Args:
      values: float[S, N], one row a seed: grades, or differences of two runs.

    Returns:
      (low, high): 2.5th and 97.5th percentile of the mean when seeds, then
      problems, are resampled with replacement. One seed less than there are
      is drawn, where there are several: as many would make the mean's variance
      S / (S - 1) times too small (McCarthy and Snowden, 1985).
    """
    of_seeds, of_problems = _resampled(*values.shape)
    # All seeds share the drawn problems.
    sums = np.sum(of_seeds * (of_problems @ values.T), axis=1)
    means = sums / (of_seeds[0].sum() * values.shape[1])
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


@functools.lru_cache(1)  # 32 MB, of which a report asks dozens of times
def _resampled(seeds: int, problems: int) -> tuple[np.ndarray, np.ndarray]:
    """Return how often resamples draw each seed, and each problem."""
    rng = np.random.default_rng(0)

    def counts(of: int, draws: int) -> np.ndarray:
        out = np.empty((_RESAMPLES, of))
        for row in out:
            row[:] = np.bincount(rng.integers(of, size=draws), minlength=of)
        return out

    return counts(seeds, max(seeds - 1, 1)), counts(problems, problems)


def normal_p(value: float, interval: tuple[float, float]) -> float:
    """Return the two-sided p of a value against 0.

    Args:
      value: an estimate.
      interval: its 95 % interval, taken as that of a normal distribution.

    Returns:
      0..1.
    """
    low, high = interval
    error = max((high - low) / (2 * norm.ppf(0.975)), 1e-12)
    return 2 * float(norm.sf(abs(value) / error))


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjust p values for their number by Holm's step-down method (1979).

    Args:
      p_values: N of them, 0..1.

    Returns:
      N adjusted values, in the same order.
    """
    p = np.asarray(p_values, dtype=float)
    order = np.argsort(p)
    scaled = p[order] * np.arange(p.size, 0, -1)
    adjusted = np.empty_like(p)
    adjusted[order] = np.maximum.accumulate(np.minimum(scaled, 1.0))
    return adjusted.tolist()


def pass_at_k(samples: int, right: int, k: int) -> float:
    """Estimate, without bias, that one of k samples is right.

    ``1 - C(n - c, k) / C(n, k)`` (Chen et al., arXiv:2107.03374, eq. 1).

    Args:
      samples: n, how many were drawn.
      right: c, how many of them are right.
      k: 1..n.

    Returns:
      0..1.
    """
    return 1.0 - comb(samples - right, k) / comb(samples, k)


def majority(answers: Sequence[str], right: Sequence[bool]) -> float:
    """Return whether the majority answer is right (Wang et al., 2203.11171).

    Right answers count as one whatever their spelling, wrong ones as their
    spelling has it. Samples without an answer do not vote. Among equally
    frequent answers one is taken by lot: the probability is returned.

    Args:
      answers: of each sample; "" for none.
      right: of each sample.

    Returns:
      0..1; 0 where no sample has an answer.
    """
    votes = Counter(
        (True, "") if ok else (False, answer)
        for answer, ok in zip(answers, right, strict=True)
        if ok or answer
    )
    if not votes:
        return 0.0
    most = max(votes.values())
    return float(votes[True, ""] == most) / sum(
        v == most for v in votes.values()
    )


def summarize(problems: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the numbers of one benchmark.

    Args:
      problems: one a problem, with "right" (n bools), "answers" (n texts),
        "lengths" (n, tokens) and "cut" (n bools).

    Returns:
      JSON-able: "problems" and "samples"; "pass@k" for k = 1, 2, 4, .. n and
      "maj@n", each with "value" and its 95 % "interval" over problems; "runs",
      the accuracy of each of the n passes over the problems; "length_mean",
      tokens; "cut_off", the share that reached the limit; "no_answer".
    """
    n = len(problems[0]["right"])
    right = np.array([p["right"] for p in problems], dtype=float)
    ks = sorted({n, *(1 << i for i in range(n.bit_length()))})
    numbers = {
        f"pass@{k}": [pass_at_k(n, sum(p["right"]), k) for p in problems]
        for k in ks
    }
    numbers[f"maj@{n}"] = [majority(p["answers"], p["right"]) for p in problems]
    return {
        "problems": len(problems),
        "samples": n,
        **{
            name: {
                "value": float(np.mean(values)),
                "interval": bootstrap_interval(np.array([values])),
            }
            for name, values in numbers.items()
        },
        "runs": right.mean(axis=0).tolist(),
        "length_mean": _mean(problems, "lengths"),
        "cut_off": _mean(problems, "cut"),
        "no_answer": float(
            np.mean([[not a for a in p["answers"]] for p in problems])
        ),
    }


def _mean(problems: Sequence[dict[str, Any]], name: str) -> float:
    return float(np.mean([p[name] for p in problems]))


def compare(
    a: Sequence[Sequence[dict[str, Any]]],
    b: Sequence[Sequence[dict[str, Any]]],
) -> dict[str, Any]:
    """Compare two methods on the same problems, problem by problem.

    Args:
      a: the first method's runs, one a seed, of problems as in
        :func:`summarize`.
      b: the second's, as many seeds, of the same problems in the same order.

    Returns:
      JSON-able: "pass@1" of each and the "difference" b - a with its paired
      bootstrap "interval" over problems (and seeds where several); McNemar's
      exact p of majority answers, with "only_a" and "only_b", how many problems
      just one of them solves, of several seeds in more runs than the other (an
      undecided vote counts as wrong).
    """
    rates_a, rates_b = (
        np.array([[np.mean(p["right"]) for p in run] for run in runs])
        for runs in (a, b)
    )
    votes_a, votes_b = (
        np.array(
            [[majority(p["answers"], p["right"]) == 1 for p in r] for r in runs]
        )
        for runs in (a, b)
    )
    # A problem counts once: its answers in several runs are no others.
    only_a = int((votes_a.sum(axis=0) > votes_b.sum(axis=0)).sum())
    only_b = int((votes_b.sum(axis=0) > votes_a.sum(axis=0)).sum())
    return {
        "problems": rates_a.shape[1],
        "seeds": rates_a.shape[0],
        "a": float(rates_a.mean()),
        "b": float(rates_b.mean()),
        "difference": float((rates_b - rates_a).mean()),
        "interval": bootstrap_interval(rates_b - rates_a),
        "only_a": only_a,
        "only_b": only_b,
        # Of one coin at least: where none differs p is 1.
        "mcnemar_p": float(binomtest(only_a, max(only_a + only_b, 1)).pvalue),
    }

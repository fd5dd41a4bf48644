"""Numbers of an evaluation, by hand and against brute force."""

import itertools

import numpy as np
import pytest

from topd_jax.evaluation.comparisons import (
    bootstrap_interval,
    compare,
    holm,
    majority,
    normal_p,
    pass_at_k,
    summarize,
    unpack_grades,
)
from topd_jax.evaluation.metrics import accuracy


def draw(seed, share, count=200):
    return np.random.default_rng(seed).random(count) < share


def test_grades_survive_their_packing():
    for grades in ([0], [1], [0, 0, 1, 0], [1, 0, 1, 1, 0, 0, 0, 1, 0]):
        row = {"problems": len(grades), **accuracy([g == 1 for g in grades])}
        np.testing.assert_array_equal(unpack_grades(row), grades)


def test_an_interval_counts_seeds_as_well_as_problems():
    alike = np.tile(draw(1, 0.5)[None].astype(float), (4, 1))
    differing = np.stack([np.full(200, v) for v in (0.2, 0.4, 0.6, 0.8)])
    # Of three draws from four seeds; of four it would be 0.3 to 0.7.
    assert bootstrap_interval(differing) == pytest.approx((4 / 15, 11 / 15))
    once = bootstrap_interval(alike[:1])  # the same problems again
    assert bootstrap_interval(alike) == pytest.approx(once, abs=2e-3)
    assert bootstrap_interval(np.ones((2, 5))) == (1.0, 1.0)


def test_p_of_an_interval_is_that_of_the_normal():
    # Two-sided tails at z = 2 and z = 3.
    for z, p in ((2, 0.0455003), (-3, 0.0026998)):
        interval = (z - 1.959964, z + 1.959964)
        assert normal_p(z, interval) == pytest.approx(p, rel=1e-4)
    assert normal_p(0.1, (0.1, 0.1)) == 0.0


def test_holm_by_hand():
    # Times 3, 2 and 1 in order of size, never falling, at most 1.
    assert holm([0.02, 0.01, 0.3]) == pytest.approx([0.04, 0.03, 0.3])
    assert holm([0.02, 0.018]) == pytest.approx([0.036, 0.036])
    assert holm([0.4, 0.9]) == pytest.approx([0.8, 0.9])
    assert holm([0.6, 0.5]) == [1.0, 1.0]
    assert holm([]) == []


def problem(right, answers=None, lengths=None, cut=None):
    n = len(right)
    return {
        "right": [bool(r) for r in right],
        "answers": answers or ["1" if r else "2" for r in right],
        "lengths": lengths or [4] * n,
        "cut": cut or [False] * n,
    }


@pytest.mark.parametrize(("n", "c", "k"), [(5, 2, 3), (4, 0, 4), (4, 3, 2)])
def test_pass_at_k_is_the_share_of_subsets_with_a_right_one(n, c, k):
    samples = [i < c for i in range(n)]
    subsets = list(itertools.combinations(samples, k))
    share = np.mean([any(s) for s in subsets])
    assert pass_at_k(n, c, k) == pytest.approx(share)


@pytest.mark.parametrize(
    ("answers", "right", "expected"),
    [
        (["7", "8", "8"], [1, 0, 0], 0.0),
        (["1/2", "0.5", "3"], [1, 1, 0], 1.0),  # spellings of what is right
        (["7", "8", "9"], [0, 1, 0], 1 / 3),  # a lot among three
        (["7", "", ""], [1, 0, 0], 1.0),  # no answer, no vote
        (["", ""], [0, 0], 0.0),
    ],
)
def test_majority(answers, right, expected):
    found = majority(answers, [bool(r) for r in right])
    assert found == pytest.approx(expected)


def test_a_summary_by_hand():
    problems = [
        problem([1, 1, 0], lengths=[1, 2, 3]),
        problem([0, 0, 1], lengths=[4, 5, 9], cut=[False, False, True],
                answers=["5", "", "1"]),
    ]  # fmt: skip
    found = summarize(problems)
    assert (found["problems"], found["samples"]) == (2, 3)
    assert found["pass@1"]["value"] == pytest.approx(0.5)
    assert found["pass@2"]["value"] == pytest.approx((1 + 2 / 3) / 2)
    assert found["pass@3"]["value"] == 1.0
    assert found["maj@3"]["value"] == pytest.approx((1 + 0.5) / 2)
    assert found["runs"] == [0.5, 0.5, 0.5]
    assert found["length_mean"] == 4.0
    assert found["cut_off"] == pytest.approx(1 / 6)
    assert found["no_answer"] == pytest.approx(1 / 6)


def test_samples_of_one_problem_do_not_narrow_the_interval():
    solved = draw(0, 0.5, 100)
    once = summarize([problem([s]) for s in solved])
    often = summarize([problem([s] * 16) for s in solved])
    low, high = once["pass@1"]["interval"]
    assert 0.15 < high - low < 0.25  # 4 sqrt(1/4 / 100) = 0.2
    assert often["pass@1"]["interval"] == pytest.approx((low, high))


def test_mcnemar_by_hand():
    # 2 sum_{i <= 1} C(8, i) / 2^8 = 18 / 256; symmetric; capped at 1.
    for only_a, only_b, p in (
        (1, 7, 18 / 256), (7, 1, 18 / 256), (3, 3, 1.0), (0, 0, 1.0),
    ):  # fmt: skip
        a = [problem([i < only_a]) for i in range(20)]
        b = [problem([only_a <= i < only_a + only_b]) for i in range(20)]
        assert compare([a], [b])["mcnemar_p"] == pytest.approx(p)


def test_a_comparison_is_paired():
    # Problems differ much, the runs by 10 problems that only b solves.
    a = [problem([i < 50]) for i in range(100)]
    b = [problem([i < 60]) for i in range(100)]
    found = compare([a], [b])
    assert found["difference"] == pytest.approx(0.1)
    assert (found["only_a"], found["only_b"]) == (0, 10)
    assert found["mcnemar_p"] == pytest.approx(2 / 2**10)
    low, high = found["interval"]
    assert 0.04 <= low < 0.1 < high <= 0.17
    assert compare([a], [a])["interval"] == (0.0, 0.0)


def test_seeds_are_no_problems_of_their_own():
    a = [problem([i < 1]) for i in range(30)]
    b = [problem([1 <= i < 6]) for i in range(30)]
    once = compare([a], [b])
    for key in ("only_a", "only_b", "mcnemar_p"):
        assert compare([a] * 5, [b] * 5)[key] == once[key]
    # Each solves the first problem in one of two runs.
    mixed = compare([a, b], [b, b])
    assert (mixed["only_a"], mixed["only_b"]) == (1, 5)
    # Where seeds disagree about the better one, the interval is wide.
    up = [problem([i < 20]) for i in range(50)]
    none = [problem([0])] * 50
    assert compare([none] * 2, [up] * 2)["interval"][0] > 0.2
    low, high = compare([none, up], [up, none])["interval"]
    assert low < -0.2 and high > 0.2

"""The grader's table: answers as they are usually written, right and wrong."""

from collections import Counter

import pytest

from topd_jax.evaluation.grading import grade_answers

# Reference, completion, whether it is right. The references are of the kinds
# that published benchmarks hold. Not here, because math-verify decides
# otherwise: 2516 for 2516_8 (it takes any base), 3 < x <= 4 for (3, 4].
TABLE = [
    ("5.4 \\text{ cents}", "\\boxed{5.4}", True),
    ("864 \\mbox{ inches}^2", "\\boxed{864}", True),
    ("864 \\mbox{ inches}^2", "\\boxed{864\\text{ square inches}}", True),
    ("90^\\circ", "\\boxed{90}", True),
    ("90^\\circ", "\\boxed{90^{\\circ}}", True),
    ("90", "\\boxed{90^\\circ}", True),
    ("90^\\circ", "The answer is 90 degrees.", True),
    ("\\frac{270}7\\text{ degrees}", "\\boxed{\\frac{270}{7}}", True),
    ("62.5%", "\\boxed{62.5}", True),
    ("62.5%", "\\boxed{62.5\\%}", True),
    ("$8 \\%$", "\\boxed{8\\%}", True),
    ("$8 \\%$", "\\boxed{8}", True),
    ("$8 \\%$", "\\boxed{9\\%}", False),
    ("\\text{Evelyn}", "\\boxed{Evelyn}", True),
    ("\\text{Evelyn}", "\\boxed{\\text{Evelyn}}", True),
    ("\\text{Evelyn}", "\\boxed{\\text{Navin}}", False),
    ("\\text{Evelyn}", "The answer is Evelyn.", True),
    ("\\text{(C)}", "\\boxed{C}", True),
    ("\\text{(C)}", "\\boxed{\\text{(C)}}", True),
    ("\\text{(C)}", "\\boxed{D}", False),
    ("\\text{even}", "\\boxed{odd}", False),
    ("1,-2", "\\boxed{-2,1}", True),
    ("1,-2", "\\boxed{-2}", False),
    ("$69$,$84$", "\\boxed{84, 69}", True),
    ("$69$,$84$", "\\boxed{69} and \\boxed{84}", True),
    ("$69$,$84$", "\\boxed{69}", False),
    ("1,3,5", "The answer is 1, 3, 5.", True),
    ("(2,4)", "\\boxed{(4,2)}", False),
    ("(2,4)", "\\boxed{(2,4)}", True),
    ("(2,4)", "\\boxed{4}", False),
    ("4", "The answer is (2,4)", False),
    ("(3,4]", "\\boxed{(3,4)}", False),
    ("(3,4]", "\\boxed{(3, 4]}", True),
    ("x \\in [-2,7]", "\\boxed{[-2,7]}", True),
    ("x \\in [-2,7]", "\\boxed{[-2,7)}", False),
    ("(0,9) \\cup (9,36)", "\\boxed{(0,9)\\cup(9,36)}", True),
    ("(0,9) \\cup (9,36)", "\\boxed{(0,36)}", False),
    ("\\frac{1}{2}", "\\boxed{0.5}", True),
    ("\\frac{1}{2}", "\\boxed{1/2}", True),
    ("\\frac{1}{2}", "#### 0.5", True),
    ("0.5", "\\boxed{\\frac12}", True),
    ("\\frac43", "\\boxed{1.33}", False),
    ("\\frac43", "\\boxed{\\dfrac{4}{3}}", True),
    ("\\frac43", "\\boxed{1\\frac{1}{3}}", True),
    ("1\\frac{4}{5}", "\\boxed{\\frac{9}{5}}", True),
    ("1\\frac{4}{5}", "\\boxed{1.8}", True),
    ("137 \\frac{1}{2}", "\\boxed{137.5}", True),
    ("10,\\!080", "\\boxed{10080}", True),
    ("10,\\!080", "\\boxed{10,080}", True),
    ("10,\\!080", "\\boxed{10}", False),
    ("58,500", "\\boxed{58500}", True),
    ("58,500", "The answer is 58,500 dollars.", True),
    ("70000", "#### 70,000", True),
    ("70000", "\\boxed{\\$70,000}", True),
    ("\\$32,\\!348", "\\boxed{32348}", True),
    ("\\$18.90", "\\boxed{18.9}", True),
    ("18", "She makes $18 a day. The answer is $18.", True),
    ("18", "#### 18 dollars", True),
    ("18", "#### $18", True),
    ("4.5e33", "\\boxed{4.5 \\times 10^{33}}", True),
    ("4.5e33", "\\boxed{4.5e33}", True),
    ("4.5e33", "\\boxed{4.5 \\times 10^{32}}", False),
    ("1e-5", "\\boxed{10^{-5}}", True),
    ("1e-5", "\\boxed{0.00001}", True),
    (".0000672", "\\boxed{6.72 \\times 10^{-5}}", True),
    ("np.arcsin(10/13)", "\\boxed{\\arcsin(10/13)}", True),
    ("-1./3", "\\boxed{-\\frac{1}{3}}", True),
    ("\\frac{sqrt{7} + 1}{2}", "\\boxed{\\frac{1+\\sqrt{7}}{2}}", True),
    ("x=5", "\\boxed{5}", True),
    ("5", "\\boxed{x=5}", True),
    ("k=1", "\\boxed{2}", False),
    ("y = 2x + 3", "\\boxed{y=3+2x}", True),
    ("y = 2x + 3", "\\boxed{y=3-2x}", False),
    ("2516_8", "\\boxed{2516_8}", True),
    ("2516_8", "\\boxed{2516_{8}}", True),
    ("4210_{5}", "\\boxed{4210_5}", True),
    ("\\begin{pmatrix} -2 \\\\ -14 \\\\ -7 \\end{pmatrix}",
     "\\boxed{\\begin{pmatrix}-2\\\\-14\\\\-7\\end{pmatrix}}", True),
    ("\\begin{pmatrix} -2 \\\\ -14 \\\\ -7 \\end{pmatrix}",
     "\\boxed{\\begin{pmatrix}-2\\\\14\\\\-7\\end{pmatrix}}", False),
    ("1 \\pm \\sqrt{19}", "\\boxed{1+\\sqrt{19}, 1-\\sqrt{19}}", True),
    ("\\{1\\pm\\sqrt{5},-2\\}", "\\boxed{-2, 1+\\sqrt5, 1-\\sqrt5}", True),
    ("$\\frac{1}{2 n+2}$", "\\boxed{\\frac{1}{2(n+1)}}", True),
    ("p - q", "\\boxed{q-p}", False),
    ("p - q", "\\boxed{-q+p}", True),
    ("(a+5)(b+2)", "\\boxed{ab+2a+5b+10}", True),
    ("6 - 5i", "\\boxed{-5i+6}", True),
    ("6 - 5i", "\\boxed{6+5i}", False),
    ("\\frac{\\pi}{2}", "\\boxed{90^\\circ}", False),
    ("\\sqrt{51}", "\\boxed{7.14}", False),
    ("11\\sqrt2", "The answer is $11\\sqrt{2}$.", True),
    ("11\\sqrt2", "The answer is $11\\sqrt{3}$.", False),
    ("72", "The answer is 72. I hope that this helps.", True),
    ("72", "**Answer:** 72", True),
    ("72", "Answer: 72 clips", True),
    ("72", "The answer is 71, not 72.", False),
    ("72", "The final answer is \\boxed{72}. (72 = 6 * 12)", True),
    ("72", "first \\boxed{72}, then no: \\boxed{71}", False),
    ("72", "\\boxed{7", False),
    ("72", "no", False),
    ("-3", "\\boxed{3}", False),
    ("3", "\\boxed{-3}", False),
    ("$(-\\infty, 0) \\cup\\{1\\}$.",
     "\\boxed{(-\\infty,0)\\cup\\{1\\}}", True),
    ("x_{0} \\cos (\\omega t)+$ $\\dot{x}_{0} \\sin (\\omega t) / \\omega",
     "\\boxed{x_{0}\\cos (\\omega t)+\\dot{x}_{0} \\sin (\\omega t) / \\omega}",
     True),
    ("$221,$8$", "\\boxed{221, 8}", True),
    ("+2", "\\boxed{2}", True),
    ("10,11,12,13,14,-2,-1,0,1,2", "\\boxed{-2,-1,0,1,2,10,11,12,13,14}", True),
    ("MR=SRMC", "\\boxed{MR = SRMC}", True),
    ("0.10", "\\boxed{0.1}", True),
    ("$k \\geqslant 2$", "\\boxed{k \\ge 2}", True),
    ("$k \\geqslant 2$", "\\boxed{k \\le 2}", False),
    ("$45^{\\circ}$", "\\boxed{45}", True),
    ("$f(x)=2 x$", "\\boxed{2x}", True),
    ("$f(x)=2 x$", "\\boxed{f(x)=2x}", True),
    ("$f(x)=2 x$", "\\boxed{f(x)=3x}", False),
    ("100", "\\boxed{1{,}00}", False),
]  # fmt: skip
# Each of these costs memory or time without end where nothing stops it.
HOSTILE = [
    "\\boxed{" + "(" * 20_000 + "}",
    "\\boxed{" * 20_000,
    "\\boxed{10000000!!!}",
    "the answer is " + "answer is " * 20_000,
]


@pytest.fixture(scope="module")
def grades():
    records = [
        {"prompt": "?", "answer": r, "index": i, "source": "here"}
        for i, (r, _, _) in enumerate(TABLE)
    ]
    return grade_answers(records, [text for _, text, _ in TABLE])


def test_the_table_is_graded_as_it_says(grades):
    counts = Counter(
        (expected, found == expected)
        for found, (_, _, expected) in zip(grades, TABLE, strict=True)
    )
    for expected, name in ((True, "right"), (False, "wrong")):
        good, bad = counts[expected, True], counts[expected, False]
        print(f"{name} answers: {good} of {good + bad} graded {name}")
    missed = [row for g, row in zip(grades, TABLE, strict=True) if g != row[2]]
    assert missed == []


def test_every_reference_is_its_own_answer():
    references = sorted({r for r, _, _ in TABLE})
    styles = ("so $\\boxed{%s}$.", "The answer is %s.", "1 = 1\n#### %s")
    texts = [style % r for style in styles for r in references]
    records = [
        {"prompt": "?", "answer": r, "index": 0, "source": "here"}
        for _ in styles
        for r in references
    ]
    grades = grade_answers(records, texts)
    assert [t for t, g in zip(texts, grades, strict=True) if not g] == []


def test_hostile_answers_are_wrong_and_the_next_one_is_graded():
    texts = [t for hostile in HOSTILE for t in (hostile, "\\boxed{72}")]
    records = [
        {"prompt": "?", "answer": "72", "index": 0, "source": "here"}
    ] * len(texts)
    assert grade_answers(records, texts, deadline=4.0) == [
        False, True
    ] * len(HOSTILE)  # fmt: skip

"""Grading: answers right and wrong, and answers that will not be graded."""

import resource
import subprocess
import sys

import pytest

from topd_jax.data.settings import DataSettings
from topd_jax.evaluation import grading
from topd_jax.evaluation.answers import is_costly
from topd_jax.evaluation.grading import _is_right, grade_answers

# As GSM8K writes its answers.
GSM8K = "She sold 48/2 = <<48/2=24>>24 clips, 48+24 = 72 in all.\n#### 72"

# Reference, completion, whether it is right. The references are of the kinds
# that published benchmarks hold. Not here, because math-verify decides
# otherwise: 2516 for 2516_8 (it takes any base), 3 < x <= 4 for (3, 4].
TABLE = [
    ("5.4 \\text{ cents}", "\\boxed{5.4}", True),
    ("864 \\mbox{ inches}^2", "\\boxed{864\\text{ square inches}}", True),
    ("90^\\circ", "\\boxed{90}", True),
    ("90", "\\boxed{90^\\circ}", True),
    ("90^\\circ", "The answer is 90 degrees.", True),
    ("\\frac{270}7\\text{ degrees}", "\\boxed{\\frac{270}{7}}", True),
    ("62.5%", "\\boxed{62.5}", True),
    ("$8 \\%$", "\\boxed{8}", True),
    ("$8 \\%$", "\\boxed{9\\%}", False),
    ("\\text{Evelyn}", "\\boxed{Evelyn}", True),
    ("\\text{Evelyn}", "\\boxed{\\text{Navin}}", False),
    ("\\text{Evelyn}", "The answer is Evelyn.", True),
    ("\\text{(C)}", "\\boxed{C}", True),
    ("\\text{(C)}", "\\boxed{D}", False),
    ("1,-2", "\\boxed{-2,1}", True),
    ("$69$,$84$", "\\boxed{69} and \\boxed{84}", True),
    ("$69$,$84$", "\\boxed{69}", False),
    ("1,3,5", "The answer is 1, 3, 5.", True),
    ("(2,4)", "\\boxed{(4,2)}", False),
    ("(2,4)", "\\boxed{4}", False),
    ("4", "The answer is (2,4)", False),
    ("(3,4]", "\\boxed{(3,4)}", False),
    ("x \\in [-2,7]", "\\boxed{[-2,7]}", True),
    ("(0,9) \\cup (9,36)", "\\boxed{(0,9)\\cup(9,36)}", True),
    ("(0,9) \\cup (9,36)", "\\boxed{(0,36)}", False),
    ("\\frac{1}{2}", "\\boxed{1/2}", True),
    ("\\frac{1}{2}", "#### 0.5", True),
    ("0.5", "\\boxed{\\frac12}", True),
    ("\\frac43", "\\boxed{1.33}", False),
    ("\\frac43", "\\boxed{1\\frac{1}{3}}", True),
    ("1\\frac{4}{5}", "\\boxed{1.8}", True),
    ("137 \\frac{1}{2}", "\\boxed{137.5}", True),
    ("10,\\!080", "\\boxed{10,080}", True),
    ("10,\\!080", "\\boxed{10}", False),
    ("58,500", "The answer is 58,500 dollars.", True),
    ("70000", "\\boxed{\\$70,000}", True),
    ("\\$32,\\!348", "\\boxed{32348}", True),
    ("\\$18.90", "\\boxed{18.9}", True),
    ("18", "She makes $18 a day. The answer is $18.", True),
    ("18", "#### $18", True),
    ("4.5e33", "\\boxed{4.5 \\times 10^{33}}", True),
    ("4.5e33", "\\boxed{4.5 \\times 10^{32}}", False),
    ("1e-5", "\\boxed{10^{-5}}", True),
    (".0000672", "\\boxed{6.72 \\times 10^{-5}}", True),
    ("np.arcsin(10/13)", "\\boxed{\\arcsin(10/13)}", True),
    ("-1./3", "\\boxed{-\\frac{1}{3}}", True),
    ("\\frac{sqrt{7} + 1}{2}", "\\boxed{\\frac{1+\\sqrt{7}}{2}}", True),
    ("x=5", "\\boxed{5}", True),
    ("5", "\\boxed{x=5}", True),
    ("y = 2x + 3", "\\boxed{y=3+2x}", True),
    ("y = 2x + 3", "\\boxed{y=3-2x}", False),
    ("2516_8", "\\boxed{2516_{8}}", True),
    ("\\begin{pmatrix} -2 \\\\ -14 \\\\ -7 \\end{pmatrix}",
     "\\boxed{\\begin{pmatrix}-2\\\\-14\\\\-7\\end{pmatrix}}", True),
    ("\\begin{pmatrix} -2 \\\\ -14 \\\\ -7 \\end{pmatrix}",
     "\\boxed{\\begin{pmatrix}-2\\\\14\\\\-7\\end{pmatrix}}", False),
    ("\\{1\\pm\\sqrt{5},-2\\}", "\\boxed{-2, 1+\\sqrt5, 1-\\sqrt5}", True),
    ("$\\frac{1}{2 n+2}$", "\\boxed{\\frac{1}{2(n+1)}}", True),
    ("p - q", "\\boxed{q-p}", False),
    ("(a+5)(b+2)", "\\boxed{ab+2a+5b+10}", True),
    ("6 - 5i", "\\boxed{6+5i}", False),
    ("\\frac{\\pi}{2}", "\\boxed{90^\\circ}", False),
    ("\\sqrt{51}", "\\boxed{7.14}", False),
    ("11\\sqrt2", "The answer is $11\\sqrt{3}$.", False),
    ("72", "The answer is 72. I hope that this helps.", True),
    ("72", "**Answer:** 72", True),
    ("72", "The answer is 71, not 72.", False),
    ("72", "The final answer is \\boxed{72}. (72 = 6 * 12)", True),
    ("72", "first \\boxed{72}, then no: \\boxed{71}", False),
    ("72", "\\boxed{7", False),
    ("-3", "\\boxed{3}", False),
    ("$(-\\infty, 0) \\cup\\{1\\}$.",
     "\\boxed{(-\\infty,0)\\cup\\{1\\}}", True),
    ("x_{0} \\cos (\\omega t)+$ $\\dot{x}_{0} \\sin (\\omega t) / \\omega",
     "\\boxed{x_{0}\\cos (\\omega t)+\\dot{x}_{0} \\sin (\\omega t) / \\omega}",
     True),
    ("$221,$8$", "\\boxed{221, 8}", True),
    ("10,11,12,13,14,-2,-1,0,1,2", "\\boxed{-2,-1,0,1,2,10,11,12,13,14}", True),
    ("$k \\geqslant 2$", "\\boxed{k \\ge 2}", True),
    ("$k \\geqslant 2$", "\\boxed{k \\le 2}", False),
    ("$f(x)=2 x$", "\\boxed{2x}", True),
    ("$f(x)=2 x$", "\\boxed{f(x)=3x}", False),
    ("100", "\\boxed{1{,}00}", False),
    (GSM8K, "Natalia sold 72 clips.", True),
    (GSM8K, "Not 71 but 72", True),
    (GSM8K, "72 minus 1 is \\boxed{71}", False),
    (GSM8K, "", False),
    (GSM8K, "\x00\n\ud800 \\boxed{72}", True),
    ("#### 1,000", "It is $1000$", True),
    # Lists of numbers of three digits are no thousands.
    ("6,28,496", "\\boxed{6, 28, 496}", True),
    ("5, 100", "\\boxed{100, 5}", True),
    ("\\{5,100\\}", "\\boxed{100, 5}", True),
    ("5100", "\\boxed{5, 100}", False),
    ("120,240", "\\boxed{120, 240}", True),
    ("( 0, 100 )", "\\boxed{(0,100)}", True),
    # Small numbers differ by their digits, whatever their decimal places.
    ("1.6 \\times 10^{-19}", "\\boxed{-3.2 \\times 10^{-19}}", False),
    ("6.63e-34", "\\boxed{1.6e-19}", False),
    ("2e-7", "\\boxed{0}", False),
    (".0000672", "\\boxed{6.7 \\times 10^{-5}}", False),
    ("\\{1e-9, 2e-9\\}", "\\boxed{1e-9, 3e-9}", False),
    ("1.6e-19", "\\boxed{16 \\times 10^{-20}}", True),
    ("\\frac{1}{30}", "\\boxed{0.033333}", True),
    ("\\text{(C)}", "The answer is **C**.", True),
    ("\\frac{1}{2}", "The final answer is **1/2**.", True),
    ("\\frac{1}{2}", "The answer is:\n\n\\[\n\\frac{1}{2}\n\\]", True),
    ("\\frac{1}{2}", "The answer is \\[\\frac{1}{2}.\\]", True),
    ("4", "The answer is x > 4", False),
    ("5", "\\boxed{3}\\text{ or }\\boxed{5}", False),
    ("3, 5", "$x = \\boxed{3} \\quad \\text{or} \\quad \\boxed{5}$", True),
    ("(2,4)", "\\boxed{(2,4)}\n\\boxed{(2,4)}", True),
    ("#### 5 #### 6\n", "6", True),
    ("#### 0.5", "It is $\\frac{1}{2}$", True),
    # An order of three things is no product.
    ("BAC", "\\boxed{CAB}", False),
    ("BAC", "\\boxed{\\text{BAC}}", True),
    ("abc", "\\boxed{cba}", True),
    ("5", "\\boxed{€5}", True),
    ("€5", "<answer>5.00</answer>", True),
    ("5", "<answer>5 apples</answer>, 3 are left", True),
    ("7", "\\boxed{7 \\pmod{12}}", True),
    ("7", "\\boxed{8 \\pmod{12}}", False),
    ("7 \\pmod{12}", "\\boxed{7}", True),
    ("7 \\pmod{12}", "\\boxed{x \\equiv 7\\ (\\text{mod } 12)}", True),
    ("7 \\pmod{12}", "\\boxed{7 \\pmod{13}}", False),
    # Words and one number are prose, in a box too; expressions are not.
    ("18", "\\boxed{18 eggs}", True),
    ("18", "\\boxed{\\text{18 dollars per day}}", True),
    ("18", "The answer is 18 km/h", True),
    ("2", "The answer is $2x$.", False),
    ("2", "The answer is 2 or 3", False),
    ("2", "The answer is 2π", False),
    ("3", "The answer is x + 3", False),
    ("2", "The answer is 2:3", False),
    ("72", "The answer is 72 clips in 2 months.", True),
    ("18", "The answer is 18 dollars a day and $126 a week", True),
    ("3", "\\boxed{3!}", False),
    ("5", "\\boxed{5 apples and 3 pears}", False),
    ("2\\sqrt{13}", "\\boxed{2√13}", True),
    ("2", "The answer is 2√3.", False),
    ("\\sqrt{x+1}", "The answer is √(x+1)", True),
    ("(-\\infty, 1)", "\\boxed{(−∞, 1)}", True),
    ("x^2", "\\boxed{x²}", True),
    ("5", "\\boxed{5²}", False),
    ("5", "\\boxed{5 cm²}", True),
    # Mathematics and words after it; the last of several marks counts.
    ("\\frac{3}{4}", "The answer is $\\frac{3}{4}$ dollars.", True),
    ("(1,2)", "The answer is \\((1,2)\\), as required.", True),
    ("x^2+1", "Final Answer: The final answer is $x^2+1$. I hope it is right.",
     True),
    ("3", "The answer is $3$ or $5$.", False),
    ("18", "The answer is 18. I am sure that this answer is correct.", True),
    ("(1,2)", "The answer is (\\(1\\), \\(2\\)).", True),
    ("0.5", "The answer is $50$%", True),
    ("5", "<think>It is \\boxed{4}?</think> Tom has 5 apples.", True),
    ("4", "<think>It is \\boxed{4}?</think> Tom has 5 apples.", False),
    ("3", "The answer is not $3$.", False),
    ("(2,3)", "The answer is the point $(2,3)$.", True),
    ("72", "The answer is\n$$\n72\n$$", True),
    ("\\frac{3}{4}", "The answer is $$\\frac{3}{4}$$ dollars.", True),
]  # fmt: skip
# Of tasks whose graders compare text, and in a box.
TEXTS = [
    ("Yes", "\\text{Yes}"),
    ("2 × 433", "$2 \\times 433$"),
    ("1 2\n3 4", "\\text{1 2\n3 4}"),
    ("1 2\n3 4", "1 2 \\\\ 3 4"),
    ('{"a_b": 1}', '\\{"a\\_b": 1\\}'),
]
# Each of these costs memory or time without end where nothing stops it.
COSTLY = [
    "(" * 20_000,
    "{" * 900 + "1" + "}" * 900,
    "\\frac{1}{" * 200 + "2" + "}" * 200,
    "10000000!!!",
    "9^{9^{9^{9}}}",
    "2^{1000000000}",
    "10^{-999999999}",
    "1e999999999",
    "\\binom{1000000}{500000}",
]
HOSTILE = [
    *(f"\\boxed{{{answer}}}" for answer in COSTLY),
    *(f"The answer is {answer}" for answer in COSTLY),
    "\\boxed{" * 20_000,
    "the answer is " + "answer is " * 20_000,
    "9" * 100_000,
    "72 = 9^9^9^9",
]
# Its terms are summed one by one.
ENDLESS = "\\boxed{(x+y+z)^{300}}"


def record(answer, prompt="?"):
    return {"prompt": prompt, "answer": answer, "index": 0, "source": "here"}


def test_the_table_is_graded_as_it_says():
    """And every reference is its own answer, in each usual place."""
    references = sorted({r for r, _, _ in TABLE if r != GSM8K})
    places = ("so $\\boxed{%s}$.", "The answer is %s.", "1 = 1\n#### %s")
    rows = TABLE + [(r, p % r, True) for p in places for r in references]
    grades = grade_answers(
        [record(r) for r, _, _ in rows], [t for _, t, _ in rows]
    )
    assert [
        row for g, row in zip(grades, rows, strict=True) if g != row[2]
    ] == []


@pytest.mark.parametrize(("answer", "latex"), TEXTS)
def test_a_task_reads_text_without_its_latex(answer, latex, monkeypatch):
    def is_right(task, index, reading):
        if "\\" in reading:
            raise ValueError("as a grader that reads numbers")
        return reading == answer

    monkeypatch.setattr(grading.gym, "is_right", is_right)
    for text, right in ((latex, True), (answer, True), (latex + "0", False)):
        assert _is_right(["task", 0], f"\\boxed{{{text}}}", None) == right


def test_hostile_answers_are_wrong_and_the_next_one_is_graded(monkeypatch):
    """One endless answer costs its deadline, none of them the worker."""
    workers, plain = [], subprocess.run

    def run(*arguments, **options):
        workers.append(plain(*arguments, **options))
        return workers[-1]

    monkeypatch.setattr(subprocess, "run", run)
    texts = [t for bad in (*HOSTILE, ENDLESS) for t in (bad, "$72$")]
    monkeypatch.setattr(grading.os, "cpu_count", lambda: 1)
    grades = grade_answers([record("72")] * len(texts), texts, deadline=2.0)
    assert grades == [False, True] * (len(HOSTILE) + 1)
    assert [w.returncode for w in workers] == [0]


@pytest.mark.parametrize("answer", COSTLY)
def test_a_costly_answer_is_right_where_it_is_spelled_alike(answer):
    assert is_costly(answer)
    if len(answer) < 200:
        texts = [f"\\boxed{{{answer}}}", f"The answer is ${answer}$"]
        assert all(_is_right(answer, text, None) for text in texts)


@pytest.mark.parametrize("answer", sorted({r for r, _, _ in TABLE}))
def test_answers_of_benchmarks_are_not_costly(answer):
    assert not is_costly(answer)
    assert not is_costly("So it costs $5^2, [1,3) (see above)! 72" + answer)


def test_a_worker_imports_no_jax():
    """And it grades where the system allows less memory than it would."""
    code = grading._BEGIN + "sys.exit(5 + ('jax' in sys.modules))"
    least = (grading._MEMORY * 3 // 4,) * 2
    worker = subprocess.run(
        [sys.executable, "-c", code, grading._CHECKOUT, "1"],
        input=b'["72", "\\\\boxed{72}"]\n',
        stdout=subprocess.PIPE,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, least),
    )
    assert worker.stdout.split() == [b"started", b"true"]
    assert worker.returncode == 5


def test_without_a_worker(monkeypatch):
    monkeypatch.setattr(sys, "executable", "/bin/false")
    # None is started where there is nothing to compare.
    assert grade_answers([record("1"), record("")], ["1", "2"]) is None
    assert grade_answers([], []) == []
    with pytest.raises(ChildProcessError, match="math-verify"):
        grade_answers([record("1")], ["1"])


def test_the_source_of_the_prompts_chooses_the_grader():
    world = grading.make_grader(DataSettings(source="world"))
    texts = ["= 7#7.", "= 9#9.", "7"]
    grades = world.grade([record("", "1+2*3?")] * 3, texts)
    assert grades == [True, False, False]
    assert [world.final_answer(t) for t in texts] == ["7", "9", ""]
    other = grading.make_grader(DataSettings(source="jsonl"))
    assert other.grade([record("")], ["7"]) is None
    assert other.final_answer("so \\boxed{7}") == "7"

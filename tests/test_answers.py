"""Where answers stand, and their spellings."""

import pytest

from topd_jax.evaluation.answers import normal, stated_answer


@pytest.mark.parametrize(
    ("text", "stated"),
    [
        ("so \\boxed{\\frac{1}{2}} it is", ("boxed", "\\frac{1}{2}")),
        ("first \\boxed{1}, no: \\boxed{2}", ("boxed", "2")),
        ("$\\boxed{1}$ and $\\boxed{2}$.", ("boxed", "1, 2")),
        ("\\boxed {\\{1,2\\}}", ("boxed", "\\{1,2\\}")),
        ("\\fbox{3}, #### 4", ("boxed", "3")),
        ("the answer is 3. \\boxed{4", ("marked", "3. \\boxed{4")),
        ("1 + 1 = 2\n#### 2\n", ("marked", "2")),
        ("#### Step 1: add\n2 + 3.\nThe answer is 5.", ("marked", "5")),
        ("the answer is 71, no:\n#### 72", ("marked", "72")),
        ("The answer is 72. I hope that helps.", ("marked", "72.")),
        ("\\boxed{ \\boxed{72}", ("boxed", "72")),
        ("\\boxed{a \\boxed{b} c}", ("boxed", "a \\boxed{b} c")),
        ("**Answer:** 7.5\nbye 3", ("marked", "7.5")),
        ("The answer is:\n\n5", ("marked", "5")),
        ("Answer: isosceles", ("marked", "isosceles")),
        ("Answer: The final answer is $(1,2)$", ("marked", "(1,2)")),
        ("the answer is $2x$ apples", ("marked", "2x")),
        ("the answer is $2$ or $3$", ("marked", "$2$ or $3$")),
        ("Answer: area 5", ("marked", "area 5")),
        ("the final answers are 1 and 2", ("marked", "1 and 2")),
        ("71, then 1,072", ("number", "1,072")),
        ("who knows", ("", "")),
        ("<answer>5</answer> of 9", ("marked", "5")),
        ("\\boxed{4} <answer>so \\boxed{5}</answer>", ("boxed", "5")),
        ("<answer>4</answer>, no: \\boxed{5}", ("boxed", "5")),
        ("in <answer> </answer>: \\boxed{5}", ("boxed", "5")),
        ("<answer>The answer is 5.</answer>", ("marked", "5")),
        ("<think>\\boxed{4}?</think>\n\nThe answer is 5.", ("marked", "5")),
        ("<think>so \\boxed{4}</think>\n", ("boxed", "4")),
    ],
)
def test_stated_answer(text, stated):
    how, answer = stated_answer(text)
    assert (how, answer.rstrip(".")) == (stated[0], stated[1].rstrip("."))


@pytest.mark.parametrize(
    "spellings",
    [
        ("\\frac{1}{2}", "\\dfrac12", "$\\tfrac{1}{2}$."),
        ("90^\\circ", "90^{\\circ}", "$90 ^ \\circ$"),
        ("\\text{Evelyn}", "evelyn", "\\textbf{Evelyn}."),
        ("\\text{(C)}", "C", "(C)"),
        ("10,\\!080", "10080", "10,080", "10{,}080", "10{,} 080"),
        ("11,\\! 111,\\! 111,\\! 100", "11111111100"),
        ("8 \\%", "8%"),
        ("4.5e33", "4.5 \\times 10^{33}"),
        ("-1./3", "-1/3"),
        ("\\left(3, \\frac{\\pi}{2}\\right)", "(3,\\frac{\\pi}{2})"),
        ("\\frac{sqrt{7} + 1}{2}", "\\frac{\\sqrt{7}+1}{2}"),
        ("\\$18", "18", "$18$", "**18**"),
        ("2516_8", "2516_{8}"),
        ("k \\geqslant 2", "k \\ge 2"),
    ],
)
def test_spellings_of_one_answer(spellings):
    assert len({normal(s) for s in spellings}) == 1


@pytest.mark.parametrize(
    ("one", "other"),
    [("(1,100)", "1100"), ("1,2", "12"), ("x", "X"), ("\\frac12", "\\frac13"),
     ("\\begin{pmatrix} -2 \\\\ -14 \\end{pmatrix}",
      "\\begin{pmatrix} -2 -14 \\end{pmatrix}"),
     ("(3,4]", "(3,4)"), ("1.5", "15"), ("-3", "3"), ("3.", "0.3")],
)  # fmt: skip
def test_other_answers_keep_apart(one, other):
    assert normal(one) != normal(other)

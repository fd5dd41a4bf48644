"""Find the answer in a solution's text, and normalize its spelling.

This module handles text only: :mod:`topd_jax.evaluation.grading` decides what
is equal. Two answers with the same :func:`normal` are equal; two with
different ones may be.
"""

import re

# A box that opens; an escaped character, which is skipped; a brace.
_BRACES = re.compile(r"\\(?:boxed|fbox)\s*\{|\\[{}\\]|[{}]")
# Characters of the longest answer.
_LONGEST = 2000
# Text between boxes that are parts of one answer.
_JOIN = re.compile(
    r"(?:[\s,;$.{}]|\\(?:text|mbox|q?quad)(?![a-z])|\\[,; ]|and|or)*"
)
_STATED = re.compile(
    r"answers?\W{0,4}\s*(?:is\b|are\b|:|=)[\s:*]*"
    # Answer: The final answer is 5; but not: is 5. This answer is right.
    r"(?:(?:[a-z]+ ){0,3}answers? (?:is|are)\b[\s:*]*)?"
    r"(?:(?:\\[\[(]|\$\$)\s*)?([^\n]+)",
    re.I,
)
# Mathematics among words: the sum $2$ of it, but not $2$ or $3$.
_ENCLOSED = re.compile(
    r"(?:(?!not?\b)[a-z\s]*\$([^$]+)\$"
    r"|(?:(?!not?\b)(?:[a-z\s]*\s)?\\[\[(])?"
    r"((?:(?!\\[\[(]).)+?)(?:\\[)\]]|\$\$))"
    r"(?!\s*(?:and|or|to)\b)[^\d$\\=+*/<>^%]*",
    re.I,
)
# At the end of an answer: 7 \pmod{12}, 7 (mod 12), 7 (\text{mod } 12).
_MODULUS = re.compile(
    r"(?<![\s,(\\])[\s,(\\]*(?:text\s*\{\s*)?\\?[bp]?mod(?![a-z])[\s{}]*(\w+)[\s})$.]*$"
)
# An order of things that letters name; math-verify reads a product.
_ORDER = re.compile("[A-Z]{3,}")
# Where mathematics begins and ends.
_DELIMITERS = re.compile(r"\\?\$|(?<!\\)\\[()\[\]]")
_NUMBER = re.compile(r"-?(?:\d[\d,]*)?\.?\d+(?:/\d+)?(?:e[+-]?\d+)?", re.I)
# What only an exact spelling is compared of: brackets within brackets without
# end, and powers and factorials with more digits than a machine holds.
_DEEPEST = 50
_BRACKETS = re.compile(r"[(\[{]|[)\]}]")
_HUGE = re.compile(
    r"\^[\s{]*[-+]?(?:\d[\d,]{4,}|\d+[\s}]*\^)|\de[-+]?\d{4,}"
    r"|(?:\d{4,}|!)[\s)}]*!|\\binom\s*\{?\d{5,}", re.I,
)  # fmt: skip
_TEXT = re.compile(
    r"\\(?:text|mbox|mathrm|textbf|mathbf|operatorname)\s*\{([^{}]*)\}"
)
# Spellings and their replacements, in the order in which they are applied.
_SPELLINGS = tuple(
    (re.compile(pattern), plain)
    for pattern, plain in (
        (r"\\[dtc]frac", r"\\frac"),
        (r"\\(?:left|right|displaystyle|quad|qquad)(?![a-zA-Z])", ""),
        # 10,\! 080 is one number, which the space does not part.
        (r",\\!\s*(?=\d)", ","),
        # Not the second half of a line break, \\ -14.
        (r"(?<!\\)\\[!,;:> ]", ""),
        (r"[€£¥₹]|\\pounds(?![a-z])", ""),
        (r"√\s*\(([^()]*)\)|√\s*(\d+|\w)", r"\\sqrt{\1\2}"),
        ("∞", r"\\infty "),
        # A square, but not of a unit, 5 cm².
        (r"(?<=[\dxyz)])²", "^2"),
        (r"(?<=[\dxyz)])³", "^3"),
        (r"(?<!\\)%", r"\\%"),
        (r"\^\s*\{?\s*\\circ\s*\}?", r"^\\circ"),
        (r"np\.(?=[a-z])", r"\\"),
        (r"(?<![\\a-z])(?=(?:sqrt|frac|pi)(?![a-z]))", r"\\"),
        (r"\\(?:leqslant|leq)(?![a-z])", r"\\le"),
        (r"\\(?:geqslant|geq)(?![a-z])", r"\\ge"),
        # 4.5e33, as programs write numbers.
        (r"(?<![\w\\])(\d+\.?\d*|\.\d+)e\+?(-?\d+)(?!\w)",
         r"\1 \\times 10^{\2}"),
        # 1,234 and 1{,}234 are one number; 5, 100 and \{5,100\} are two.
        (r"\{,\}\s*", ","),
        (r"(?<![\d.,(\[])(?<!\\\{)([1-9]\d{0,2}(?:,\d{3})+)"
         r"(?![\d,)\]]|\\\})",
         lambda m: m[1].replace(",", "")),
        # \text{5 apples} has a number.
        (r"\\(?:text|mbox|mathrm|textbf)\s*\{\s*(-?\d[^{}]*)\}", r"\1"),
        # -1./3 is a fraction.
        (r"(?<=\d)\.(?=/|$)", ""),
        (r"\s+", " "),
    )
)  # fmt: skip


def stated_answer(text: str) -> tuple[str, str]:
    """Return the answer that a solution states, and how it states it.

    Args:
      text: the solution.

    Returns:
      (how, answer): "boxed" and the content of the last \\boxed (adjacent
      ones are joined by commas); else "marked" and the text after the last
      "####" or "the answer is"; else "number" and the last number; else ""
      and "". What stands between <answer> and </answer>, with no box after
      it, is read in the same way, and is "marked" as a whole if nothing in
      it is. Of what a model thought first, up to </think>, nothing counts
      where anything follows.
    """
    text = said(text)
    boxes = _boxes(text)
    head, _, _ = text.rpartition("</answer>")
    _, opening, tagged = head.rpartition("<answer>")
    is_last = not boxes or boxes[-1][0] < len(head)
    if opening and tagged.strip() and is_last:
        how, answer = stated_answer(tagged)
        is_stated = how in ("boxed", "marked")
        whole = "marked", tagged.strip()[:_LONGEST]
        return (how, answer) if is_stated else whole
    if boxes:
        parts = [boxes[-1]]
        for box in boxes[-2::-1]:
            if not _JOIN.fullmatch(text[box[1] : parts[0][0]]):
                break
            parts.insert(0, box)
        # Some models box their answer again and again.
        return "boxed", ", ".join(dict.fromkeys(p[2] for p in parts))
    *_, stated = None, *_STATED.finditer(text)
    mark = text.rfind("####")
    # Before "the answer is 5" it opens a heading, "#### Step 2: add".
    if mark > (stated.start() if stated else -1):
        return "marked", _line(text[mark + len("####") :])
    if stated:
        return "marked", _line(stated[1])
    numbers = _NUMBER.findall(text)
    return ("number", numbers[-1][:_LONGEST]) if numbers else ("", "")


def said(text: str) -> str:
    """Return what follows a model's thoughts; all where nothing does."""
    *_, after = text.rpartition("</think>")
    return after if after.strip() else text


def plain_latex(answer: str) -> str:
    """Remove what delimits mathematics, and normalize an answer's LaTeX.

    Args:
      answer: of the reference or the solution.

    Returns:
      LaTeX of the same meaning.
    """
    answer = _DELIMITERS.sub("", answer).strip()
    answer = answer.strip("* ").rstrip("*. ")
    for pattern, plain in _SPELLINGS:
        answer = pattern.sub(plain, answer)
    return answer.strip()


def normal(answer: str) -> str:
    """Return a key that is the same for spellings of one answer.

    Args:
      answer: of the reference or the solution.

    Returns:
      The key: no spaces, no text commands, words in lower case; "" for none.
    """
    key = _TEXT.sub(r"\1", plain_latex(answer))
    key = re.sub(r"\s+", "", key).replace("\\%", "%")
    key = re.sub(r"\\frac(\d)(\d)", r"\\frac{\1}{\2}", key)
    key = re.sub(r"\{(\w)\}", r"\1", key)
    choice = re.fullmatch(r"\(([A-Z])\)", key)
    if choice:
        return choice[1]
    return key.lower() if re.fullmatch(r"[A-Za-z]{2,}", key) else key


def plain_text(answer: str) -> str:
    """Remove the LaTeX of an answer that is not mathematics.

    Args:
      answer: as it stands in a box.

    Returns:
      The text that a program would compare: no text commands and no escapes;
      lines, also those that LaTeX breaks, stay.
    """
    text = _TEXT.sub(r"\1", _DELIMITERS.sub("", answer))
    text = re.sub(r" *\\\\ *\n?", "\n", text).replace("\\times", "×")
    return re.sub(r"\\([{}_&#%])", r"\1", text).strip()


def without_modulus(answer: str, reference: str) -> tuple[str, str]:
    """Remove the modulus of two answers, unless each names another.

    Args:
      answer: of the solution.
      reference: the right one.
    """
    pair = answer, reference
    moduli = {m[1] for m in map(_MODULUS.search, pair) if m}
    if len(moduli) > 1:
        return pair
    return _MODULUS.sub("", answer), _MODULUS.sub("", reference)


def are_orders(*answers: str) -> bool:
    """Return whether answers are orders, "BAC", of which none is another.

    Args:
      *answers: as :func:`plain_latex` returns them.
    """
    return all(_ORDER.fullmatch(answer) for answer in answers)


def is_costly(latex: str) -> bool:
    """Return whether computing an answer could take time without end.

    Args:
      latex: of the answer.
    """
    depth = deepest = 0
    for match in _BRACKETS.finditer(latex):
        depth = max(0, depth + (1 if match[0] in "([{" else -1))
        deepest = max(deepest, depth)
    return deepest > _DEEPEST or _HUGE.search(latex) is not None


def _boxes(text: str) -> list[tuple[int, int, str]]:
    """Return (begin, end, content) of each outermost box that is closed.

    Takes linear time, whatever a model wrote.
    """
    boxes, open_ = [], []
    for match in _BRACES.finditer(text):
        if match[0] == "}":
            begin, inside = open_.pop() if open_ else (None, 0)
            if begin is not None:
                while boxes and boxes[-1][0] > begin:
                    boxes.pop()
                content = text[inside : match.start()][:_LONGEST]
                boxes.append((begin, match.end(), content))
        elif match[0].endswith("{") and match[0] != "\\{":
            is_box = match[0] != "{"
            open_.append((match.start() if is_box else None, match.end()))
    return boxes


def _line(text: str) -> str:
    """Return the answer in the first sentence of the first line."""
    line = next((s for s in text.splitlines() if s.strip()), "")
    line = line.strip()[:_LONGEST]
    line = re.split(r"\.\s+(?=[A-Z])", line)[0].strip("* ")
    enclosed = _ENCLOSED.fullmatch(line)
    return enclosed[1] or enclosed[2] if enclosed else line

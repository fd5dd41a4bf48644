"""What a check finds: a level, a sentence, and the way out (ours)."""

import dataclasses
import json
import os
import sys
import textwrap
from collections.abc import Sequence

LEVELS = ("ok", "warning", "error")

_COLOURS = {"ok": "32", "warning": "33", "error": "31"}
_WIDTH = 100


@dataclasses.dataclass(frozen=True)
class Finding:
    """One line of the report.

    Attributes:
      level: "ok", "warning" (the run can be made, and may disappoint) or
        "error" (it must not be made).
      name: of what was looked at, a word or two.
      text: what was found, with its numbers.
      way_out: what to do about it; "" where nothing need be done.
    """

    level: str
    name: str
    text: str
    way_out: str = ""


def ok(name: str, text: str) -> Finding:
    """Nothing to do."""
    return Finding("ok", name, text)


def warning(name: str, text: str, way_out: str) -> Finding:
    """The run can be made, and may disappoint."""
    return Finding("warning", name, text, way_out)


def error(name: str, text: str, way_out: str) -> Finding:
    """The run must not be made."""
    return Finding("error", name, text, way_out)


def refusal(name: str, raised: Exception) -> Finding:
    """An error that was raised; its last clause is the way out."""
    line = " ".join(str(raised).split())
    text, _, way_out = line.rpartition("; ")
    return error(name, text or line, way_out if text else "")


def count(findings: Sequence[Finding], level: str) -> int:
    """How many findings have a level."""
    return sum(f.level == level for f in findings)


def summary(findings: Sequence[Finding]) -> str:
    """How many findings of each level: "7 ok, 1 warning, 0 errors"."""
    numbers = [count(findings, level) for level in LEVELS]
    warnings = "warning" if numbers[1] == 1 else "warnings"
    errors = "error" if numbers[2] == 1 else "errors"
    return f"{numbers[0]} ok, {numbers[1]} {warnings}, {numbers[2]} {errors}"


def lines(findings: Sequence[Finding], *, colour: bool = False) -> str:
    """The report as a terminal shows it.

    Args:
      findings: in the order of the report.
      colour: whether level words are coloured.

    Returns:
      A line a finding, in columns, its way out indented below.
    """
    names = max((len(f.name) for f in findings), default=0)
    indent = " " * (len("warning") + names + 4)
    out = []
    for f in findings:
        level = f.level.ljust(len("warning"))
        if colour:
            level = f"\033[{_COLOURS[f.level]}m{level}\033[0m"
        wrap = dict(width=_WIDTH, subsequent_indent=indent)
        text = textwrap.wrap(f.text, initial_indent=indent, **wrap)
        first = text[0].removeprefix(indent) if text else ""
        out += [f"{level}  {f.name.ljust(names)}  {first}", *text[1:]]
        if f.way_out:
            arrow = f"{indent}-> "
            wrap["subsequent_indent"] = " " * len(arrow)
            out += textwrap.wrap(f.way_out, initial_indent=arrow, **wrap)
    return "\n".join(out)


def show(findings: Sequence[Finding], *, as_json: bool) -> int:
    """Prints the report on stdout, in colour on a terminal.

    Args:
      findings: in the order of the report.
      as_json: as data, not as lines.

    Returns:
      The exit code: 2 where there is an error.
    """
    if as_json:
        print(json.dumps([vars(f) for f in findings], indent=1))
    else:
        colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ
        print(lines(findings, colour=colour))
        print(summary(findings))
    return 2 if count(findings, "error") else 0


def require(findings: Sequence[Finding]) -> None:
    """Refuses to begin a run where there are errors.

    Raises:
      ValueError: with all of them, and their ways out.
    """
    found = [f for f in findings if f.level == "error"]
    if not found:
        return
    named = "; ".join(
        f"{f.name}: {f.text}" + (f" -> {f.way_out}" if f.way_out else "")
        for f in found
    )
    raise ValueError(
        f"preflight: {summary(found).split(', ')[-1]}: {named}; topd doctor "
        "shows every check, --config.train.preflight=False passes over them"
    )

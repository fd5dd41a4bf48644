"""What a check finds: a level, a sentence, and the way out."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from absl import logging

from topd_jax.cli.refusals import is_refusal
from topd_jax.parallel import hosts


@dataclasses.dataclass(frozen=True)
class Finding:
    """One line of the report.

    Attributes:
      level: "ok", "warning" (the run can be made, and may disappoint) or
        "error" (it must not be made).
      name: of what was checked, a word or two.
      text: what was found, with its numbers.
      way_out: what to do about it; "" where nothing need be done.
    """

    level: str
    name: str
    text: str
    way_out: str = ""


def judge(
    name: str, fine: bool, text: str, way_out: str, level: str = "warning"
) -> Finding:
    """Return "ok" without a way out, or another level with it."""
    return Finding("ok", name, text) if fine else Finding(
        level, name, text, way_out
    )  # fmt: skip


def refusal(name: str, raised: Exception) -> Finding:
    """Return an error that was raised; its last clause is the way out."""
    line = " ".join(str(raised).split())
    text, _, way_out = line.rpartition("; ")
    return Finding("error", name, text or line, way_out if text else "")


def attempt(
    findings: list[Finding], name: str, call: Callable[..., Any], *args: Any
) -> Any:
    """Call a function; where it refuses, add that to findings and give None."""
    try:
        return call(*args)
    except (ValueError, OSError) as raised:
        if not is_refusal(raised):
            raise
        findings.append(refusal(name, raised))
        return None


def errors(findings: Sequence[Finding]) -> list[Finding]:
    """Return those with which a run must not begin."""
    return [f for f in findings if f.level == "error"]


def report(findings: Sequence[Finding]) -> str:
    """Lay findings out for a terminal: a line each, its way out below."""
    names = max((len(f.name) for f in findings), default=0)
    lines = []
    for f in findings:
        lines.append(f"{f.level:7}  {f.name.ljust(names)}  {f.text}")
        if f.way_out:
            lines.append(f"{'':{names + 11}}-> {f.way_out}")
    levels = [f.level for f in findings]
    warnings, wrong = levels.count("warning"), levels.count("error")
    return "\n".join([
        *lines,
        f"{levels.count('ok')} ok, {warnings} warning{'s' * (warnings != 1)}, "
        f"{wrong} error{'s' * (wrong != 1)}",
    ])  # fmt: skip


def require(findings: Sequence[Finding]) -> None:
    """Refuse to begin a run where there are errors; log what is a warning.

    Raises:
      ValueError: with all errors, and their ways out.
    """
    for f in findings:
        if f.level == "warning" and hosts.is_first():
            logging.warning(
                "preflight: %s: %s -> %s", f.name, f.text, f.way_out
            )
    wrong = errors(findings)
    if not wrong:
        return
    named = "; ".join(
        f"{f.name}: {f.text}" + (f" -> {f.way_out}" if f.way_out else "")
        for f in wrong
    )
    raise ValueError(
        f"preflight: {len(wrong)} error{'s' * (len(wrong) != 1)}: {named}; "
        "topd doctor shows every check, --config.train.preflight=False skips "
        "them"
    )

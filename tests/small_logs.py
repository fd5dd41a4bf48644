"""What runs leave behind, made up: numbers that a test can follow."""

import html
import json
import re
from pathlib import Path

from topd_jax.experiments.run_records import RunRecords

HOSTILE = "</script><!--<img src=x onerror=alert(1)>\u2028{{ 7 * 7 }}"


def text_of(page: str) -> str:
    """What a page shows: no tags, styles and scripts."""
    page = re.sub(r"<(script|style)\b.*?</\1>", "", page, flags=re.S)
    return html.unescape(re.sub("<[^>]*>", "", page))


def metrics(steps: int, loss: float = 2.0) -> list[dict]:
    """One line a step; every tenth is timed and has the statistics."""
    rows = [
        {
            "step": step, "loss": loss / step, "length_mean": 20.0,
            "num_tokens": 640.0, "skipped": 0.0, "seconds": 0.5,
        }
        for step in range(1, steps + 1)
    ]  # fmt: skip
    for row in rows[9::10]:
        row |= {"reverse_kl": 1.0 / row["step"], "seconds_rollout": 0.25}
    return rows


def evaluation(step: int, right: float, *, final: bool = False) -> dict:
    """One line of ``evals.jsonl``."""
    return {
        "step": step, "final": final, "temperature": 1.0, "problems": 100,
        "exact_match": right, "exact_match_low": right - 0.1,
        "exact_match_high": right + 0.1, "reverse_kl": 1 - right,
        "grades": "f",
    }  # fmt: skip


def answer(
    step: int, problem: str, right: bool | None, *, final: bool = False
) -> dict:
    """One line of ``problems.jsonl``."""
    return {
        "step": step, "final": final, "problem": problem, "answer": "10",
        "completion": f"{problem} at {step}", "right": right,
        "truncated": right is False,
    }  # fmt: skip


def records(name: str = "run", *, steps: int = 40, **changes) -> RunRecords:
    """A finished run with ten evaluations of three problems on the way."""
    stops = range(0, steps + 1, max(steps // 9, 1))
    value = {"value": 0.5, "interval": [0.25, 0.75]}
    gsm = {"summary": {"problems": 9, "pass@1": value}}
    fields = {
        "name": name,
        "settings": {
            "seed": 3,
            "objective": "topd(window=20)",
            "optimizer": {"learning_rate": 1e-3},
            "train": {"steps": steps},
            "world": {"cache": HOSTILE},
        },
        "metrics": metrics(steps),
        "evals": [
            *(evaluation(s, 0.3 + 0.01 * s) for s in stops),
            evaluation(steps, 0.8, final=True),
        ],
        "completions": [
            {"step": s, "prompt": "2+2?", "completion": f"= {s} {HOSTILE}",
             "truncated": s > 10}
            for s in range(10, steps + 1, 10)
        ],
        "problems": [
            answer(s, problem, right)
            for s in stops
            for problem, right in (
                ("learned", s > 0), ("lost", s < steps // 2), (HOSTILE, False),
            )
        ]
        + [answer(steps, "2+8?", True, final=True)],
        "benchmarks": {"best": {"step": 20, "benchmarks": {"gsm": gsm}}},
    }  # fmt: skip
    return RunRecords(**(fields | changes))


def write_run(run: RunRecords, workdir: Path) -> Path:
    """Writes records where ``topd train`` leaves them."""
    workdir.mkdir(parents=True)
    (workdir / "settings.json").write_text(json.dumps(run.settings))
    for name in ("metrics", "evals", "completions", "problems"):
        lines = "".join(json.dumps(r) + "\n" for r in getattr(run, name))
        (workdir / f"{name}.jsonl").write_text(lines)
    for which, found in run.benchmarks.items():
        (workdir / f"eval-{which}.json").write_text(json.dumps(found))
    return workdir

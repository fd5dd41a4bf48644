"""The parent's half: sides in turn, and medians of each round's ratios."""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
# A side compiles as users do, whatever the tests have set.
UNSET = (
    "XLA_FLAGS", "JAX_DISABLE_MOST_OPTIMIZATIONS", "JAX_COMPILATION_CACHE_DIR"
)  # fmt: skip
SET = {
    "JAX_PLATFORMS": "cpu",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "WANDB_DISABLED": "true",
    "TF_CPP_MIN_LOG_LEVEL": "3",
}
PAUSE = 0.1  # s; threads of the side before stop spinning

Row = dict[str, Any]


class Skipped(Exception):
    """Say why a side does not run."""


class Process:
    """Hold a side's process: one repetition for every :meth:`ask`."""

    def __init__(self, side: Any, python: str = "") -> None:
        environment = {k: v for k, v in os.environ.items() if k not in UNSET}
        if not python:
            environment["PYTHONPATH"] = str(ROOT)
        else:
            environment.pop("PYTHONPATH", None)
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115
        self._process = subprocess.Popen(
            [
                python or sys.executable, str(HERE / side.script), side.what,
                json.dumps(dict(side.spec)), side.package,
            ],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=self._errors, env=environment | SET, text=True,
        )  # fmt: skip

    def answer(self) -> Row:
        """Wait for the next answer.

        Raises:
          Skipped: where the side says that it cannot run.
          RuntimeError: with the side's last words, where it ended.
        """
        line = self._process.stdout.readline()
        if not line:
            self._errors.seek(0)
            words = self._errors.read().decode(errors="replace").strip()
            raise RuntimeError(words.rsplit("\n", 1)[-1][-300:] or "ended")
        row = json.loads(line)
        if "skip" in row:
            raise Skipped(row["skip"])
        return row

    def ask(self) -> Row:
        """Let the side make one repetition, and return its row."""
        time.sleep(PAUSE)
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        return self.answer()

    def close(self) -> None:
        """End the process, and wait until it has."""
        self._process.stdin.close()
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()
        self._errors.close()


def medians(rows: list[Row]) -> Row:
    """Return the median of every number that all rows have."""
    return {
        key: round(statistics.median(row[key] for row in rows), 5)
        for key in rows[0]
        if all(isinstance(row.get(key), int | float) for row in rows)
    }


def ratios(told: Mapping[str, list[Row]]) -> Row:
    """Return medians over rounds of ours / theirs, and bound / ours.

    Args:
      told: side -> its rows, one a round.

    Returns:
      "ours/SIDE" and "bound/ours" -> quantity -> ratio; "least/ours" where the
      rest of the work is measured beside its products; of TOPD "least/opd",
      where branches cost no more than their products.
    """
    out = {}
    if {"bound", "rest"} <= set(told):
        rounds = zip(told["bound"], told["rest"], strict=True)
        sums = [{k: a[k] + b[k] for k in a} for a, b in rounds]
        told = {**told, "least": sums}
    if {"opd", "branches"} <= set(told):
        pairs = zip(told["opd"], told["branches"], strict=True)
        out["least/opd"] = medians(
            [{"seconds": 1 + b["seconds"] / a["seconds"]} for a, b in pairs]
        )
    for name, rows in told.items():
        if name in ("ours", "branches", "rest") or "ours" not in told:
            continue
        above, below = "ours", name
        if name in ("bound", "least"):
            above, below = below, above
        shared = set(rows[0]) & set(told["ours"][0]) - {"loss"}
        quotients = [
            {k: a[k] / b[k] for k in sorted(shared)}
            for a, b in zip(told[above], told[below], strict=True)
        ]
        out[f"{above}/{below}"] = medians(quotients)
    return out


def start(
    work: Mapping[str, Any],
    pythons: Mapping[str, str | Exception],
    processes: dict[str, Process],
    out: Row,
) -> dict[str, Row]:
    """Build and warm the sides, one at a time.

    Args:
      work: side -> specification, see ``works``.
      pythons: peer -> interpreter, or why there is none.
      processes: grows by every process that starts.
      out: told what did not run, and versions.

    Returns:
      The first row of every side that is ready; nothing without ours.
    """
    ready: dict[str, Row] = {}
    for name, side in work.items():
        try:
            python = pythons[side.peer] if side.peer else ""
            if isinstance(python, Exception):
                raise Skipped(str(python))
            processes[name] = Process(side, python)
            ready[name] = processes[name].answer()
            if "version" in ready[name]:
                out["versions"][side.package] = ready[name]["version"]
        except Skipped as reason:
            out["skipped"][name] = str(reason)
        except RuntimeError as reason:
            out["failed"][name] = str(reason)
        if "ours" not in ready:
            break
    return ready


def measure(
    work: Mapping[str, Any],
    rounds: int,
    pythons: Mapping[str, str | Exception],
) -> Row:
    """Measure a work, its sides in turn.

    Args:
      work: side -> specification, see ``works``.
      rounds: of all sides; 1 at least.
      pythons: peer -> interpreter, or why there is none.

    Returns:
      The row that is printed; "skipped" holds the sides that did not run,
      "failed" those that ended by themselves.
    """
    processes: dict[str, Process] = {}
    out: Row = {"skipped": {}, "failed": {}, "versions": {}}
    try:
        ready = start(work, pythons, processes, out)
        told: dict[str, list[Row]] = {name: [] for name in ready}
        for number in range(rounds):
            for name in list(told)[:: 1 if number % 2 == 0 else -1]:
                told[name].append(processes[name].ask())
    finally:
        for process in processes.values():
            process.close()
    for name, rows in told.items():
        if "extra_mb" in ready[name] and name != "bound":
            for row in rows:  # of the first repetition, so once
                row["extra_mb"] = max(ready[name]["extra_mb"], 1)
        out[name] = medians(rows)
    out["ratios"] = ratios(told)
    return {key: value for key, value in out.items() if value != {}}

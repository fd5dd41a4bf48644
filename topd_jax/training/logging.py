"""Write what a run logs: JSON lines, TensorBoard, completions.

Metrics leave the jitted step as (sum, count) and are read one step late, so
that the host waits for a step only after the next one has been dispatched.
"""

import json
import math
import os
import pathlib
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from absl import logging

from topd_jax.evaluation.metrics import read_metrics
from topd_jax.parallel import buckets, hosts, lock
from topd_jax.training.watch import Watch
from topd_jax.types import Teacher, Trajectories

# Logs of texts, which are no numbers for TensorBoard.
_TEXTS = ("alarms", "completions", "problems")


class Clock:
    """Time the stages of a step, waiting for each in timed steps alone.

    Attributes:
      times: "seconds_" and a stage's name -> seconds; empty if not timed.
    """

    def __init__(self, timed: bool) -> None:
        """Start.

        Args:
          timed: whether to wait for each stage.
        """
        self.times: dict[str, float] = {}
        self._timed = timed
        self._last = time.perf_counter()

    def __call__(self, name: str, value: Any) -> Any:
        """Time a stage by what it returned, and return that."""
        if self._timed:
            jax.block_until_ready(value)
            now = time.perf_counter()
            self.times[f"seconds_{name}"] = now - self._last
            self._last = now
        return value


class Logs:
    """The log files of one run, written by the first process alone.

    ``metrics.jsonl`` has one line a step, ``evals.jsonl`` one an evaluation,
    ``alarms.jsonl`` one an alarm, ``completions.jsonl`` one a completion,
    ``problems.jsonl`` one a problem that an evaluation wrote down;
    ``tensorboard/`` has the numbers again. Keys that begin with "seconds" or
    "rate" are times; every other number is reproduced bit for bit by the same
    command.

    Attributes:
      evals: the lines of ``evals.jsonl``, known to every process.
      watch: what judges the metrics of every step once they are known.
    """

    def __init__(
        self,
        workdir: pathlib.Path,
        *,
        step: int,
        tensorboard: bool,
        watch: Watch,
    ) -> None:
        """Open the files, cut back to what happened up to ``step``.

        Args:
          workdir: the run's directory; made where it is missing.
          step: the step the run goes on from, -1 for a fresh one.
          tensorboard: whether to write for TensorBoard too.
          watch: of the run.
        """
        workdir.mkdir(parents=True, exist_ok=True)
        self._files = {}
        self._board = None

        def open_files() -> None:
            for name in ("metrics", "evals", *_TEXTS):
                path = workdir / f"{name}.jsonl"
                cut_log(path, step)
                self._files[name] = (
                    buckets.LogParts(path)
                    if buckets.is_in_parts(path)
                    else path.open("a", encoding="utf-8")
                )

        hosts.from_first(open_files)
        self.evals = read_jsonl(workdir / "evals.jsonl")
        if tensorboard and hosts.is_first():
            # Slow to import: where torch is installed, it comes along.
            from topd_jax.training.tensorboard import Board

            self._board = Board(workdir / "tensorboard", step + 1)
        self._pending: tuple[int, dict, dict, float] | None = None
        self.watch = watch
        self._known = -math.inf  # when the last step's numbers were there

    def later(
        self,
        step: int,
        metrics: Mapping[str, Any],
        times: Mapping[str, float],
        started: float,
    ) -> dict[str, float] | None:
        """Keep a step's metrics, and write those of the step before.

        A step's "seconds" pass from when it is started, or the step before
        is known if that is later, until its own metrics are known; statistics
        are not in them.

        Args:
          step: the step just dispatched.
          metrics: name -> (sum, count), arrays still being computed.
          times: "seconds_" and the name of a phase -> seconds.
          started: ``time.perf_counter()`` when its dispatch began.

        Returns:
          The numbers that were written, or None for the first step.
        """
        written = self.flush()
        self._pending = (step, dict(metrics), dict(times), started)
        return written

    def flush(self) -> dict[str, float] | None:
        """Write the step that is kept, if any, and return its numbers."""
        if self._pending is None:
            return None
        step, metrics, times, started = self._pending
        self._pending = None
        row = read_metrics(metrics) | times
        now = time.perf_counter()
        seconds = now - max(started, self._known)
        seconds -= times.get("seconds_statistics", 0.0)
        self._known = now
        row |= {
            "seconds": seconds,
            "rate_tokens": row["num_tokens"] / seconds,
        }
        self.write("metrics", {"step": step, **row})
        for alarm in self.watch.look(step, row):
            line = {"step": step, "alarm": alarm.name, "text": alarm.text}
            self.write("alarms", line)
        return row

    def write(self, name: str, row: Mapping[str, Any]) -> None:
        """Append one line to a log, and its numbers to TensorBoard.

        Raises:
          ValueError: where another process has taken the work directory.
        """
        lock.confirm()
        if name == "evals":
            self.evals.append(dict(row))
        if name in self._files:
            file = self._files[name]
            try:
                file.write(json.dumps(row) + "\n")
                file.flush()
            except OSError as error:
                error.filename = file.name
                raise
        if self._board is not None and name not in _TEXTS:
            for key, value in row.items():
                if isinstance(value, int | float) and key != "step":
                    self._board.add(f"{name}/{key}", value, row["step"])

    def sync(self) -> None:
        """Write what is pending and wait until it is on disk."""
        self.flush()
        lock.confirm()  # a part would take the place of another process's
        for file in self._files.values():
            if isinstance(file, buckets.LogParts):
                file.upload()
            else:
                file.flush()
                os.fsync(file.fileno())
        if self._board is not None:
            self._board.flush()

    def close(self) -> None:
        """Write what is pending and close the files."""
        self.flush()
        lock.confirm()
        for file in self._files.values():
            file.close()
        if self._board is not None:
            self._board.close()


def completion_rows(
    step: int,
    trajectories: Any,
    teachers: Sequence[Teacher],
    decode: Callable[[list[int]], str],
    count: int,
) -> list[dict[str, Any]]:
    """Spell some completions of a batch, for the log.

    Args:
      step: that they were written in.
      trajectories: B rows; rows of solutions have none to spell.
      teachers: of the rows, which are ordered by them.
      decode: ids -> text.
      count: how many completions.

    Returns:
      One JSON-able row a completion.
    """
    if not isinstance(trajectories, Trajectories):
        return []
    rows, found = hosts.on_host(trajectories), []
    size = len(rows.tokens)
    # Rows are ordered by teacher: from all over the batch, if several.
    stride = max(size // max(count, 1), 1) if len(teachers) > 1 else 1
    names = [t.name for t in teachers for _ in range(t.prompts)]
    for i in range(0, min(count * stride, size), stride):
        prompt = rows.prompt[i][rows.prompt_mask[i]].tolist()
        tokens = rows.tokens[i][rows.mask[i]].tolist()
        teacher = names[i * len(names) // size]
        found.append(
            {
                "step": step,
                **({"teacher": teacher} if teacher else {}),
                "prompt": decode(prompt),
                "completion": decode(tokens),
                "truncated": bool(rows.truncated[i]),
            }
        )
    return found


def cut_log(path: pathlib.Path, step: int) -> None:
    """Drop the lines of a JSONL log that are past a step.

    Damaged lines, and one that was cut off while it was written, are dropped
    too, with a warning.

    Args:
      path: the log; nothing happens where it does not exist.
      step: the checkpoint's step; a line's own is its field "step".
    """
    if buckets.is_in_parts(path):
        # From the last one, until one is whole: those before it are too.
        for part in [path / name for name in reversed(buckets.files(path))]:
            text = part.read_bytes()
            kept = _kept(text, step, path)
            if kept == text:
                break
            if kept:
                part.write_bytes(kept)
            else:
                part.unlink()
    elif path.exists():
        fresh = path.with_suffix(path.suffix + ".new")
        fresh.write_bytes(_kept(path.read_bytes(), step, path))
        fresh.replace(path)


def _kept(text: bytes, step: int, path: pathlib.Path) -> bytes:
    """Return the intact lines of a log up to a step."""
    kept, damaged = [], 0
    for line in text.split(b"\n"):
        if not line.strip():
            continue
        try:
            if _read_row(line)["step"] <= step:
                kept.append(line + b"\n")
        except (ValueError, KeyError, TypeError):
            damaged += 1
    if damaged:
        logging.warning("%s: dropped %d damaged line(s)", path, damaged)
    return b"".join(kept)


def read_jsonl(
    path: pathlib.Path, *, torn: bool = False
) -> list[dict[str, Any]]:
    """Read the lines of a JSONL file; [] where it does not exist.

    Args:
      path: of the file.
      torn: whether to pass over a last line without its end, as one who
        reads while another writes has to.

    Raises:
      ValueError: naming the file and the line that is no JSON object.
    """
    # Bytes: half a character may be what has been written of the last line.
    text = buckets.read_log(path)
    if text is None:
        return []
    rows = []
    if torn:
        text = text[: text.rfind(b"\n") + 1]
    for number, line in enumerate(text.split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            rows.append(_read_row(line))
        except ValueError as error:
            raise ValueError(
                f"{path} line {number} {error}; remove the line"
            ) from error
    return rows


def _read_row(line: bytes) -> dict[str, Any]:
    try:
        row = json.loads(line.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"is not JSON ({error})") from error
    if not isinstance(row, dict):
        raise ValueError("is not a JSON object")
    return row

"""What a run writes down: JSON lines, TensorBoard, completions.

Metrics leave the jitted step as (sum, count) and are read one step late, so
that the host waits for a step only after the next one has been dispatched.
"""

import json
import math
import os
import pathlib
import time
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from tensorboardX import SummaryWriter

from topd_jax.parallel import hosts, transfers
from topd_jax.training.checkpointing import cut_log

# Logs of texts, which are no numbers for TensorBoard.
_TEXTS = ("completions", "problems")


class Logs:
    """The log files of one run, written by the first process alone.

    ``metrics.jsonl`` has one line a logged step, ``evals.jsonl`` one an
    evaluation, ``completions.jsonl`` one a completion, ``problems.jsonl`` one
    a problem that an evaluation wrote down; ``tensorboard/`` has the numbers
    again. Keys that begin with "seconds" or "rate" are times;
    every other number is reproduced bit for bit by the same command.

    Attributes:
      evals: the lines of ``evals.jsonl``, known to every process.
      skipped: whether a step that was written skipped its update; whoever
        has looked sets it back.
    """

    def __init__(
        self, workdir: pathlib.Path, *, step: int, tensorboard: bool
    ) -> None:
        """Opens the files, cut back to what happened up to ``step``.

        Args:
          workdir: the run's directory; made where it is missing.
          step: the step the run goes on from, -1 for a fresh one.
          tensorboard: whether to write for TensorBoard too.
        """
        workdir.mkdir(parents=True, exist_ok=True)
        self._files = {}
        self._board = None
        first = hosts.is_first()
        for name in ("metrics", "evals", *_TEXTS):
            path = workdir / f"{name}.jsonl"
            if first:
                cut_log(path, step)
                self._files[name] = path.open("a", encoding="utf-8")
        hosts.meet("logs are cut")
        self.evals = read_jsonl(workdir / "evals.jsonl")
        if tensorboard and first:
            self._board = SummaryWriter(
                str(workdir / "tensorboard"), purge_step=step + 1
            )
        self._pending: tuple[int, dict, dict, float] | None = None
        self.skipped = False
        self._known = -math.inf  # when the last step's numbers were there

    def later(
        self,
        step: int,
        metrics: Mapping[str, Any],
        times: Mapping[str, float],
        started: float,
    ) -> dict[str, float] | None:
        """Keeps a step's metrics, and writes those of the step before.

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
        # Sent now: behind the next step it would wait for that one.
        read = transfers.within_reach(dict(metrics))
        self._pending = (step, read, dict(times), started)
        return written

    def flush(self) -> dict[str, float] | None:
        """Writes the step that is kept, if any, and forces it to disk."""
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
        self.skipped |= bool(row.get("skipped"))
        self.write("metrics", {"step": step, **row})
        return row

    def write(self, name: str, row: Mapping[str, Any]) -> None:
        """Appends one line to a log, and its numbers to TensorBoard."""
        if name == "evals":
            self.evals.append(dict(row))
        if name in self._files:
            file = self._files[name]
            file.write(json.dumps(row) + "\n")
            file.flush()
        if self._board is not None and name not in _TEXTS:
            for key, value in row.items():
                if isinstance(value, int | float) and key != "step":
                    self._board.add_scalar(f"{name}/{key}", value, row["step"])

    def sync(self) -> None:
        """Writes what is pending and waits until it is on disk."""
        self.flush()
        for file in self._files.values():
            file.flush()
            os.fsync(file.fileno())

    def close(self) -> None:
        """Writes what is pending and closes the files."""
        self.flush()
        for file in self._files.values():
            file.close()
        if self._board is not None:
            self._board.close()


def read_metrics(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Waits for metrics and divides each sum by its count.

    Args:
      metrics: name -> (sum, count), scalars on any device.

    Returns:
      name -> number; None where nothing was counted or it is not finite
      (JSON has no NaN).
    """
    host = jax.device_get(dict(metrics))
    out = {}
    for name, (total, count) in host.items():
        value = float(np.float32(total) / np.float32(count)) if count else None
        finite = value is not None and math.isfinite(value)
        out[name] = value if finite else None
    return out


def merge(parts: list[Mapping[str, Any]]) -> dict[str, tuple[float, float]]:
    """Adds up (sum, count) metrics of several batches, on the host.

    Args:
      parts: name -> (sum, count), one mapping a batch.

    Returns:
      name -> (sum, count) over all of them, float64.
    """
    out: dict[str, tuple[float, float]] = {}
    for part in jax.device_get([dict(p) for p in parts]):
        for name, (total, count) in part.items():
            before = out.get(name, (0.0, 0.0))
            out[name] = (before[0] + float(total), before[1] + float(count))
    return out


def read_jsonl(
    path: pathlib.Path, *, torn: bool = False
) -> list[dict[str, Any]]:
    """The lines of a JSONL file; [] where it does not exist.

    Args:
      path: of the file.
      torn: whether to pass over a last line without its end, as one who
        reads while another writes has to.

    Raises:
      ValueError: naming the file and the line that is not JSON.
    """
    if not path.exists():
        return []
    rows = []
    # Bytes: half a character may be what has been written of the last line.
    text = path.read_bytes()
    if torn:
        text = text[: text.rfind(b"\n") + 1]
    lines = text.decode("utf-8").split("\n")
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise ValueError(
                f"{path} line {number} is not JSON ({error}); remove the line"
            ) from error
    return rows

"""Read what a run of ``topd train`` left in its work directory."""

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from topd_jax.models.io.huggingface import read_json
from topd_jax.models.io.runs import SETTINGS
from topd_jax.training.logging import read_jsonl

Row = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class RunRecords:
    """The records of a run; every part but the settings may be empty.

    Attributes:
      name: what the page calls it.
      settings: what ``Settings.to_dict`` gave.
      metrics: lines of ``metrics.jsonl``.
      evals: lines of ``evals.jsonl``.
      completions: lines of ``completions.jsonl``.
      problems: lines of ``problems.jsonl``.
      benchmarks: "latest", "best" or "start" -> its ``eval-WHICH.json``.
    """

    name: str
    settings: Row = dataclasses.field(default_factory=dict)
    metrics: Sequence[Row] = ()
    evals: Sequence[Row] = ()
    completions: Sequence[Row] = ()
    problems: Sequence[Row] = ()
    benchmarks: Mapping[str, Row] = dataclasses.field(default_factory=dict)


def read_run(workdir: pathlib.Path, name: str) -> RunRecords:
    """Read a work directory, whether the run is finished or not.

    Args:
      workdir: the directory.
      name: of the run.

    Returns:
      Its records; a last line that is only half written is skipped.

    Raises:
      ValueError: where there is no run, or a file is not what a run writes.
    """
    path = workdir / SETTINGS
    if not path.is_file():
        raise ValueError(
            f"no run at {workdir}: it has no {SETTINGS}, which topd train "
            "writes first; give the --workdir of topd train"
        )
    return RunRecords(
        name=name,
        settings=read_json(path),
        benchmarks={
            which: read_json(file)
            for which in ("latest", "best", "start")
            if (file := workdir / f"eval-{which}.json").is_file()
        },
        **{
            log: read_jsonl(workdir / f"{log}.jsonl", torn=True)
            for log in ("metrics", "evals", "completions", "problems")
        },
    )

"""``topd eval``: a trained student on test problems or benchmarks."""

import json
import pathlib
from typing import Any

from topd_jax.evaluation import benchmarking
from topd_jax.parallel import hosts
from topd_jax.training.config import Settings
from topd_jax.training.restore import open_run


def evaluate(
    settings: Settings, workdir: pathlib.Path, which: str
) -> dict[str, Any]:
    """Evaluate a trained student on test problems or benchmarks.

    Args:
      settings: of the run; ``settings.eval`` names samples and benchmarks.
      workdir: of the run; ``eval-WHICH.json``, with a record of every
        problem, is written there.
      which: "latest", "best" or "start".

    Returns:
      The evaluation without the records.

    Raises:
      ValueError: for a benchmark that cannot be read, before models are loaded.
    """
    for where in settings.eval.benchmarks:
        benchmarking.read_benchmark(where, split=settings.data.eval_split)
    with open_run(settings, workdir, which) as (setup, student, step):
        evaluation = benchmarking.evaluate_all(
            setup.evaluator(settings), student, settings.data, step
        )
    evaluation["seed"] = settings.seed
    text = json.dumps(evaluation, indent=1)

    def write() -> None:
        workdir.mkdir(parents=True, exist_ok=True)
        (workdir / f"eval-{which}.json").write_text(text)

    hosts.from_first(write)
    return benchmarking.summaries(evaluation)

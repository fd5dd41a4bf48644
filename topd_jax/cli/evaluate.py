"""``topd eval``: a trained student on test problems or benchmarks."""

import hashlib
import json
import pathlib
from typing import Any

from topd_jax.cli.several import code_fingerprint
from topd_jax.evaluation import benchmarking
from topd_jax.models import fingerprint
from topd_jax.parallel import buckets, hosts
from topd_jax.training.config import Settings
from topd_jax.training.restore import open_run


def evaluate(
    settings: Settings, workdir: pathlib.Path, which: str
) -> dict[str, Any]:
    """Evaluate a trained student on test problems or benchmarks.

    A benchmark that an earlier call has finished is read back, where nothing
    has changed that its numbers depend on; the others of the same student stay
    in the file, also where they were answered less or more often.

    Args:
      settings: of the run; ``settings.eval`` names samples and benchmarks.
      workdir: of the run; ``eval-WHICH.json``, with a record of every
        problem, is written there, and ``eval-WHICH.part`` until it is whole.
      which: "latest", "best" or "start".

    Returns:
      The evaluation without the records.

    Raises:
      ValueError: for a benchmark that cannot be read, before models are loaded.
    """
    benchmarks = benchmarking.read_benchmarks(
        settings.eval.benchmarks, split=settings.data.eval_split
    )
    path = workdir / f"eval-{which}.json"
    part = path.with_suffix(".part")
    with open_run(settings, workdir, which) as (setup, student, step):
        facts = settings.to_dict()
        # What each benchmark has of its own is told by its hash.
        samples = facts["eval"].pop("samples")
        del facts["eval"]["benchmarks"], facts["data"]["eval_split"]
        evaluated = _hash(
            code_fingerprint(), facts, fingerprint(student),
            setup.teacher_fingerprints,
            # The chat template and the ends are in no setting.
            setup.tokenizer.chat("?"), setup.tokenizer.eos_ids,
        )  # fmt: skip
        asked = benchmarks or {benchmarking.TEST: setup.test.records}
        made_from = {
            name: _hash(records, samples) for name, records in asked.items()
        }
        found = hosts.from_first(lambda: _finished((path, part), evaluated))
        done = {
            name: benchmark
            for name, (own, benchmark) in found.items()
            if made_from.setdefault(name, own) == own
        }

        def keep(evaluation: dict[str, Any]) -> None:
            about = {"evaluated": evaluated, "made_from": made_from}
            about["seed"] = settings.seed
            text = json.dumps(evaluation | about, indent=1)
            hosts.from_first(lambda: _write(part, text))

        evaluation = benchmarking.evaluate_all(
            setup.evaluator(settings), student, settings.data, step,
            benchmarks=benchmarks, done=done, keep=keep,
        )  # fmt: skip
    keep(evaluation)
    hosts.from_first(lambda: part.replace(path) and None)
    return benchmarking.summaries(evaluation | {"seed": settings.seed})


def _hash(*facts: Any) -> str:
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]


def _write(path: pathlib.Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    buckets.write_whole(path, text)


def _finished(
    paths: tuple[pathlib.Path, ...], evaluated: str
) -> dict[str, Any]:
    """Return name -> (hash of its records, benchmark), of this student."""
    found = {}
    for path in paths:
        try:
            saved = json.loads(path.read_bytes())
            if saved["evaluated"] == evaluated:
                found |= {
                    name: (saved["made_from"][name], benchmark)
                    for name, benchmark in saved["benchmarks"].items()
                }
        except (OSError, ValueError, KeyError, TypeError):
            continue  # none, another's, or of an earlier version
    return found

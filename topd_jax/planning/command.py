"""``topd plan``: the plan, its table, its JSON, and what to change. Ours."""

import json
import os
import pathlib
import sys
import time
from collections.abc import Sequence
from typing import Any

import jax

from topd_jax.planning.plan import Plan, make_plan
from topd_jax.planning.plan_search import Trial, search
from topd_jax.planning.plan_table import table
from topd_jax.training.config import Settings

# libtpu asks for the machine it is on, and complains where that is none.
_NO_TPU = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_STDERR_LOG_LEVEL": "3",
    "TPU_MIN_LOG_LEVEL": "3",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


def plan(
    settings: Settings,
    topology: str,
    *,
    output: str | None = None,
    search_seconds: float = 900,
    explain: int = 0,
) -> str:
    """Plans a run; looks for one that fits where it does not.

    Args:
      settings: of the run.
      topology: TPU kind and shape, "v5e:2x4".
      output: file that the plan is written to as JSON, with what was tried;
        one that ends in ".jsonl" gets a line more.
      search_seconds: to look for a plan that fits; 0 does not look.
      explain: how many of each program's heaviest operations to tell.

    Returns:
      The table, and what to change.

    Raises:
      ValueError: for a topology or model that is not known, or what does not
        divide over the mesh.
    """
    without_a_tpu()
    started = time.perf_counter()

    def say(line: str) -> None:
        passed = time.perf_counter() - started
        print(f"{passed:5.0f} s  {line}", file=sys.stderr, flush=True)

    made = make_plan(settings, topology, say=say, explain=explain)
    text, tried, found = table(made), [], None
    if not made.fits and search_seconds:
        tried, found = search(
            settings, topology, made, seconds=search_seconds, say=say
        )
        text += "\n\n" + advice(tried, found)
        if found is None and settings.teacher_mesh.devices:
            text += (
                "\nteacher_mesh was kept as it is: "
                f"{settings.teacher_mesh.devices} devices; change it, or set "
                "teacher_mesh.devices=0 for one mesh"
            )
    if output is not None:
        record = {
            "plan": made.to_dict(),
            "settings": settings.to_dict(),
            "jax": jax.__version__,
            "tried": [t.to_dict() for t in tried],
            "found": found and found.to_dict(),
        }
        _write(pathlib.Path(output), record)
    return text


def _write(path: pathlib.Path, record: dict[str, Any]) -> None:
    if path.suffix == ".jsonl":  # a collection of plans
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
    else:
        path.write_text(json.dumps(record, indent=1), encoding="utf-8")


def without_a_tpu() -> None:
    """Lets the TPU compiler run on a machine that has none."""
    for name, value in _NO_TPU.items():
        os.environ.setdefault(name, value)
    if "JAX_PLATFORMS" not in os.environ:
        jax.config.update("jax_platforms", "cpu")
    # What is compiled for no device cannot be read back from a cache.
    jax.config.update("jax_enable_compilation_cache", False)


def advice(tried: Sequence[Trial], found: Plan | None) -> str:
    """What was tried, and what to change.

    Args:
      tried: in order.
      found: the plan of the last one, where it fits.
    """
    lines = [f"Tried, the cheapest first ({len(tried)}):"]
    lines += [
        f"  {trial.flags or 'as given'}: {trial.verdict}" for trial in tried
    ]
    if found is None:
        lines.append(
            "nothing that was tried fits; take more chips, shorter rollouts "
            "or fewer rows, or search longer with --search SECONDS"
        )
    else:
        lines += [f"change: {tried[-1].flags}", table(found)]
    return "\n".join(lines)

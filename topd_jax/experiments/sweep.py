"""Every variant on every seed, resumable run by run, then the report.

Each finished run appends one JSON line to a record, with the fingerprint of
its settings; a run that the record already holds is not made again, and one
that was killed goes on from its checkpoint.
"""

import ast
import contextlib
import dataclasses
import json
import os
import pathlib
import platform
import statistics
from collections.abc import Iterator
from typing import Any

import jax
from absl import logging

from topd_jax.evaluation.evaluator import Evaluator
from topd_jax.experiments.report import write_report
from topd_jax.experiments.surrogates import measure_detector
from topd_jax.objectives.objective import VARIANTS
from topd_jax.training.config import Settings, settings_from
from topd_jax.training.logging import read_jsonl
from topd_jax.training.loop import Run
from topd_jax.training.setup import Pair, load_pair


def sweep(settings: Settings, workdir: pathlib.Path) -> dict[str, Any]:
    """Runs what ``settings.sweep`` names and writes tables and pictures.

    Args:
      settings: of every run, but for variant, context and seed.
      workdir: of the sweep; runs in ``workdir/runs``.

    Returns:
      Where the report's files are.

    Raises:
      ValueError: for an unknown variant, or a teacher on its own devices.
    """
    options, devices = settings.sweep, settings.teacher_mesh.devices
    if devices:
        raise ValueError(
            f"teacher_mesh.devices={devices}: a sweep runs on one mesh; set "
            "teacher_mesh.devices=0, or topd train each run"
        )
    settings = _shared_world(settings, workdir)
    runs = list(_runs(settings))  # all of them are checked before the first
    record = pathlib.Path(options.record or workdir / "record.jsonl")
    record.parent.mkdir(parents=True, exist_ok=True)
    _drop_torn_line(record)
    missing = [(n, run) for n, run in runs if not _is_recorded(record, n, run)]
    known = len(runs) - len(missing)
    logging.info("%d of %d runs are in %s", known, len(runs), record)
    if missing:
        pair = load_pair(settings, workdir)
    for name, run in missing:
        row = _run(name, run, workdir, pair)
        row["config"] = _family(settings)
        with record.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
            file.flush()
            os.fsync(file.fileno())
    rows = [r for r in read_jsonl(record) if r["config"] == _family(settings)]
    return write_report(rows, workdir / "report")


def _runs(settings: Settings) -> Iterator[tuple[str, Settings]]:
    """Each run of a sweep, seed by seed: its name and its settings."""
    options = settings.sweep
    for seed in options.seeds:
        at_seed = dataclasses.replace(settings, seed=seed)
        yield "start", at_seed
        yield "teacher", at_seed
        for name in options.variants:
            yield name, with_variant(at_seed, name)


def _drop_torn_line(record: pathlib.Path) -> None:
    """Drops the end of a line that was cut off while it was written."""
    if not record.exists():
        return
    text = record.read_bytes()
    whole = text[: text.rfind(b"\n") + 1]
    if whole != text:
        with contextlib.suppress(ValueError):
            json.loads(text[len(whole) :])
            whole = text + b"\n"  # only its end was missing
        fresh = record.with_suffix(".new")
        fresh.write_bytes(whole)
        fresh.replace(record)


def with_variant(settings: Settings, name: str) -> Settings:
    """Settings as an entry of ``sweep.variants`` changes them.

    Args:
      settings: of the sweep.
      name: "variant", "variant:context", and behind either any number of
        "/key=value": a key of section objective, or "section.key".

    Returns:
      The settings of that run.

    Raises:
      ValueError: for an unknown variant or key, or a value out of bounds.
    """
    head, *changes = name.split("/")
    variant, _, context = head.partition(":")
    if variant not in VARIANTS:
        raise ValueError(
            f"sweep.variants: {name!r} must be one of {', '.join(VARIANTS)}, "
            "with :teacher or :student behind it to set the context, and "
            "/key=value to change a setting"
        )
    tree = settings.to_dict()
    tree["objective"] |= {"variant": variant}
    if context:
        tree["objective"] |= {"context": context}
    for change in changes:
        key, equals, value = change.partition("=")
        if not equals:
            raise ValueError(
                f"sweep.variants: {change!r} in {name!r} must be key=value"
            )
        path = key.split(".")
        if path[0] not in tree:  # "window" is "objective.window"
            path = ["objective", *path]
        place = tree
        for part in path[:-1]:
            place = place.setdefault(part, {})
        place[path[-1]] = _literal(value)
    try:
        return settings_from(tree)
    except ValueError as error:
        raise ValueError(f"sweep.variants: {name!r}: {error}") from error


def _literal(text: str) -> Any:
    with contextlib.suppress(ValueError, SyntaxError):
        return ast.literal_eval(text)
    return text


def _shared_world(settings: Settings, workdir: pathlib.Path) -> Settings:
    cache = settings.world.cache or str(workdir / "world")
    return dataclasses.replace(
        settings, world=dataclasses.replace(settings.world, cache=cache)
    )


def _comparable(settings: Settings) -> Settings:
    """The settings without paths and intervals of writing."""
    plain = dataclasses.replace
    return plain(
        settings,
        world=plain(settings.world, cache=""),
        sweep=type(settings.sweep)(),
        log=type(settings.log)(),
        checkpoint=type(settings.checkpoint)(),
    )


def _family(settings: Settings) -> str:
    """What all runs of one sweep share, as a fingerprint."""
    return dataclasses.replace(
        with_variant(_comparable(settings), "topd:teacher"), seed=0
    ).fingerprint()


def _is_recorded(record: pathlib.Path, name: str, run: Settings) -> bool:
    fingerprint = _comparable(run).fingerprint()
    return any(
        r["name"] == name and r["fingerprint"] == fingerprint
        for r in read_jsonl(record)
    )


def _run(
    name: str, settings: Settings, workdir: pathlib.Path, pair: Pair
) -> dict[str, Any]:
    row: dict[str, Any] = {
        "name": name,
        "seed": settings.seed,
        "fingerprint": _comparable(settings).fingerprint(),
        "machine": machine(),
    }
    if name in ("start", "teacher"):
        with jax.set_mesh(pair.mesh):
            model = pair.student if name == "start" else pair.teacher
            evaluator = Evaluator(settings, pair)
            final = evaluator(model, settings.train.steps, final=True)
            row |= {"evaluation": final} | _greedy(model, settings, pair)
            if name == "start" and settings.data.source == "world":
                row["detector"] = measure_detector(
                    with_variant(settings, "topd:teacher"), pair
                )
        return row
    folder = workdir / "runs" / f"{_file_name(name)}-{settings.seed}"
    with jax.set_mesh(pair.mesh):
        run = Run(settings, folder, pair)
    row["evaluation"] = run.train()
    with jax.set_mesh(pair.mesh):
        row |= _greedy(run.student, settings, pair)
    return row | _curves(folder)


def _file_name(name: str) -> str:
    return name.replace(":", "-").replace("/", "-").replace("=", "_")


def _greedy(model: Any, settings: Settings, pair: Pair) -> dict[str, Any]:
    """Accuracy of greedy decoding, beside the final evaluation."""
    evaluator = Evaluator(settings, pair)
    greedy = evaluator(model, settings.train.steps, final=True, temperature=0.0)
    return {
        "greedy": {
            k: v for k, v in greedy.items() if k.startswith(("exact", "grad"))
        },
    }


def _curves(folder: pathlib.Path) -> dict[str, Any]:
    """What a finished run's logs say, in brief."""
    metrics = read_jsonl(folder / "metrics.jsonl")
    evals = read_jsonl(folder / "evals.jsonl")
    tokens = {0: 0.0}
    for m in metrics:
        tokens[m["step"]] = tokens[m["step"] - 1] + m["num_tokens"]
    # The first steps compile, and those that are timed wait between phases.
    after = metrics[2:] or metrics
    untimed = [m for m in after if "seconds_update" not in m]
    timed = [m for m in metrics if "seconds_update" in m][1:]
    phases = ("rollout", "annotate", "update")
    return {
        "steps": metrics[-1]["step"],
        "tokens": tokens[metrics[-1]["step"]],
        "seconds_step": statistics.median(
            m["seconds"] for m in untimed or after
        ),
        "seconds_phases": {
            p: statistics.median(m[f"seconds_{p}"] for m in timed)
            for p in phases
        }
        if timed
        else {},
        "curve": [
            {
                "step": e["step"],
                "tokens": tokens[e["step"]],
                "exact_match": e["exact_match"],
                "reverse_kl": e["reverse_kl"],
            }
            for e in evals
            if not e["final"]
        ],
    }


def machine() -> str:
    """Processor, cores, devices and JAX, for records."""
    return (
        f"{platform.machine()}, {os.cpu_count()} cores, "
        f"{jax.device_count()} {jax.devices()[0].platform} device(s), "
        f"jax {jax.__version__}"
    )

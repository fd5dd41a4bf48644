"""Checks of models on their mesh, from shapes alone (ours)."""

import math
from collections.abc import Mapping

from jax.sharding import Mesh

from topd_jax.cli.doctor.findings import Finding, error, ok, warning
from topd_jax.models import DecoderConfig, parameter_table
from topd_jax.parallel import sharding
from topd_jax.training.config import Settings


def mesh_fit(
    configs: Mapping[str, DecoderConfig],
    mesh: Mesh,
    theirs: Mesh | None = None,
) -> list[Finding]:
    """Whether every parameter divides among its devices, all by name.

    Args:
      configs: "student" and every teacher.
      mesh: of devices.
      theirs: the teachers' own, where they have one.
    """
    if theirs is not None:
        others = dict(configs)
        ours = {"student": others.pop("student")}
        return [*mesh_fit(ours, mesh), *mesh_fit(others, theirs)]
    found = []
    for who, config in configs.items():
        problems = []
        for name, row in parameter_table(config).items():
            try:
                sharding.named(mesh, row.shape, row.axes, name=name)
            except ValueError as raised:
                problems.append(str(raised).partition("; ")[0])
        if problems:
            more = len(problems) - 3
            text = "; ".join(problems[:3])
            found.append(
                error(
                    "mesh",
                    f"{who}: {text}"
                    + (f"; and {more} more parameters" if more > 0 else ""),
                    "choose mesh axes that divide these sizes",
                )
            )
    if found:
        return found
    axes = " x ".join(f"{n}={s}" for n, s in mesh.shape.items() if s > 1)
    devices = math.prod(mesh.shape.values())
    text = f"{axes} ({devices} devices): all parameters divide"
    return [ok("mesh", text if axes else "1 device")]


def decoding(
    settings: Settings, student: DecoderConfig, mesh: Mesh
) -> list[Finding]:
    """Whether the rollout's sharding leaves the cache where it is.

    Args:
      settings: of the run.
      student: its shape.
      mesh: of devices.
    """
    name = settings.rollout.sharding
    if name == "rows":  # the cache stays
        return []
    axes = sharding.mesh_axes(sharding.DECODING[name]["kv_heads"])
    ways = math.prod(mesh.shape[axis] for axis in axes)
    if name == "train" or student.kv_heads % ways == 0:
        return []
    return [
        warning(
            "decoding",
            f"rollout.sharding={name} spreads {student.kv_heads} kv heads over "
            f"{' x '.join(axes)} = {ways} devices, among which they do not "
            "divide: the cache would be gathered at every token",
            "--config.rollout.sharding=rows, or gathered",
        )
    ]

"""The teacher on devices of its own: the switch, what it refuses, the meshes.

The first devices hold the student, the last ``teacher_mesh.devices`` the
teacher; 0 puts both on one mesh. What then runs where is told in
:mod:`topd_jax.apart`. Ours.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding

from topd_jax import sharding
from topd_jax.objective import Objective


@dataclasses.dataclass(frozen=True)
class TeacherMeshSettings:
    """Devices of the teacher, their mesh axes, and slices of the batch.

    Attributes:
      devices: the teacher's, the last ones; 0: it shares the student's mesh.
      data: as of ``sharding.make_mesh``; as the next three.
      fsdp: see ``data``.
      tensor: see ``data``.
      expert: see ``data``.
      parts: slices of the batch; each is scored while the next is written.
    """

    devices: int = 0
    data: int = -1
    fsdp: int = 1
    tensor: int = 1
    expert: int = 1
    parts: int = 1

    @property
    def axes(self) -> dict[str, int]:
        """Axis -> size, as ``sharding.make_mesh`` takes them."""
        axes = dataclasses.asdict(self)
        return {n: axes[n] for n in axes if n not in ("devices", "parts")}


ONE_MESH = TeacherMeshSettings()


def check(
    settings: TeacherMeshSettings,
    objective: Objective,
    data: Any,
    teachers: Mapping[str, Any],
) -> None:
    """Refuses what a teacher on its own devices cannot do.

    Args:
      settings: the switch.
      objective: of the run.
      data: ``config.data``.
      teachers: ``config.teachers``.

    Raises:
      ValueError: naming the setting that stands against it.
    """
    parts, devices = settings.parts, settings.devices
    if devices < 0 or parts < 1:
        raise ValueError(
            f"teacher_mesh.devices={devices} must be at least 0 and "
            f"teacher_mesh.parts={parts} at least 1"
        )
    if not devices:
        if parts > 1:
            raise ValueError(
                f"teacher_mesh.parts={parts} scores a part of the batch while "
                "the next is written, on other devices; set "
                "teacher_mesh.devices above 0, or parts=1"
            )
        return
    if data.batch_size % parts:
        raise ValueError(
            f"data.batch_size={data.batch_size} must be divisible by "
            f"teacher_mesh.parts={parts}"
        )
    scores = objective.pieces.looks_ahead and objective.score != "teacher_loss"
    for there, what, way_out in (
        (
            teachers, f"config.teachers names {len(teachers)} teachers, which "
            "share the student's mesh", "name one config.teacher",
        ),
        (
            objective.offline, "objective.stage=offline has the teacher write",
            "use on_policy",
        ),
        (
            objective.pieces.weighs,
            f"objective.variant={objective.variant} weighs tokens by both "
            "models at once", "choose another variant",
        ),
        (
            scores, f"objective.score={objective.score} ranks candidates by "
            "both models at once", "use teacher_loss",
        ),
    ):  # fmt: skip
        if there:
            raise ValueError(
                f"teacher_mesh.devices={devices}: {what}; {way_out}, or set "
                "teacher_mesh.devices=0"
            )


def rows_shardings(tree: Any, mesh: Mesh) -> Any:
    """Where arrays [V, D] belong on a mesh, as the parameters they are."""
    partition = sharding.spec(("vocab", "embed"))
    return jax.tree.map(
        lambda x: sharding.coarser(NamedSharding(mesh, partition), x.shape),
        tree,
    )


def row_ways(mesh: Mesh) -> int:
    """How many parts the rows of a batch are spread into.

    Args:
      mesh: as :func:`make_meshes` builds it.
    """
    return math.prod(mesh.shape[axis] for axis in sharding.RULES["batch"])


def make_meshes(
    mesh: Any,
    teacher: TeacherMeshSettings,
    *,
    devices: Sequence[jax.Device] | None = None,
) -> tuple[Mesh, Mesh | None]:
    """The student's mesh, and the teacher's.

    Args:
      mesh: ``config.mesh``, a dataclass of axis sizes.
      teacher: the switch.
      devices: all of ``jax.devices()`` unless told.

    Returns:
      (student's mesh; the teacher's, None where it is the same).

    Raises:
      ValueError: where the axes do not fit the devices, or there are several
        processes.
    """
    devices = list(jax.devices() if devices is None else devices)
    axes, own = dataclasses.asdict(mesh), teacher.devices
    if not own:
        return sharding.make_mesh(**axes, devices=devices), None
    if own >= len(devices):
        raise ValueError(
            f"teacher_mesh.devices={own} must leave the student some of the "
            f"{len(devices)} devices; lower it, or set 0 for one mesh"
        )
    if jax.process_count() > 1:
        raise ValueError(
            f"teacher_mesh.devices={own} works in one process, and these are "
            f"{jax.process_count()}: arrays do not move between meshes of "
            "several hosts; set teacher_mesh.devices=0"
        )
    made = []
    for name, sizes, part in (
        ("mesh", axes, devices[:-own]),
        ("teacher_mesh", teacher.axes, devices[-own:]),
    ):
        try:
            made.append(sharding.make_mesh(**sizes, devices=part))
        except ValueError as error:
            raise ValueError(f"config.{name}: {error}") from error
    return made[0], made[1]

"""The teacher on devices of its own: the switch, what it refuses, the meshes.

The first devices hold the student, the last ``teacher_mesh.devices`` the
teacher. Of several processes the last ones give all of theirs, where these make
up the number: then no process has devices of both, which is what TPUs of
several hosts ask for. Where they do not, every process gives as many of its own
last ones. 0 puts both on one mesh. What then runs where is told in
:mod:`topd_jax.parallel.apart`. Ours.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from topd_jax.objectives.objective import Objective
from topd_jax.parallel import sharding


@dataclasses.dataclass(frozen=True)
class TeacherMeshSettings:
    """Devices of the teacher, their mesh axes, and slices of the batch.

    Attributes:
      devices: the teacher's: all of the last processes, or as many of each
        (see :func:`divide`); 0: it shares the student's mesh.
      data: as of ``sharding.make_mesh``; as the next four.
      fsdp: see ``data``.
      tensor: see ``data``.
      expert: see ``data``.
      sequence: see ``data``.
      parts: slices of the batch; each is scored while the next is written.
    """

    devices: int = 0
    data: int = -1
    fsdp: int = 1
    tensor: int = 1
    expert: int = 1
    sequence: int = 1
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
    if objective.offline:
        raise ValueError(
            f"teacher_mesh.devices={devices}: objective.stage=offline has the "
            "teacher write; use on_policy, or set teacher_mesh.devices=0"
        )
    for there, what in (
        (
            teachers,
            f"config.teachers names {len(teachers)} teachers, whose rows are "
            "consecutive in a batch",
        ),
        (
            objective.pieces.weighs,
            f"objective.variant={objective.variant} weighs a token by the "
            "whole batch",
        ),
    ):
        if there and parts > 1:
            raise ValueError(
                f"teacher_mesh.parts={parts}: {what}; set teacher_mesh.parts=1"
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
    one_process: bool = False,
) -> tuple[Mesh, Mesh | None]:
    """The student's mesh, and the teacher's.

    Args:
      mesh: ``config.mesh``, a dataclass of axis sizes.
      teacher: the switch.
      devices: all of ``jax.devices()`` unless told.
      one_process: whether one process shall have all of them, whatever they
        say, as those of a topology that one host can have.

    Returns:
      (student's mesh; the teacher's, None where it is the same).

    Raises:
      ValueError: where the axes do not fit the devices, the devices cannot
        be taken evenly from the processes, two processes would have the same
        rows of the student's mesh, or TPUs of several hosts form no slice.
    """
    devices = list(jax.devices() if devices is None else devices)
    axes = dataclasses.asdict(mesh)
    if not teacher.devices:
        return sharding.make_mesh(**axes, devices=devices), None
    own = teacher.devices
    if one_process and own < len(devices):
        ours, theirs = devices[:-own], devices[-own:]
    else:
        ours, theirs = divide(devices, own)
    made = []
    for name, sizes, part in (
        ("mesh", axes, ours),
        ("teacher_mesh", teacher.axes, theirs),
    ):
        try:
            made.append(sharding.make_mesh(**sizes, devices=part))
        except ValueError as error:
            raise ValueError(f"config.{name}: {error}") from error
    if not one_process:
        _require_own_rows(made[0])
        for part in made:
            _require_slice(part, own)
    return made[0], made[1]


def divide(
    devices: Sequence[jax.Device], own: int
) -> tuple[list[jax.Device], list[jax.Device]]:
    """The student's devices and the teacher's.

    The teacher's are those of the last processes, where these have ``own``
    together and leave the student one; else the last ``own / processes`` of
    every process.

    Args:
      devices: all of them, of one process or several.
      own: how many are the teacher's.

    Returns:
      (student's, teacher's), each in the order of the processes.

    Raises:
      ValueError: where the processes cannot give as many either way, or none
        would be left for the student.
    """
    of: dict[int, list[jax.Device]] = {}
    for device in devices:
        of.setdefault(device.process_index, []).append(device)
    ordered = [of[process] for process in sorted(of)]
    for first in range(1, len(ordered)):
        if sum(map(len, ordered[first:])) == own:
            ours, theirs = ordered[:first], ordered[first:]
            return [d for p in ours for d in p], [d for p in theirs for d in p]
    count, least = len(of), min(map(len, of.values()))
    if own % count or own >= count * least:
        raise ValueError(_cannot(own, [len(part) for part in ordered]))
    each = own // count
    return (
        [device for part in ordered for device in part[:-each]],
        [device for part in ordered for device in part[-each:]],
    )


def _cannot(own: int, sizes: Sequence[int]) -> str:
    """Why so many devices cannot be the teacher's, and how many can."""
    count, least = len(sizes), min(sizes)
    if count == 1:
        return (
            f"teacher_mesh.devices={own} must leave the student some of the "
            f"{least} devices; at most {least - 1}, or set 0 for one mesh"
        )
    whole = {sum(sizes[first:]) for first in range(1, count)}
    each = set(range(count, count * least, count))
    return (
        f"teacher_mesh.devices={own} must be all devices of some of the "
        f"{count} processes, or as many of each, and leave the student some; "
        f"try {', '.join(map(str, sorted(whole | each)))}, or set 0 for one "
        "mesh"
    )


def _require_slice(mesh: Mesh, own: int) -> None:
    """Asks the TPU compiler whether chips of several hosts can be one mesh.

    It wants whole hosts, and not any of them (of v5e:4x4 any number of the
    last, of v5e:4x8 none), or a rectangle (2x1x2 of 2x2x2), and says so with
    an internal error in the middle of a run otherwise.
    """
    devices = list(mesh.devices.flat)
    hosts = {device.process_index for device in devices}
    if len(hosts) == 1 or devices[0].platform != "tpu":
        return
    one = jax.ShapeDtypeStruct(
        (len(devices),), np.float32, sharding=NamedSharding(
            mesh, PartitionSpec(mesh.axis_names)
        )
    )  # fmt: skip
    try:
        with jax.set_mesh(mesh):
            total = jax.jit(lambda x: x.sum(), out_shardings=PartitionSpec())
            total.lower(one).compile()
    except Exception as error:  # the plugin's own types
        said = " ".join(str(error).split())
        raise ValueError(
            f"teacher_mesh.devices={own}: {len(devices)} chips of {len(hosts)} "
            "hosts would be a mesh, and the TPU compiler takes no such part of "
            "a slice; take other whole hosts, or set teacher_mesh.devices=0 "
            f"(it says: {said[:160]})"
        ) from error


def _require_own_rows(mesh: Mesh) -> None:
    """Every process reads rows of its own, so none may share any."""
    parts = (row_ways(mesh),)
    rows = NamedSharding(mesh, sharding.spec(("batch",)))
    owners: dict[int | None, set[int]] = {}
    for device, (part,) in rows.devices_indices_map(parts).items():
        owners.setdefault(part.start, set()).add(device.process_index)
    shared = max(owners.values(), key=len)
    if len(shared) > 1:
        raise ValueError(
            f"config.mesh: its rows are spread in {parts[0]} over "
            f"{len({d.process_index for d in mesh.devices.flat})} processes, "
            f"and processes {sorted(shared)} would share some; make "
            "mesh.tensor at most the student's devices of one process, or "
            "teacher_mesh.devices smaller"
        )

"""What a checkpoint belongs to, and what must agree before it is resumed.

Its record holds a format, settings, objective, the fingerprints of the
teachers and of what the student does not train, and the student's shape, by
which other runs load it (:mod:`topd_jax.models.io.runs`).
"""

from collections.abc import Mapping
from typing import Any

from flax.traverse_util import flatten_dict

from topd_jax.models import DecoderConfig
from topd_jax.training.config import NO_IDENTITY, Settings, defaults_of

# Of the record; other numbers are refused by name. It is raised where a
# setting goes, or is called otherwise.
FORMAT = 4
# Settings that may differ between a run and its continuation: they change
# what is logged or done in trouble, not what is computed.
_FREE = (
    "log", "checkpoint", "guard", "sweep", "world.cache", "offline.shard_size",
    *NO_IDENTITY,
)  # fmt: skip
# Settings that may change when a run is resumed, with a line in the log: the
# ways out of an unstable run, its length, when it is evaluated, and the layout
# on other devices, as of a mesh that is chosen. So may the floors of losses.
MAY_CHANGE = (
    "optimizer.learning_rate",
    "optimizer.end_learning_rate",
    "optimizer.clip",
    "train.steps",
    "train.max_skipped",
    "train.chunk_size",
    "rollout.sharding",
    "rollout.branch_sharding",
    "eval.every",
    "mesh.data",
    "mesh.fsdp",
    "mesh.tensor",
    "mesh.expert",
    "mesh.sequence",
)
_OUT = "; use another --workdir, or the settings it was started with"


def record(
    settings: Settings,
    objective: Any,
    teachers: Mapping[str, str],
    position: dict[str, Any],
    student: Any,
    *,
    frozen: str = "",
) -> dict[str, Any]:
    """Make what a checkpoint says about itself.

    Args:
      settings: of the run.
      objective: :func:`~topd_jax.objectives.pieces.describe` of it.
      teachers: name -> fingerprint.
      position: the data iterator's state, JSON-able.
      student: its shape, so that others can load it from here; anything else
        for a student that is no decoder.
      frozen: fingerprint of what the student does not train; "": nothing.

    Returns:
      A JSON-able dictionary.
    """
    is_decoder = isinstance(student, DecoderConfig)
    shape = {"student": student.to_dict()} if is_decoder else {}
    return {
        "format": FORMAT,
        "settings": settings.to_dict(),
        "objective": objective,
        "teachers": dict(teachers),
        "frozen": frozen,
        "data": position,
    } | shape


def _may_change(name: str) -> bool:
    return name in MAY_CHANGE or (
        name.startswith("objective.") and name.endswith(".log_floor")
    )


def require_same_settings(
    saved: dict[str, Any],
    settings: Settings,
    objective: Any,
    where: str,
    *,
    free: tuple[str, ...] = (),
) -> list[str]:
    """Refuse the checkpoint of a run with other settings.

    Args:
      saved: the record of the checkpoint.
      settings: of the run that wants to continue it.
      objective: its description.
      where: the checkpoint's directory, for the error.
      free: sections that may differ besides those that change nothing: a
        student is read, and not trained on.

    Returns:
      What differs of the settings that may, with both values.

    Raises:
      ValueError: naming every setting that differs.
    """
    # A setting that is younger than the checkpoint was at its default there.
    there = flatten_dict(saved["settings"], sep=".")
    before = defaults_of(settings.to_dict()) | there
    now = flatten_dict(settings.to_dict(), sep=".")
    for tree, known in ((saved["objective"], before), (objective, now)):
        known.pop("objective", None)  # one objective has several spellings
        # A function has its name under "" where options are beside it.
        options = flatten_dict({"objective": tree}, sep=".").items()
        known |= {name.rstrip("."): value for name, value in options}
    differing = {
        name: f"{name}: {before.get(name)!r} there, {now.get(name)!r} here"
        for name in sorted(before.keys() | now.keys())
        if before.get(name) != now.get(name)
        and not any(
            name == f or name.startswith(f + ".") for f in (*_FREE, *free)
        )
    }
    changed = [differing.pop(n) for n in tuple(differing) if _may_change(n)]
    if differing:
        raise ValueError(
            f"the checkpoint in {where} belongs to a run with other settings "
            f"({'; '.join(differing.values())}){_OUT}"
        )
    return changed


def require_same_models(
    saved: dict[str, Any], teachers: Mapping[str, str], frozen: str, where: str
) -> None:
    """Refuse a checkpoint that was made with other models.

    Args:
      saved: the record of the checkpoint.
      teachers: name -> fingerprint of the run's teachers.
      frozen: fingerprint of what its student does not train.
      where: the checkpoint's directory, for the error.

    Raises:
      ValueError: naming the teacher, or the model under the student's
        adapters.
    """
    there = saved["teachers"]
    for name in sorted(there.keys() | teachers.keys()):
        if there.get(name) != teachers.get(name):
            raise ValueError(
                f"the checkpoint in {where} was made with another teacher "
                + (f"{name!r} " if name else "")
                + f"(fingerprint {there.get(name)} there, "
                f"{teachers.get(name)} here){_OUT}"
            )
    if saved["frozen"] != frozen:
        raise ValueError(
            f"the checkpoint in {where} holds adapters of another model, or "
            f"of another scale (fingerprint {saved['frozen'] or 'none'} there, "
            f"{frozen or 'none'} here){_OUT}"
        )

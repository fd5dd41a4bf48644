"""Other models in a pair: a student or teacher that no file was loaded for."""

import dataclasses
from typing import Any

import jax

from topd_jax.data.vocabulary import check_model
from topd_jax.models import fingerprint
from topd_jax.models.lora import frozen_fingerprint
from topd_jax.parallel import sharding
from topd_jax.training.setup import Pair
from topd_jax.training.teachers import Teachers


def with_models(
    pair: Pair, *, student: Any = None, teacher: Any = None
) -> Pair:
    """A pair with other models: any :class:`~topd_jax.models.LanguageModel`.

    A run's settings still name the models that were replaced, so the command
    line cannot read such a run: resume it with the same pair.

    Args:
      pair: whose tokenizer, prompts and mesh are kept.
      student: the model that learns, or None to keep it.
      teacher: the frozen model, or None to keep it.

    Returns:
      The pair, with the models placed on its mesh as their ``logical_axes``
      say.

    Raises:
      ValueError: for a model whose head has too few rows for the tokenizer,
        or that does not divide over the mesh, or for one teacher in the
        place of several.
    """
    if teacher is not None and isinstance(pair.teacher, Teachers):
        raise ValueError(
            f"teacher takes the place of {len(pair.teacher.models)} teachers, "
            "whose rows the batches are made of; load the pair without "
            "config.teachers"
        )
    changed = {}
    for name, model in (("student", student), ("teacher", teacher)):
        if model is None:
            continue
        check_model(pair.tokenizer, model.head.shape[0])
        mesh = (name == "teacher" and pair.teacher_mesh) or pair.mesh
        where = sharding.tree_shardings(model, mesh, model.logical_axes)
        changed[name] = jax.device_put(model, where)
    if student is not None:
        changed["frozen_fingerprint"] = frozen_fingerprint(student)
    if teacher is not None:
        changed["teacher_fingerprint"] = fingerprint(changed["teacher"])
    return dataclasses.replace(pair, **changed)

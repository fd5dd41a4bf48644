"""Check a model's settings, and add the adapters that they ask for."""

import dataclasses
from collections.abc import Mapping

from jax.sharding import Mesh

from topd_jax.models.config import DecoderConfig, Lora
from topd_jax.models.decoder import Decoder
from topd_jax.models.io.families import FAMILIES
from topd_jax.models.io.loading import describe
from topd_jax.models.io.peft import load_adapter
from topd_jax.models.io.wrappers import LOADED_WHOLE
from topd_jax.models.lora import add_lora, merge_lora
from topd_jax.models.settings import ModelSettings

_LORA = ("lora_rank", "lora_alpha", "lora_targets", "lora_rank_stabilised")


def check_settings(
    student: ModelSettings, teachers: Mapping[str, ModelSettings]
) -> None:
    """Refuse settings of models that mean nothing.

    Args:
      student: its settings.
      teachers: section of the config -> settings of a teacher.

    Raises:
      ValueError: by name.
    """
    given = {
        name: getattr(student, name)
        for name in _LORA
        if getattr(student, name) != getattr(ModelSettings, name)
    }
    if student.adapter and given:
        raise ValueError(
            f"student has {given} and student.adapter={student.adapter!r}, "
            "which says these itself; leave them out"
        )
    if given and not student.lora_rank:
        name, value = next(iter(given.items()))
        raise ValueError(
            f"student.lora_rank={student.lora_rank} must be at least 1 where "
            f"student.{name}={value!r}; 0 trains the whole student"
        )
    if student.quantize and not (student.lora_rank or student.adapter):
        raise ValueError(
            f"student.quantize={student.quantize!r} would freeze what is to "
            "learn; give it adapters (student.lora_rank), or quantize the "
            "teacher (teacher.quantize)"
        )
    _check_only_teacher(teachers)
    for section, teacher in teachers.items():
        if teacher.is_student:
            _check_student_as_teacher(section, teacher, student)
        if teacher.lora_rank:
            raise ValueError(
                f"{section}.lora_rank={teacher.lora_rank} must be 0: a teacher "
                f"learns nothing; {section}.adapter merges a trained one into "
                "it"
            )


def _check_only_teacher(teachers: Mapping[str, ModelSettings]) -> None:
    """Refuse settings of the only teacher that no named one has as well."""
    named = {name: m for name, m in teachers.items() if name != "teacher"}
    for field in dataclasses.fields(ModelSettings) if named else ():
        value = getattr(teachers["teacher"], field.name)
        others = [
            f"{name}.{field.name}"
            for name, model in named.items()
            if getattr(model, field.name) != value
        ]
        if value != field.default and others:
            raise ValueError(
                f"teacher.{field.name}={value!r} must be {field.default!r} "
                "(the default): config.teachers takes the place of "
                f"config.teacher; set {', '.join(others)}"
            )


def _check_student_as_teacher(
    section: str, teacher: ModelSettings, student: ModelSettings
) -> None:
    """Refuse settings that a teacher which is the student cannot have."""
    told = {
        f.name: value
        for f in dataclasses.fields(teacher)
        if f.name not in ("source", "prompt")
        and (value := getattr(teacher, f.name))
        not in (f.default, getattr(student, f.name))
    }
    if told:
        theirs = {name: getattr(student, name) for name in told}
        raise ValueError(
            f"{section} has {told} and {section}.source='student', which "
            f"computes as the student does; give it the student's {theirs}"
        )


def adapt(
    model: Decoder, settings: ModelSettings, mesh: Mesh, *, train: bool
) -> Decoder:
    """Add adapters to a loaded model, or merge them into it.

    Args:
      model: as it was loaded, whole.
      settings: of the model.
      mesh: where to spread the adapters.
      train: keep the adapters apart, to be trained; else they are merged and
        the arrays of ``model`` given up, unless it is quantized.

    Returns:
      The model; itself where the settings ask for nothing.

    Raises:
      ValueError: for adapters that do not fit the model or the settings.
    """
    if settings.adapter:
        adapted = load_adapter(model, settings.adapter, mesh=mesh)
        return adapted if train else merge_lora(adapted, donate=True)
    if not settings.lora_rank:
        return model
    return add_lora(model, lora_of(settings, model.config), mesh=mesh)


def lora_of(settings: ModelSettings, config: DecoderConfig) -> Lora:
    """Return the adapters that settings ask for.

    Args:
      settings: of the model; rank 0 counts as 1.
      config: of the model, whose targets are taken where none are named.
    """
    return Lora(
        settings.lora_rank or 1,
        settings.lora_alpha,
        settings.lora_targets or config.lora_targets,
        settings.lora_rank_stabilised,
    )


def require_adapter(settings: ModelSettings) -> None:
    """Refuse to export the adapters of a student that has none of its own.

    Args:
      settings: of the student.

    Raises:
      ValueError: where there are none, or no file holds the model that they
        belong to.
    """
    if not settings.lora_rank and not settings.adapter:
        raise ValueError(
            "the student has no adapters to export: student.lora_rank=0; "
            "leave --adapter out to export it whole"
        )
    if settings.keep_layers:
        raise ValueError(
            f"student.keep_layers={settings.keep_layers}: no file holds the "
            "model that these adapters belong to, whose layers were cut; "
            "leave --adapter out to export it whole"
        )
    kind = "" if settings.in_world else describe(settings.source).model_type
    if kind in LOADED_WHOLE:
        raise ValueError(
            f"student.source={settings.source!r} of model_type={kind!r} reads "
            "images too, and its text model's layers have other names where "
            "PEFT loads it; leave --adapter out to export the text model whole"
        )
    fused = FAMILIES[kind].fused if kind in FAMILIES else ()
    if names := [spec.hub for spec in fused if not spec.experts]:
        raise ValueError(
            f"student.source={settings.source!r} of model_type={kind!r} keeps "
            f"several maps in one tensor ({', '.join(names)}), beside which "
            "PEFT has one adapter, and here each map has its own; leave "
            "--adapter out to export it whole"
        )

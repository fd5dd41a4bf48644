"""What a run is made of: models, tokenizer, prompts, mesh, checked together."""

import dataclasses
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
from jax.sharding import Mesh

from topd_jax.data import packing, vocabulary
from topd_jax.data import prompts as prompt_data
from topd_jax.data import solutions as solution_data
from topd_jax.data.routing import prompts_per_teacher
from topd_jax.data.sources import Record, read_records, without
from topd_jax.data.teachers import shared_vocab
from topd_jax.data.templates import require_same_prompts, teacher_width
from topd_jax.data.tokenizers import Tokenizer, wrap_tokenizer
from topd_jax.data.toy_world.models import world_models
from topd_jax.data.vocabulary import check_model, require_same_vocabulary
from topd_jax.evaluation.evaluator import Evaluator
from topd_jax.evaluation.grading import make_grader
from topd_jax.models import Decoder, describe, drop_layers, fingerprint, load
from topd_jax.models.adapters import adapt
from topd_jax.models.lora import frozen_fingerprint
from topd_jax.models.quantization import quantizer
from topd_jax.models.settings import ModelSettings
from topd_jax.parallel import buckets, sharding
from topd_jax.training.config import Settings
from topd_jax.training.placement import check_batches, make_run_mesh
from topd_jax.training.shapes import model_settings, row_length, section_of
from topd_jax.types import Teacher


@dataclasses.dataclass
class Setup:
    """What a run is made of.

    Attributes:
      student: the model that learns, placed on the mesh.
      teachers: the frozen models, placed on the mesh, or the student; usually
        one.
      tokenizer: of all of them.
      mesh: of devices.
      encoded: the training prompts.
      validation: held-out prompts for the interval.
      test: held-out prompts for the end.
      grade: (records, completions) -> which are right, or None where answers
        are not known.
      teacher_fingerprints: name -> hash of a teacher's config and parameters;
        "student" for the student.
      frozen_fingerprint: hash of what the student does not train; "" where
        it trains everything.
      student_source: where the student was read: a path or a hub name.
    """

    student: Any
    teachers: tuple[Teacher, ...]
    tokenizer: Tokenizer
    mesh: Mesh
    encoded: prompt_data.EncodedPrompts
    validation: prompt_data.EncodedPrompts
    test: prompt_data.EncodedPrompts
    grade: Callable[[Sequence[Record], Sequence[str]], list[bool] | None]
    teacher_fingerprints: dict[str, str]
    frozen_fingerprint: str = ""
    student_source: str = ""

    @property
    def vocab_size(self) -> int:
        """The ids that every model has a row for."""
        return shared_vocab(self.student, self.teachers)

    @property
    def is_ours(self) -> bool:
        """Whether no model is code of the user's."""
        models = (t.beside(self.student) for t in self.teachers)
        return all(isinstance(m, Decoder) for m in (self.student, *models))

    def stream(self, settings: Settings) -> Iterator[Any]:
        """Return the checkpointable iterator over prompts, or solutions."""
        data, offline = settings.data, settings.offline
        if settings.is_offline:  # of a sweep, one run may be
            require_same_prompts(self.encoded.records, "train.stage=offline")
        if not offline.path:
            several = len(self.teachers) > 1
            return prompt_data.prompt_stream(
                self.encoded,
                batch_size=data.batch_size,
                seed=settings.seed,
                prompts_per_teacher={t.name: t.prompts for t in self.teachers}
                if several
                else None,
            )
        solutions = solution_data.read_solutions(
            offline.path,
            offline.keep,
            tokenizer=vocabulary.fingerprint(self.tokenizer),
        )
        stream = packing.SolutionStream(
            # topd generate may have held out fewer.
            without(self.test.records, solutions),
            eos_ids=self.tokenizer.eos_ids,
            pad_id=self.tokenizer.pad_id,
            batch_size=data.batch_size * data.samples,
            length=offline.pack_length,
            unit=sharding.row_ways(self.mesh) * settings.optimizer.accumulate,
            seed=settings.seed,
        )
        cure = "raise rollout.max_new_tokens, or lower offline.pack_length"
        for model in (self.student, *(t.model for t in self.teachers)):
            if isinstance(model, Decoder):
                model.config.require_rows(stream.longest, cure)
        return stream

    def evaluator(self, settings: Settings) -> Evaluator:
        """Make the evaluator of the run's held-out problems."""
        return Evaluator(
            settings.eval,
            settings.rollout,
            self.teachers,
            self.tokenizer,
            self.mesh,
            self.validation,
            self.test,
            self.grade,
            vocab_size=self.vocab_size,
            seed=settings.seed,
            top_k=settings.log.top_k,
            chunk_size=settings.train.chunk_size,
            shared=self.is_ours,
        )


def load_setup(settings: Settings, workdir: pathlib.Path) -> Setup:
    """Load (or, in the tiny world, train) what a run needs.

    Args:
      settings: of the run.
      workdir: where the tiny world's models are kept.

    Returns:
      The setup.

    Raises:
      ValueError: for whatever does not fit together, by name and number.
    """
    mesh = make_run_mesh(settings)
    # What is cheap to refuse comes before models are trained or read.
    check_batches(settings, mesh)
    parts = read_prompts(settings)
    prompts_of = prompts_by_teacher(settings, parts, mesh)
    models, tokenizer, student_source = _models(settings, workdir, mesh)
    encoded, validation, test = (
        prompt_data.encode_prompts(
            part,
            tokenizer,
            max_length=settings.data.max_prompt_length,
            teacher_width=teacher_width(settings.data),
            on_long_prompt=settings.data.on_long_prompt,
        )
        for part in parts
    )
    teachers = tuple(
        Teacher(models.get(section_of(name)), name, prompts)
        for name, prompts in (prompts_of or {"": 1}).items()
    )
    return Setup(
        models["student"],
        teachers,
        tokenizer,
        mesh,
        encoded,
        validation,
        test,
        make_grader(settings.data).grade,
        {
            t.name: fingerprint(t.model) if t.model else "student"
            for t in teachers
        },
        frozen_fingerprint(models["student"]),
        student_source,
    )


def read_prompts(
    settings: Settings,
) -> tuple[list[Record], list[Record], list[Record]]:
    """Read the training, validation and test prompts of a run.

    Args:
      settings: of the run.

    Raises:
      ValueError: for what cannot be read, too few records, a student that
        reads the same as its own teacher, or a teacher that in stage 1 does
        not.
    """
    parts = read_records(
        settings.data,
        settings.world,
        problems=settings.eval.problems,
        final_problems=settings.eval.final_problems,
        templates=settings.templates,
    )
    if settings.is_offline:
        require_same_prompts(parts[0], "train.stage=offline")
    for name, model in settings.by_teacher.items():
        own = ([r for r in p if r.get("teacher", "") == name] for p in parts)
        told = all(any("teacher_prompt" in r for r in p) for p in own if p)
        if model.is_student and not told:
            section = section_of(name)
            raise ValueError(
                f"{section}.source='student' reads what the student reads: "
                f"there is nothing to learn; {section}.prompt says what else "
                "it reads, or a field teacher_prompt of the records"
            )
    return parts


def prompts_by_teacher(
    settings: Settings, parts: Sequence[list[Record]], mesh: Mesh
) -> dict[str, int]:
    """Return how many prompts of a batch belong to each of several teachers.

    Args:
      settings: of the run.
      parts: of :func:`read_prompts`.
      mesh: of devices.

    Returns:
      name -> prompts; {} where there is one teacher.

    Raises:
      ValueError: for a teacher without a prompt, or rows that do not divide
        over mesh and slices.
    """
    return prompts_per_teacher(
        settings.data,
        tuple(settings.teachers),
        parts[0],
        parts[-1],
        mesh=mesh,
        accumulate=settings.optimizer.accumulate,
    )


def with_models(
    setup: Setup, *, student: Any = None, teacher: Any = None
) -> Setup:
    """Replace models by any :class:`~topd_jax.models.LanguageModel`.

    A run's settings still name the models that were replaced, so the command
    line cannot read such a run: resume it with the same setup.

    Args:
      setup: whose tokenizer, prompts and mesh are kept.
      student: the model that learns, or None to keep it.
      teacher: the frozen model, or None to keep it.

    Returns:
      The setup, with the models placed on its mesh as their ``logical_axes``
      say.

    Raises:
      ValueError: for a model whose head has too few rows for the tokenizer,
        or that does not divide over the mesh, or for one teacher in the
        place of several.
    """
    if teacher is not None and len(setup.teachers) > 1:
        raise ValueError(
            f"teacher takes the place of {len(setup.teachers)} teachers, "
            "whose rows the batches are made of; load the setup without "
            "config.teachers"
        )

    def place(model: Any) -> Any:
        check_model(setup.tokenizer, model.head.shape[0])
        where = sharding.tree_shardings(model, setup.mesh, model.logical_axes)
        return jax.device_put(model, where)

    changed: dict[str, Any] = {}
    if student is not None:
        changed["student"] = place(student)
        changed["frozen_fingerprint"] = frozen_fingerprint(student)
    if teacher is not None:
        placed = place(teacher)
        changed["teachers"] = (Teacher(placed),)
        changed["teacher_fingerprints"] = {"": fingerprint(placed)}
    return dataclasses.replace(setup, **changed)


def _models(
    settings: Settings, workdir: pathlib.Path, mesh: Mesh
) -> tuple[dict[str, Any], Tokenizer, str]:
    """Load models by section, their tokenizer, and the student's source."""
    paths, tokenizer = {}, None
    names = model_settings(settings)
    if any(m.in_world for m in names.values()):
        where = settings.world.cache or str(workdir / "world")
        *parts, tokenizer = world_models(settings.world, buckets.as_path(where))
        world = dict(zip(("teacher", "student"), parts, strict=True))
        paths = {n: world[model.world_part(n)] for n, model in names.items()}
    models, tokenizers = {}, {}
    options = tokenizer_options(settings)
    for name, model in names.items():
        source = paths[name] if model.in_world else model.source
        models[name], own = _load(
            model, source, mesh, row_length(settings), name == "student"
        )
        tokenizers[name] = tokenizer
        if own is not None:
            tokenizers[name] = wrap_tokenizer(own, **options)
    tokenizer = _common_tokenizer(tokenizers, models)
    if max(settings.data.end_ids, default=0) >= tokenizer.vocab_size:
        raise ValueError(
            f"data.end_ids={settings.data.end_ids} must be below "
            f"{tokenizer.vocab_size}, the ids of the tokenizer"
        )
    source = str(paths.get("student", settings.student.source))
    return models, tokenizer, source


def tokenizer_options(settings: Settings) -> dict[str, Any]:
    """Return the keyword arguments of a run's :class:`HuggingFaceTokenizer`.

    A completion ends where any model's files would end it: the student learns
    the teacher's ends.
    """
    ends: list[int] = []
    for model in model_settings(settings).values():
        ends += () if model.in_world else describe(model.source).end_ids
    ends += settings.data.end_ids
    thinking = settings.data.thinking
    template = {} if thinking is None else {"enable_thinking": thinking}
    return {"eos_ids": ends, "template_options": template}


def _load(
    settings: ModelSettings,
    source: str | pathlib.Path,
    mesh: Mesh,
    length: int,
    train: bool,
) -> tuple[Any, Any]:
    model, tokenizer = load(
        source,
        dtype=settings.dtype,
        param_dtype=settings.param_dtype,
        remat=settings.remat,
        unroll=settings.unroll,
        mesh=mesh,
        length=length,
        finish=quantizer(settings.quantize),
    )
    model = adapt(model, settings, mesh, train=train)
    if settings.keep_layers:
        model = drop_layers(model, settings.keep_layers)
    if settings.attention != model.config.attention:
        config = model.config.replace(attention=settings.attention)
        model = Decoder(config, model.arrays)
    return model, tokenizer


def _common_tokenizer(
    tokenizers: dict[str, Tokenizer | None], models: dict[str, Any]
) -> Tokenizer:
    known = {n: t for n, t in tokenizers.items() if t is not None}
    if not known:
        places = [f"{name}.source" for name in tokenizers]
        raise ValueError(
            f"no tokenizer in {' or '.join(places)}; put its files beside the "
            "model"
        )
    # The student's, where it has one: it is the first.
    (first, tokenizer), *others = known.items()
    for name, other in others:
        if other is not tokenizer:
            require_same_vocabulary(tokenizer, other, names=(first, name))
    for model in models.values():
        check_model(tokenizer, model.config.vocab_size)
    return tokenizer

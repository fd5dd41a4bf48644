"""Student, teacher, tokenizer and prompts of a run, together and checked."""

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from topd_jax.data import packing, vocabulary
from topd_jax.data import prompts as prompt_data
from topd_jax.data import solutions as solution_data
from topd_jax.data.records import (
    check_rows,
    grader,
    read_records,
    teacher_shares,
)
from topd_jax.data.routing import places_of
from topd_jax.data.sources import Record
from topd_jax.data.tokenizers import (
    HuggingFaceTokenizer,
    SentencePieceTokenizer,
    Tokenizer,
)
from topd_jax.data.toy_world.models import world_models
from topd_jax.data.vocabulary import check_model, require_same_vocabulary
from topd_jax.models import Decoder, drop_layers, end_ids, fingerprint, load
from topd_jax.models.lora import frozen_fingerprint
from topd_jax.models.quantization import quantizer
from topd_jax.parallel import hosts, sharding, transfers
from topd_jax.parallel.moves import move
from topd_jax.parallel.teacher_mesh import make_meshes, row_ways, rows_shardings
from topd_jax.training.adapters import adapt
from topd_jax.training.config import ModelSettings, Settings
from topd_jax.training.teachers import Teachers
from topd_jax.types import Prompts

# Its section of the config, where there is one teacher.
_ONLY = "teacher"


@dataclasses.dataclass
class Pair:
    """What a run is made of.

    Attributes:
      student: the model that learns, placed on the mesh.
      teacher: the frozen model, placed on the mesh; or several as
        :class:`topd_jax.training.teachers.Teachers`.
      tokenizer: of both.
      hub_tokenizer: the object of transformers behind it; None in the tiny
        world.
      mesh: of devices.
      encoded: the training prompts.
      validation: held-out prompts for the interval.
      test: held-out prompts for the end.
      grade: (records, completions) -> which are right, or None where answers
        are not known.
      final_answer: completion -> the answer it gives, for votes; "" for none.
      teacher_fingerprint: hash of the teacher's config and parameters; of
        several, name -> hash.
      frozen_fingerprint: hash of what the student does not train; "" where
        it trains everything.
      student_source: where the student was read: a path or a hub name.
      teacher_mesh: the teacher's own; None where it is on ``mesh``.
    """

    student: Any
    teacher: Any
    tokenizer: Tokenizer
    hub_tokenizer: Any
    mesh: Mesh
    encoded: prompt_data.EncodedPrompts
    validation: prompt_data.EncodedPrompts
    test: prompt_data.EncodedPrompts
    grade: Callable[[Sequence[Record], Sequence[str]], list[bool] | None]
    final_answer: Callable[[str], str]
    teacher_fingerprint: str | dict[str, str]
    frozen_fingerprint: str = ""
    student_source: str = ""
    teacher_mesh: Mesh | None = None

    @functools.cached_property
    def teacher_head(self) -> Any:
        """A copy of the teacher's head on the student's mesh, made once."""
        head = self.teacher.head
        return move(head, rows_shardings(head, self.mesh))

    def spread(self, prompts: Prompts) -> Prompts:
        """Puts a batch that every process holds whole on the mesh.

        Raises:
          ValueError: where the rows do not divide over data x fsdp.
        """

        def one(x: np.ndarray) -> jax.Array:
            return jax.make_array_from_callback(
                x.shape,
                self._rows(x.shape),
                lambda index: x[index],
                dtype=x.dtype,
            )

        return jax.tree.map(one, prompts)

    def stream(self, settings: Settings) -> Any:
        """The checkpointable iterator over prompts, or written solutions."""
        if settings.offline.path:
            return self._solutions(settings)
        index, count = hosts.share_of(self.mesh)
        return prompt_data.prompt_stream(
            self.encoded,
            batch_size=settings.data.batch_size,
            seed=settings.seed,
            shares=self.teacher.shares
            if isinstance(self.teacher, Teachers)
            else None,
            parts=settings.teacher_mesh.parts,
            process_index=index,
            process_count=count,
        )

    def _solutions(self, settings: Settings) -> packing.SolutionStream:
        data, offline = settings.data, settings.offline
        unit = row_ways(self.mesh) * settings.optimizer.accumulate
        index, count = hosts.share_of(self.mesh)
        return packing.SolutionStream(
            solution_data.read_solutions(
                offline.path,
                offline.keep,
                tokenizer=vocabulary.fingerprint(self.tokenizer),
            ),
            eos_ids=self.tokenizer.eos_ids,
            pad_id=self.tokenizer.pad_id,
            batch_size=data.batch_size * data.samples,
            length=offline.pack_length,
            unit=unit,
            seed=settings.seed,
            process_index=index,
            process_count=count,
        )

    def by_teacher(
        self, encoded: prompt_data.EncodedPrompts, count: int
    ) -> Iterator[tuple[str, Any, prompt_data.EncodedPrompts, list[int]]]:
        """Which prompts each teacher reads, outside of training.

        Args:
          encoded: any prompts; those without a teacher, where there are
            several, come as they are, with None.
          count: only so many of them, from the first on.

        Yields:
          (name, "" for the only one; teacher; its prompts; places of its
          first ones, those below ``count``, in ``encoded``).
        """
        if not isinstance(self.teacher, Teachers):
            places = list(range(min(count, len(encoded.records))))
            yield "", self.teacher, encoded, places
            return
        for name, places in places_of(encoded.records[:count]).items():
            teacher = self.teacher.models.get(name)
            yield name, teacher, encoded.take(places), places

    def place(self, prompts: Any) -> Any:
        """Puts this process's rows of a batch on the mesh.

        A process without devices of it only tells their number.

        Raises:
          ValueError: where the rows do not divide over data x fsdp.
        """
        feeds = jax.process_index() in transfers.owners(self.mesh)
        _, count = hosts.share_of(self.mesh)

        def one(x: np.ndarray) -> jax.Array:
            shape = (x.shape[0] * count, *x.shape[1:])
            if not feeds:
                return transfers.nothing_of(
                    jax.ShapeDtypeStruct(
                        shape, x.dtype, sharding=self._rows(shape)
                    )
                )
            return jax.make_array_from_process_local_data(
                self._rows(shape), x, shape
            )

        return jax.tree.map(one, prompts)

    def _rows(self, shape: tuple[int, ...]) -> jax.sharding.NamedSharding:
        return sharding.named(
            self.mesh,
            shape,
            ("batch",) + (None,) * (len(shape) - 1),
            name="batch_size",
        )


def load_pair(
    settings: Settings, workdir: pathlib.Path, *, apart: bool = False
) -> Pair:
    """Loads (or, in the tiny world, trains) what a run needs.

    Args:
      settings: of the run.
      workdir: where the tiny world's models are kept.
      apart: put the teacher on ``settings.teacher_mesh``, where there is one;
        otherwise it is on the student's mesh.

    Returns:
      The pair.

    Raises:
      ValueError: for whatever does not fit together, by name and number.
    """
    mesh, theirs = make_meshes(settings.mesh, settings.teacher_mesh)
    theirs = theirs if apart else None
    # What is cheap to refuse comes before models are trained or read.
    for section in ("data", "eval"):
        check_rows(settings, mesh, section, theirs)
    parts = read_records(settings)
    shares = teacher_shares(settings, parts, mesh)
    models, tokenizer, owned, student_source = _models(
        settings, workdir, mesh, theirs or mesh
    )
    encoded, validation, test = (
        prompt_data.encode_prompts(
            part,
            tokenizer,
            max_length=settings.data.max_prompt_length,
            on_long_prompt=settings.data.on_long_prompt,
        )
        for part in parts
    )
    teacher, mark = _teacher(models, shares)
    return Pair(
        models["student"],
        teacher,
        tokenizer,
        owned,
        mesh,
        encoded,
        validation,
        test,
        *grader(settings),
        mark,
        frozen_fingerprint(models["student"]),
        student_source,
        theirs,
    )


def _models(
    settings: Settings, workdir: pathlib.Path, mesh: Mesh, theirs: Mesh
) -> tuple[dict[str, Any], Tokenizer, Any, str]:
    """Models by section, their tokenizer, what is behind it, the student's
    source."""
    paths, tokenizer = {}, None
    names = model_settings(settings)
    if any(m.source == "world" for m in names.values()):
        where = settings.world.cache or str(workdir / "world")
        teacher_path, student_path, tokenizer = world_models(
            settings.world, pathlib.Path(where)
        )
        paths = dict.fromkeys(names, teacher_path) | {"student": student_path}
    models, found, owned = {}, {}, {}
    options = tokenizer_options(settings)
    for name, model in names.items():
        source = paths[name] if model.source == "world" else model.source
        train = name == "student"
        where = mesh if train else theirs
        models[name], own = _load(model, source, where, train)
        found[name], owned[name] = tokenizer, own
        if isinstance(own, SentencePieceTokenizer):
            found[name], owned[name] = own, None
        elif own is not None:
            found[name] = HuggingFaceTokenizer(own, **options)
    tokenizer = _common_tokenizer(found, models)
    behind = next((owned[n] for n in names if found[n] is tokenizer), None)
    source = str(paths.get("student", settings.student.source))
    return models, tokenizer, behind, source


def model_settings(settings: Settings) -> dict[str, ModelSettings]:
    """Section of the config -> its model: the student, then every teacher."""
    teachers = {_ONLY: settings.teacher}
    if settings.teachers:
        teachers = {f"teachers.{n}": m for n, m in settings.teachers.items()}
    return {"student": settings.student} | teachers


def tokenizer_options(settings: Settings) -> dict[str, Any]:
    """Keyword arguments of a run's :class:`HuggingFaceTokenizer`.

    A completion ends where any model's files would end it: the student learns
    the teacher's ends.
    """
    ends: list[int] = []
    for model in model_settings(settings).values():
        ends += () if model.source == "world" else end_ids(model.source)
    ends += settings.data.end_ids
    thinking = settings.data.thinking
    template = {} if thinking is None else {"enable_thinking": thinking}
    return {"eos_ids": ends, "template_options": template}


def _load(
    settings: ModelSettings,
    source: str | pathlib.Path,
    mesh: Mesh,
    train: bool,
) -> tuple[Any, Any]:
    model, tokenizer = load(
        source,
        dtype=settings.dtype,
        param_dtype=settings.param_dtype,
        remat=settings.remat,
        unroll=settings.unroll,
        mesh=mesh,
        finish=quantizer(settings.quantize, settings.quantize_tile),
    )
    model = adapt(model, settings, mesh, train=train)
    if settings.keep_layers:
        model = drop_layers(model, settings.keep_layers)
    if settings.attention != model.config.attention:
        config = model.config.replace(attention=settings.attention)
        model = Decoder(config, model.arrays)
    return model, tokenizer


def _teacher(
    models: dict[str, Any], shares: dict[str, int]
) -> tuple[Any, str | dict[str, str]]:
    """The teacher, or several as one, and what tells it from others."""
    if not shares:
        return models[_ONLY], fingerprint(models[_ONLY])
    several = {name: models[f"teachers.{name}"] for name in shares}
    marks = {name: fingerprint(model) for name, model in several.items()}
    return Teachers(several, tuple(shares.values())), marks


def _common_tokenizer(
    tokenizers: dict[str, Tokenizer | None], models: dict[str, Any]
) -> Tokenizer:
    found = {n: t for n, t in tokenizers.items() if t is not None}
    if not found:
        places = [f"{name}.source" for name in tokenizers]
        raise ValueError(
            f"neither {' nor '.join(places)} has a tokenizer; put its files "
            "beside the model"
        )
    # The student's, where it has one: it is the first.
    (first, tokenizer), *others = found.items()
    for name, other in others:
        if other is not tokenizer:
            require_same_vocabulary(tokenizer, other, names=(first, name))
    for model in models.values():
        check_model(tokenizer, model.config.vocab_size)
    return tokenizer

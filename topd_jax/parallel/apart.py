"""A step whose teacher has devices of its own (ours).

The student's mesh writes, learns and keeps the optimizer; the teacher's reads
and looks ahead. Between them move

* to the teacher: trajectories, and at every step the student's embedding
  [V, D_student] where the transport cost is measured in it, its states [B, T,
  D_student] and head where candidates are ranked or tokens weighed by both;
* back: the annotations, of which the teacher's hidden states [B, T,
  D_teacher] are nearly everything;
* once: the teacher's output head, which the update reads at every step.

The batch goes through in ``teacher_mesh.parts`` slices: slice i is read while
slice i + 1 is written. All slices are written by the student as it is before
the update, with the noise that their rows have in the whole batch, and what
depends on the whole batch is decided on the whole batch; so a step is the
same with any number of parts.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from topd_jax.evaluation import metrics
from topd_jax.objectives.objective import Objective
from topd_jax.parallel import sharding, transfers
from topd_jax.parallel.moves import copy_to, move, move_rows
from topd_jax.parallel.teacher_mesh import rows_shardings
from topd_jax.training.config import Settings
from topd_jax.training.score import decide, read
from topd_jax.training.setup import Pair
from topd_jax.training.teachers import Teachers, by_name, split_rows, total
from topd_jax.types import Annotations, Head, Prompts, Trajectories


@struct.dataclass
class StandIn:
    """What of a model is needed where the model itself is not.

    Attributes:
      head: its output head, or [V, 0] where only its rows are counted.
      embedding: [V, D]; None where nothing is measured in it.
    """

    head: Head
    embedding: jax.Array | None = None


def counted(model: Any) -> StandIn | Teachers:
    """A model of which only the number of vocabulary rows is needed."""
    if isinstance(model, Teachers):
        each = {name: counted(m) for name, m in model.models.items()}
        return model.replace(models=each)
    # Of the host: made on a device, it would wait for what runs there.
    return StandIn(np.empty((model.head.shape[0], 0), np.float32))


def needed_of(student: Any, objective: Objective) -> StandIn:
    """What the teacher's mesh needs of the student, but for its states.

    Args:
      student: the model, or its shapes.
      objective: of the run.
    """
    made = counted(student)
    if objective.needs_student_states:
        made = made.replace(head=student.head)
    if objective.needs_branches and objective.detector == "transport":
        made = made.replace(embedding=student.embedding)
    return made


def make_reading(
    settings: Settings, pair: Pair, phases: Any
) -> "Together | Apart":
    """The first half of a step, on one mesh or two.

    Args:
      settings: of the run.
      pair: of the run.
      phases: of :func:`topd_jax.training.phases.make_phases`.
    """
    if pair.teacher_mesh is None:
        return Together(pair, phases)
    return Apart(settings, pair, phases)


class Together:
    """Writes and annotates where both models share a mesh."""

    def __init__(self, pair: Pair, phases: Any) -> None:
        """Keeps them.

        Args:
          pair: of the run.
          phases: of the run.
        """
        self._pair, self._phases = pair, phases

    @property
    def head(self) -> Head | dict[str, Head]:
        """The teacher's, for the update."""
        return self._pair.teacher.head

    def statistics(self, student: Any, written: Any) -> dict:
        """Of both models on what was written."""
        return self._phases.statistics(student, self._pair.teacher, written)

    def __call__(
        self,
        student: Any,
        prompts: Any,
        keys: jax.Array,
        clock: Callable[[str, Any], Any],
    ) -> tuple[Any, Any]:
        """As :meth:`Apart.__call__`; also of packed rows."""
        (roll_key, note_key), teacher = keys, self._pair.teacher
        prompts = self._pair.place(prompts)
        written = clock(
            "rollout", self._phases.rollout(student, teacher, prompts, roll_key)
        )
        notes = self._phases.annotate(student, teacher, written, note_key)
        return written, clock("annotate", notes)


class Apart:
    """Writes on the student's mesh, annotates on the teacher's."""

    def __init__(self, settings: Settings, pair: Pair, phases: Any) -> None:
        """Prepares what moves.

        Args:
          settings: of the run.
          pair: with a ``teacher_mesh``.
          phases: of the run.
        """
        self._pair, self._phases = pair, phases
        self._statistics = make_statistics(settings, pair)
        self._parts = settings.teacher_mesh.parts
        self._objective = settings.objective
        self._sends = transfers.needed(pair.mesh, pair.teacher_mesh)
        self._reader = make_reader()
        self._join = make_join(settings.objective)
        self.head = pair.teacher_head

    def statistics(self, student: Any, written: Trajectories) -> dict:
        """Of both models on what was written."""
        return self._statistics(student, self._pair.teacher, written)

    def __call__(
        self,
        student: Any,
        prompts: Prompts,
        keys: jax.Array,
        clock: Callable[[str, Any], Any],
    ) -> tuple[Trajectories, Annotations]:
        """Writes and annotates a batch; call with the student's mesh set.

        Args:
          student: as it is now.
          prompts: of the batch, on the host.
          keys: [2] of the rollout and of the annotation.
          clock: (name of a phase, what it gave) -> the same.

        Returns:
          Both on the student's mesh. Nothing here waits for a slice to be
          annotated before the next is written.
        """
        pair, (roll_key, note_key) = self._pair, keys
        mesh, writer = pair.teacher_mesh, counted(pair.teacher)
        # Before anything is written, behind which they would wait.
        ours = self._student(student)
        there = copy_to(note_key, mesh)
        written, first_rows, notes = [], [], []

        def note(slices: slice) -> None:
            parts = written[slices]
            states = [None] * len(parts)
            if self._objective.needs_student_states:
                states = [self._reader(student, part) for part in parts]
            for *part, first_row in zip(
                parts, states, first_rows[slices], strict=True
            ):
                moved, read_by_us = move_rows(part, mesh)
                with jax.set_mesh(mesh):
                    rest = (there, first_row, read_by_us)
                    notes.append(
                        self._phases.annotate(ours, pair.teacher, moved, *rest)
                    )

        for part in split(prompts, self._parts):
            first_rows.append(sum(w.tokens.shape[0] for w in written))
            written.append(
                self._phases.rollout(
                    student, writer, pair.place(part), roll_key, first_rows[-1]
                )
            )
            # A program that sends has its place before the next slice is
            # written; any other move may wait for what it moves.
            if self._sends:
                note(slice(-1, None))
        clock("rollout", written)
        if not self._sends:
            note(slice(None))
        notes = [move_rows(part, pair.mesh) for part in notes]
        clock("annotate", notes)
        if len(notes) == 1:
            return written[0], notes[0]
        return self._join(written, notes, note_key)

    def _student(self, student: Any) -> StandIn:
        """What the teacher's mesh needs of the student."""
        made = needed_of(student, self._objective)
        # What is only counted stays on the host.
        return jax.tree.map(
            lambda x, place: move(x, place) if isinstance(x, jax.Array) else x,
            made,
            rows_shardings(made, self._pair.teacher_mesh),
        )


def make_join(objective: Objective) -> Callable[..., Any]:
    """The jitted (written, notes, key) of slices -> those of the batch."""

    def whole(*parts: jax.Array) -> jax.Array:
        x = jnp.concatenate(parts)
        return sharding.constrain(x, "batch", *(None,) * (x.ndim - 1))

    def join(
        written: list[Trajectories], notes: list[Annotations], key: jax.Array
    ) -> tuple[Trajectories, Annotations]:
        notes = jax.tree.map(whole, *notes)
        return jax.tree.map(whole, *written), decide(notes, key, objective)

    return jax.jit(join)


def split(tree: Any, parts: int) -> list[Any]:
    """Consecutive slices of a batch, by rows."""
    rows = jax.tree.leaves(tree)[0].shape[0] // parts
    return [
        jax.tree.map(lambda x, i=i: x[i * rows : (i + 1) * rows], tree)
        for i in range(parts)
    ]


def make_reader() -> Callable[[Any, Trajectories], Any]:
    """The jitted (model, trajectories) -> its states [B, T, D].

    Of several teachers, name -> the states of its own rows.
    """

    def reader(model: Any, written: Trajectories) -> Any:
        if not isinstance(model, Teachers):
            return read(model, written)
        own = model.split(written)
        return {name: read(m, own[name]) for name, m in model.models.items()}

    return jax.jit(reader)


def make_comparison(settings: Settings) -> Callable[..., dict]:
    """The jitted statistics of a student and what the teacher has read.

    Args:
      settings: of the run.

    Returns:
      (student, teacher's head, its states [B, T, D], trajectories) ->
      name -> (sum, count); heads and states of several teachers by name, then
      also "name/teacher".
    """
    options = dict(
        top_k=settings.log.top_k, log_floor=settings.objective.log_floor
    )

    def one(
        student: Any, head: Head, states: jax.Array, written: Trajectories
    ) -> dict[str, tuple[jax.Array, jax.Array]]:
        return metrics.statistics(
            student, StandIn(head), written, teacher_states=states, **options
        )

    def compare(
        student: Any, head: Any, states: Any, written: Trajectories
    ) -> dict[str, tuple[jax.Array, jax.Array]]:
        if not isinstance(states, dict):
            return one(student, head, states, written)
        sizes = {name: x.shape[0] for name, x in states.items()}
        parts = {
            name: one(student, head[name], states[name], rows)
            for name, rows in split_rows(written, sizes).items()
        }
        return total(parts.values()) | by_name(parts)

    return jax.jit(compare)


def make_statistics(settings: Settings, pair: Pair) -> Callable[..., dict]:
    """:func:`topd_jax.evaluation.evaluator.make_statistics`, over two meshes.

    Args:
      settings: of the run.
      pair: with a ``teacher_mesh``.

    Returns:
      (student, teacher, trajectories) -> name -> (sum, count); of several
      teachers all, or one of them.
    """
    reader, compare = make_reader(), make_comparison(settings)

    def statistics(student: Any, teacher: Any, written: Trajectories) -> dict:
        head = pair.teacher_head
        if isinstance(head, dict) and not isinstance(teacher, Teachers):
            models = pair.teacher.models
            head = next(head[n] for n, m in models.items() if m is teacher)
        moved = move_rows(written, pair.teacher_mesh)
        with jax.set_mesh(pair.teacher_mesh):
            states = reader(teacher, moved)
        return compare(student, head, move_rows(states, pair.mesh), written)

    return statistics


def together(pair: Pair) -> Pair:
    """The pair with a copy of the student beside the teacher, on its mesh.

    For what needs both models in one program, before a run begins.

    Args:
      pair: any.

    Returns:
      The pair on one mesh; itself where it is on one.
    """
    if pair.teacher_mesh is None:
        return pair
    mesh, student = pair.teacher_mesh, pair.student
    try:
        where = sharding.tree_shardings(student, mesh, student.logical_axes)
    except ValueError:  # only the teacher has to divide over its mesh
        where = jax.tree.map(lambda _: sharding.replicated(mesh), student)
    return dataclasses.replace(
        pair,
        student=move(student, where),
        mesh=mesh,
        teacher_mesh=None,
    )

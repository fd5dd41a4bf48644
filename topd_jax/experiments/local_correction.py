"""Does a local update mend a local divergence? (arXiv:2606.00305, §5.2)

One divergent point of each trajectory is taken by itself: its prefix y_{<t}
becomes a prompt and the K tokens from y_t on the whole completion, so that
nothing outside of the window has a gradient. From the same start, the student
takes M updates on this prefix and window by each method, with the loss of
training; then it continues the prefix greedily, and its distance to the
teacher's continuation is measured with the start student's embedding.
"""

import dataclasses
import json
import pathlib
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm import tqdm

from topd_jax.experiments import plots
from topd_jax.experiments.correction_report import BEFORE, PAPER, report, table
from topd_jax.experiments.observe import looking_ahead, observe
from topd_jax.experiments.points import Points, choose
from topd_jax.experiments.sweep import machine
from topd_jax.losses.optimal_transport import window_distance
from topd_jax.models.decoder import in_compute_dtype
from topd_jax.models.lora import join, merge_lora, split
from topd_jax.objectives.objective import Objective
from topd_jax.sampling import rollout
from topd_jax.training.config import Settings
from topd_jax.training.phases import make_optimizer
from topd_jax.training.restore import load_student, require_checkpoint
from topd_jax.training.score import read
from topd_jax.training.setup import Pair, load_pair
from topd_jax.training.step import init_state, update
from topd_jax.training.teachers import shared_rows
from topd_jax.types import Annotations, Candidates, Trajectories, Windows

# Names as those of a sweep's variants.
METHODS = {
    "opd": {"variant": "opd"},
    "topd:teacher": {"variant": "topd", "context": "teacher"},
    "topd:student": {"variant": "topd", "context": "student"},
}


def goal_of(objective: Objective, method: str) -> Objective:
    """The objective of a method, all else as the run has it.

    Args:
      objective: of the run.
      method: a key of :data:`METHODS`.
    """
    return dataclasses.replace(looking_ahead(objective), **METHODS[method])


def as_batch(
    teacher: Any, point: Points, objective: Objective
) -> tuple[Trajectories, Annotations]:
    """One point as the batch of an update; the window is all that counts.

    Args:
      teacher: the frozen model, which reads the windows.
      point: N = 1.
      objective: of :func:`goal_of`.

    Returns:
      Trajectories [1, P] and [1, K], and annotations with M = 1.
    """
    ours, theirs = point.ours, point.theirs
    none = jnp.zeros(ours.tokens.shape)
    written = Trajectories(
        point.prefix.tokens,
        point.prefix.mask,
        ours.tokens,
        ours.mask,
        logp=none,
        truncated=jnp.zeros(none.shape[:1], bool),
    )
    states = None
    if objective.needs_window_hidden:
        along = written.replace(tokens=theirs.tokens, mask=theirs.mask)
        states = read(teacher, along)[:, None]
    yes = jnp.ones((none.shape[0], 1), bool)
    # Token losses serve metrics only, and nobody asks for them.
    notes = Annotations(
        read(teacher, written),
        none,
        candidates=Candidates(jnp.zeros(yes.shape, jnp.int32), yes),
        student_windows=_in_slot(ours),
        teacher_windows=_in_slot(theirs),
        distance=point.distance[:, None],
        plan=point.plan[:, None],
        divergent=yes,
        false_alarm=~yes,
        capped=~yes,
        teacher_window_hidden=states,
    )
    return written, jax.lax.stop_gradient(notes)


def _in_slot(windows: Windows) -> Windows:
    return jax.tree.map(lambda x: x[:, None], windows)


def make_correction(
    objective: Objective,
    optimizer: optax.GradientTransformation,
    *,
    eos_ids: tuple[int, ...],
    pad_id: int,
) -> Callable[..., tuple[Windows, jax.Array]]:
    """A jitted local correction.

    Args:
      objective: of :func:`goal_of`.
      optimizer: its state is fresh at every call.
      eos_ids: end-of-sequence ids.
      pad_id: id put where nothing is.

    Returns:
      (student, teacher, point, updates i32[]) -> (the corrected student's
      greedy continuation of the prefix [1, K], updates that were left out
      because something was not finite). The student is not changed.
    """

    @jax.jit
    def correct(
        student: Any, teacher: Any, point: Points, updates: jax.Array
    ) -> tuple[Windows, jax.Array]:
        frozen = split(student)[1]
        batch = as_batch(teacher, point, objective)

        def step(_: jax.Array, state: Any) -> Any:
            state, _ = update(
                state, teacher.head, *batch, frozen,
                objective=objective, optimizer=optimizer,
            )  # fmt: skip
            return state

        state = init_state(student, optimizer)
        # Their number is data: none at all is the same program.
        state = jax.lax.fori_loop(0, updates, step, state)
        written = rollout(
            in_compute_dtype(merge_lora(join(state.student, frozen))),
            point.prefix,
            jax.random.key(0),  # greedy: no lot is drawn
            max_new_tokens=point.ours.tokens.shape[-1],
            temperature=0.0,
            eos_ids=eos_ids,
            pad_id=pad_id,
            vocab_size=shared_rows(student, teacher),
        )
        return Windows(written.tokens, written.mask), state.skipped

    return correct


def measure(
    student: Any,
    teacher: Any,
    points: Points,
    objective: Objective,
    optimizer: optax.GradientTransformation,
    *,
    updates: int,
    eos_ids: tuple[int, ...],
    pad_id: int,
) -> dict[str, dict[str, np.ndarray]]:
    """Corrects every point by itself, with every method.

    Args:
      student: where each correction starts; not changed.
      teacher: the frozen model.
      points: of :func:`~topd_jax.experiments.points.choose`.
      objective: of the run; see :func:`goal_of`.
      optimizer: its state is fresh for every point.
      updates: M, on each point.
      eos_ids: end-of-sequence ids.
      pad_id: id put where nothing is.

    Returns:
      :data:`BEFORE` or a key of :data:`METHODS` -> {"distance": f32[N], 0..2,
      of the greedy continuation to the teacher's; "first": bool[N], its first
      token is the teacher's; "same": bool[N], all of it is; "skipped":
      i32[N], updates that were not finite}.
    """
    runs = {
        name: make_correction(
            goal_of(objective, name), optimizer, eos_ids=eos_ids, pad_id=pad_id
        )
        for name in METHODS
    }
    steps = {BEFORE: ("opd", 0)} | {name: (name, updates) for name in METHODS}
    written: dict[str, list] = {name: [] for name in steps}
    count = len(points.distance)
    for i in tqdm(range(count), desc="correct", unit="prefix", mininterval=2):
        for name, (method, number) in steps.items():
            done = runs[method](
                student, teacher, points.one(i), jnp.int32(number)
            )
            written[name].append(jax.device_get(done))
    # By the start's embedding: a method must not move what measures it.
    return {
        name: _compared(student.embedding, parts, points.theirs, objective)
        for name, parts in written.items()
    }


def _compared(
    embedding: jax.Array,
    parts: Sequence[tuple[Windows, np.ndarray]],
    theirs: Windows,
    objective: Objective,
) -> dict[str, np.ndarray]:
    """How near N continuations, [1, K] each, are to the teacher's [N, K]."""
    ours = jax.tree.map(lambda *x: np.concatenate(x), *[w for w, _ in parts])
    distance, _ = window_distance(
        embedding,
        *jax.tree.map(jnp.asarray, (ours, theirs)),
        epsilon=objective.epsilon,
        position_weight=objective.position_weight,
    )
    mine, wanted = (np.where(w.mask, w.tokens, -1) for w in (ours, theirs))
    alike = mine == wanted
    return {
        "distance": np.asarray(distance),
        "first": alike[:, 0],
        "same": alike.all(axis=1),
        "skipped": np.array([skipped for _, skipped in parts]),
    }


def require_correctable(
    settings: Settings, learning_rate: float | None
) -> None:
    """Refuses what cannot be corrected, before any model is made.

    Args:
      settings: of the run.
      learning_rate: of the correction; None takes the run's.

    Raises:
      ValueError: for several teachers, or a rate that is not above 0.
    """
    if settings.teachers:
        raise ValueError(
            "topd correct corrects towards one teacher and config.teachers "
            f"names {', '.join(settings.teachers)}; leave one, as "
            "config.teacher"
        )
    if learning_rate is not None and not learning_rate > 0:
        raise ValueError(
            f"--learning_rate={learning_rate} must be above 0; --updates=0 "
            "leaves the student as it is"
        )


def correct(
    settings: Settings,
    workdir: pathlib.Path,
    which: str,
    count: int,
    updates: int,
    learning_rate: float | None = None,
) -> dict[str, Any]:
    """What ``topd correct`` does: chooses points and corrects each.

    Args:
      settings: of the run; every method has its objective and optimizer.
      workdir: of the run; ``correct-WHICH`` with ``correct.json`` and the
        figure is written there.
      which: "latest", "best" or "start".
      count: divergent points, one a test prompt; fewer where there are none.
      updates: M, on each point.
      learning_rate: held constant; None takes ``optimizer.learning_rate``.

    Returns:
      JSON-able: what was done, the numbers of
      :func:`~topd_jax.experiments.correction_report.report`, :data:`PAPER` and
      the "figure".

    Raises:
      ValueError: without a checkpoint, for what :func:`require_correctable`
        refuses, or where nothing diverges.
    """
    require_checkpoint(workdir, which)
    require_correctable(settings, learning_rate)
    pair = load_pair(settings, workdir)
    with jax.set_mesh(pair.mesh):
        student, step = load_student(settings, workdir, pair, which)
        if learning_rate is not None:
            settings = _with_rate(settings, learning_rate)
        points, found = _measured(settings, pair, student, count, updates)
    numbers = report(found, points.distance)
    folder = workdir / f"correct-{which}"
    figure = plots.corrections(found, numbers["methods"], PAPER["mean"], folder)
    said = settings.to_dict()
    result = {
        "machine": machine(),
        "source": settings.student.source,
        "seed": settings.seed,
        "step": step,
        "count": len(points.distance),
        "window": settings.objective.window,
        "updates": updates,
        **numbers,
        "paper": PAPER,
        "config": {name: said[name] for name in ("objective", "optimizer")},
    }
    _write(result, found, folder)
    print(table(result), file=sys.stderr, flush=True)
    return result | {"figure": str(figure)}


def _with_rate(settings: Settings, learning_rate: float) -> Settings:
    options = dataclasses.replace(
        settings.optimizer, learning_rate=learning_rate
    )
    return dataclasses.replace(settings, optimizer=options)


def _measured(
    settings: Settings, pair: Pair, student: Any, count: int, updates: int
) -> tuple[Points, dict[str, dict[str, np.ndarray]]]:
    ids = dict(eos_ids=pair.tokenizer.eos_ids, pad_id=pair.tokenizer.pad_id)
    seen = observe(settings, pair, student, len(pair.test.records))
    points = choose(seen, count, ids["pad_id"])
    optimizer = make_optimizer(settings.optimizer, None)
    found = measure(
        student, pair.teacher, points, settings.objective, optimizer,
        updates=updates, **ids,
    )  # fmt: skip
    return points, found


def _write(
    result: Mapping[str, Any],
    found: Mapping[str, Mapping[str, np.ndarray]],
    folder: pathlib.Path,
) -> None:
    prefixes = {
        name: {key: values.tolist() for key, values in of_method.items()}
        for name, of_method in found.items()
    }
    (folder / "correct.json").write_text(
        json.dumps({**result, "prefixes": prefixes}, indent=1)
    )

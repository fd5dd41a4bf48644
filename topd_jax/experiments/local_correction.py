"""Does a local update correct a local divergence? (arXiv:2606.00305, §5.2)

One divergent point of each trajectory is taken by itself: its prefix y_{<t}
becomes a prompt and the K tokens from y_t on the whole completion, so that
nothing outside of the window has a gradient. From the same start, the student
takes M updates on this prefix and window by each method, with the loss of
training. Then it continues the prefix greedily, and its distance to the
teacher's continuation is measured with the start student's embedding.
"""

import dataclasses
import functools
import json
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from topd_jax.data.teachers import shared_vocab
from topd_jax.data.templates import require_same_prompts
from topd_jax.evaluation.comparisons import bootstrap_interval
from topd_jax.experiments import plots
from topd_jax.experiments.divergent_points import Points, choose
from topd_jax.experiments.observe import looking_ahead, observe
from topd_jax.experiments.plots import Groups
from topd_jax.experiments.records import machine
from topd_jax.experiments.sweep_report import BASELINE
from topd_jax.models.decoder import in_compute_dtype
from topd_jax.models.lora import join, merge_lora, split
from topd_jax.models.passes import trajectory_states
from topd_jax.objectives import presets
from topd_jax.objectives.loading import make_objective
from topd_jax.objectives.objective import Objective
from topd_jax.parallel import hosts
from topd_jax.sampling import rollout
from topd_jax.training.compiled import make_optimizer
from topd_jax.training.config import Settings
from topd_jax.training.restore import open_run
from topd_jax.training.step import init_state, train_step
from topd_jax.types import Candidates, Scored, Teacher, Trajectories, Windows

BEFORE = "before"


def correct(
    settings: Settings,
    workdir: pathlib.Path,
    which: str,
    count: int,
    updates: int,
) -> dict[str, Any]:
    """Choose divergent points and correct each of them by every method.

    Args:
      settings: of the run; the learning rate is held constant.
      workdir: of the run; ``correct-WHICH`` with ``correct.json`` and the
        figure is written there.
      which: "latest", "best" or "start".
      count: divergent points, one a test prompt; fewer where there are none.
      updates: M, on each point.

    Returns:
      JSON-able: what was done, the numbers of :func:`report` and the "figure".

    Raises:
      ValueError: for several teachers, a token loss that draws, without a
        checkpoint, or where nothing diverges.
    """
    if settings.teachers:
        raise ValueError(
            "topd correct corrects towards one teacher and config.teachers "
            f"names {', '.join(settings.teachers)}; leave one, as "
            "config.teacher"
        )
    ahead = looking_ahead(settings)
    methods = methods_of(make_objective(settings.objective), ahead)
    if methods[BASELINE].draws:
        raise ValueError(
            f"topd correct repeats updates on the same tokens and the token "
            f"loss of objective={settings.objective!r} draws anew in every "
            "step; take another objective, as topd"
        )
    folder = workdir / f"correct-{which}"
    with open_run(settings, workdir, which) as (setup, student, step):
        require_same_prompts(setup.test.records, "topd correct")
        tokenizer = setup.tokenizer
        prompts = len(setup.test.records)
        batches = observe(settings, setup, student, prompts, [ahead])
        points = choose(batches, count, tokenizer.pad_id)
        measured = measure(
            student, setup.teachers[0], points, methods, updates,
            optimizer=make_optimizer(settings.optimizer, None),
            eos_ids=tokenizer.eos_ids, pad_id=tokenizer.pad_id,
        )  # fmt: skip
    figure = folder / "correction-figure5.png"
    result = {
        "machine": machine(),
        "source": settings.student.source,
        "seed": settings.seed,
        "step": step,
        "count": len(points.distance),
        "window": ahead.near_future.window,
        "updates": updates,
        "methods": report(measured),
        "config": {
            "objective": settings.objective,
            "optimizer": dataclasses.asdict(settings.optimizer),
        },
    }
    prefixes = jax.tree.map(lambda x: x.tolist(), measured)
    text = json.dumps(result | {"prefixes": prefixes}, indent=1)

    def write() -> None:
        plots.corrections(measured, figure)
        (folder / "correct.json").write_text(text)

    hosts.from_first(write)
    return result | {"figure": str(figure)}


def methods_of(objective: Objective, ahead: Objective) -> dict[str, Objective]:
    """Return OPD and TOPD in both contexts.

    Args:
      objective: of a run; its token loss and the weight of its guidance are
        those of every method.
      ahead: what it looks ahead with.

    Returns:
      name -> objective; the first is :data:`BASELINE`.
    """
    pieces = (objective.token_loss, objective.temperature)
    topd = functools.partial(presets.topd, *pieces, ahead.near_future)
    if objective.guidance is not None:
        topd.keywords["guidance_weight"] = objective.guidance.weight
    return {
        BASELINE: presets.opd(*pieces),
        "topd": topd(),
        "topd(context='student')": topd(context="student"),
    }


def as_batch(
    teacher: Teacher, point: Points
) -> tuple[Trajectories, tuple[Scored]]:
    """Make a training batch of one point, in which the window is everything.

    Args:
      teacher: the frozen model, which reads the window.
      point: N = 1.

    Returns:
      Trajectories [1, P] and [1, K], and scores with M = 1.
    """

    def in_slot(tree: Any) -> Any:
        return jax.tree.map(lambda x: x[:, None], tree)

    window = point.student
    zeros = jnp.zeros(window.tokens.shape)
    written = Trajectories(
        point.prefix.tokens,
        point.prefix.mask,
        window.tokens,
        window.mask,
        logp=zeros,
        truncated=jnp.zeros(1, bool),
    )
    true = jnp.ones((1, 1), bool)
    scored = Scored(
        teacher.model.head,
        trajectory_states(teacher.model, written),
        zeros,  # token losses serve metrics only, which nobody reads here
        candidates=Candidates(jnp.zeros(true.shape, jnp.int32), true),
        student_windows=in_slot(window),
        teacher_windows=in_slot(point.teacher),
        distance=in_slot(point.distance),
        plan=in_slot(point.plan),
        divergent=true,
        false_alarm=~true,
        selected=~true,
    )
    return written, (jax.lax.stop_gradient(scored),)


def correct_points(
    student: Any,
    teacher: Teacher,
    points: Points,
    updates: jax.Array,
    *,
    objective: Objective,
    optimizer: optax.GradientTransformation,
    eos_ids: tuple[int, ...],
    pad_id: int,
) -> tuple[Windows, jax.Array]:
    """Correct points, each by itself.

    Args:
      student: where each correction starts; not changed.
      teacher: the frozen model.
      points: N of them.
      updates: i32[], M on each point; data, so that 0 needs no other program.
      objective: of a method.
      optimizer: its state is fresh for every point.
      eos_ids: end-of-sequence ids.
      pad_id: id of the padding.

    Returns:
      (the corrected students' greedy continuations of their prefixes [N, K];
      i32[N], updates skipped because something was not finite).
    """
    frozen = split(student)[1]

    def correct_one(point: Points) -> tuple[Windows, jax.Array]:
        point = jax.tree.map(lambda x: x[None], point)
        batch = as_batch(teacher, point)

        def step(_: jax.Array, state: Any) -> Any:
            return train_step(
                state, *batch, frozen, objective=objective, optimizer=optimizer
            )[0]

        state = init_state(student, optimizer)
        state = jax.lax.fori_loop(0, updates, step, state)
        written = rollout(
            in_compute_dtype(merge_lora(join(state.student, frozen))),
            point.prefix,
            jax.random.key(0),  # unused: greedy
            max_new_tokens=point.student.tokens.shape[-1],
            temperature=0.0,
            eos_ids=eos_ids,
            pad_id=pad_id,
            vocab_size=shared_vocab(student, [teacher]),
        )
        return Windows(written.tokens[0], written.mask[0]), state.skipped

    return jax.lax.map(correct_one, points)


def measure(
    student: Any,
    teacher: Teacher,
    points: Points,
    methods: Mapping[str, Objective],
    updates: int,
    **options: Any,
) -> dict[str, dict[str, np.ndarray]]:
    """Correct every point by itself, with every method.

    Args:
      student: where each correction starts; not changed.
      teacher: the frozen model.
      points: of :func:`~topd_jax.experiments.divergent_points.choose`.
      methods: of :func:`methods_of`.
      updates: M, on each point.
      **options: "optimizer", "eos_ids" and "pad_id" of
        :func:`correct_points`.

    Returns:
      :data:`BEFORE`, or a method -> {"distance": f32[N], 0..2, of the greedy
      continuation to the teacher's; "first": bool[N], its first token is the
      teacher's; "same": bool[N], all of it is; "skipped": i32[N], updates
      that were not finite}.
    """
    points = jax.tree.map(jnp.asarray, points)
    detector = methods["topd"].near_future.detector
    measured = {}
    for name, objective in methods.items():
        run = jax.jit(
            functools.partial(correct_points, objective=objective, **options)
        )
        steps = {name: updates}
        if name == BASELINE:
            steps = {BEFORE: 0} | steps
        for label, number in steps.items():
            windows, skipped = run(student, teacher, points, jnp.int32(number))
            # With the start's embedding: no method changes its own measure.
            distance, _ = detector(student.embedding, windows, points.teacher)
            same = _tokens(windows) == _tokens(points.teacher)
            values = {
                "distance": distance,
                "first": same[:, 0],
                "same": same.all(axis=1),
                "skipped": skipped,
            }
            measured[label] = hosts.on_host(values)
    return measured


def _tokens(windows: Windows) -> jax.Array:
    return jnp.where(windows.mask, windows.tokens, -1)


def report(measured: Groups) -> dict[str, dict[str, Any]]:
    """Return the numbers of §5.2.

    Args:
      measured: of :func:`measure`.

    Returns:
      JSON-able, by method: "mean", its 95 % bootstrap "interval" over
      prefixes, the shares "first" and "same" of prefixes, "skipped" updates
      and, except for OPD itself, "against_opd": the paired "difference" of
      means and its "interval".
    """
    numbers = {}
    for name, values in measured.items():
        distance = values["distance"]
        numbers[name] = {
            **_mean("mean", distance),
            "first": float(values["first"].mean()),
            "same": float(values["same"].mean()),
            "skipped": int(values["skipped"].sum()),
        }
        if name != BASELINE:
            numbers[name]["against_opd"] = _mean(
                "difference", distance - measured[BASELINE]["distance"]
            )
    return numbers


def _mean(name: str, values: np.ndarray) -> dict[str, Any]:
    return {
        name: float(values.mean()),
        "interval": bootstrap_interval(values[None]),
    }

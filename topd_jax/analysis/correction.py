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
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm import tqdm

from topd_jax.analysis import plots
from topd_jax.analysis.observe import looking_ahead, observe
from topd_jax.analysis.points import Points, choose
from topd_jax.analysis.report import interval
from topd_jax.annotate import read
from topd_jax.distill import init_state, update
from topd_jax.models.decoder import in_compute_dtype
from topd_jax.models.lora import join, merge_lora, split
from topd_jax.objective import Objective
from topd_jax.pair import Pair
from topd_jax.phases import make_optimizer
from topd_jax.sampling import rollout
from topd_jax.settings import Settings
from topd_jax.teachers import shared_rows
from topd_jax.transport import window_distance
from topd_jax.types import (
    Annotations,
    Candidates,
    Trajectories,
    Windows,
)

# Names as those of a sweep's variants.
METHODS = {
    "opd": {"variant": "opd"},
    "topd:teacher": {"variant": "topd", "context": "teacher"},
    "topd:student": {"variant": "topd", "context": "student"},
}
BEFORE = "before"
# METHOD §5: means over 1000 prefixes, K = 50, M = 5. §5.2 describes what is
# called context "teacher" here.
PAPER = {
    "mean": {BEFORE: 0.538, "opd": 0.350, "topd:teacher": 0.204},
    "count": 1000,
    "window": 50,
    "updates": 5,
}
UPDATES = PAPER["updates"]


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
      points: of :func:`~topd_jax.analysis.points.choose`.
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
    theirs = jax.tree.map(jnp.asarray, points.theirs)
    found = {}
    for name, parts in written.items():
        windows, skipped = jax.tree.map(lambda *x: np.concatenate(x), *[
            (w, np.atleast_1d(s)) for w, s in parts
        ])  # fmt: skip
        distance, _ = window_distance(
            student.embedding,
            jax.tree.map(jnp.asarray, windows),
            theirs,
            epsilon=objective.epsilon,
            position_weight=objective.position_weight,
        )
        ids = [np.where(w.mask, w.tokens, -1) for w in (windows, points.theirs)]
        alike = ids[0] == ids[1]
        found[name] = {
            "distance": np.asarray(distance),
            "first": alike[:, 0],
            "same": alike.all(axis=1),
            "skipped": skipped,
        }
    return found


def report(
    found: Mapping[str, Mapping[str, np.ndarray]], as_written: np.ndarray
) -> dict[str, Any]:
    """The numbers of §5.2.

    Args:
      found: of :func:`measure`.
      as_written: f32[N] distance of the window that the student sampled, by
        which the point was chosen.

    Returns:
      JSON-able: "as_written", its mean; by method "mean", its 95 % bootstrap
      "interval" over prefixes, "median", shares "first" and "same" (of
      :func:`measure`), "skipped" updates and "against_opd": the paired
      "difference" of means, its "interval", and the shares of prefixes
      "nearer" and "farther" than OPD.
    """
    base = found["opd"]["distance"]
    methods = {}
    for name, f in found.items():
        change = f["distance"] - base
        methods[name] = {
            "mean": float(f["distance"].mean()),
            "interval": interval(f["distance"][None]),
            "median": float(np.median(f["distance"])),
            "first": float(f["first"].mean()),
            "same": float(f["same"].mean()),
            "skipped": int(f["skipped"].sum()),
            "against_opd": {
                "difference": float(change.mean()),
                "interval": interval(change[None]),
                # Less than this is the solver's noise.
                "nearer": float((change < -1e-3).mean()),
                "farther": float((change > 1e-3).mean()),
            },
        }
    return {"as_written": float(np.mean(as_written)), "methods": methods}


def table(numbers: Mapping[str, Any]) -> str:
    """The numbers beside the paper's, for a terminal.

    Args:
      numbers: of :func:`report`.
    """
    lines = [
        f"{'distance to the teacher':24}{'mean (95 %)':>22}{'paper':>8}"
        f"{'minus OPD (95 %)':>27}{'first':>8}{'same':>8}"
    ]
    for name, m in numbers["methods"].items():
        low, high = m["interval"]
        mean = f"{m['mean']:.3f} ({low:.3f}–{high:.3f})"
        paper = PAPER["mean"].get(name)
        paper = "–" if paper is None else f"{paper:.3f}"
        change = ""
        if name != "opd":
            than = m["against_opd"]
            low, high = than["interval"]
            change = f"{than['difference']:+.3f} ({low:+.3f} to {high:+.3f})"
        lines.append(
            f"{name:24}{mean:>22}{paper:>8}{change:>27}"
            f"{m['first']:>8.3f}{m['same']:>8.3f}"
        )
    return "\n".join(lines)


def require_one_teacher(settings: Settings) -> None:
    """Refuses several teachers, before any model is made.

    Args:
      settings: of the run.

    Raises:
      ValueError: naming them.
    """
    if settings.teachers:
        raise ValueError(
            "topd correct corrects towards one teacher and config.teachers "
            f"names {', '.join(settings.teachers)}; leave one, as "
            "config.teacher"
        )


def correct(
    settings: Settings,
    pair: Pair,
    student: Any,
    folder: pathlib.Path,
    *,
    count: int,
    updates: int | None,
    learning_rate: float | None,
    facts: Mapping[str, Any],
) -> dict[str, Any]:
    """Chooses points, corrects each, and writes what came of it.

    Args:
      settings: of the run.
      pair: of the run.
      student: where each correction starts.
      folder: where ``correct.json`` and the figure are written.
      count: points, one a test prompt.
      updates: M; None takes :data:`UPDATES`.
      learning_rate: None takes the run's.
      facts: also to be recorded.

    Returns:
      JSON-able: what was done, the numbers of :func:`report`, :data:`PAPER`
      and the "figure".

    Raises:
      ValueError: for a rate that is not above 0, or where nothing diverges.
    """
    options, objective = settings.optimizer, settings.objective
    if learning_rate is None:
        learning_rate = options.learning_rate
    if not learning_rate > 0:
        raise ValueError(
            f"--learning_rate={learning_rate} must be above 0; --updates=0 "
            "leaves the student as it is"
        )
    updates = UPDATES if updates is None else updates
    options = dataclasses.replace(options, learning_rate=learning_rate)
    ids = dict(eos_ids=pair.tokenizer.eos_ids, pad_id=pair.tokenizer.pad_id)
    prompts = len(pair.test.records)
    seen = observe(settings, pair, student, prompts)
    points = choose(seen, count, ids["pad_id"])
    found = measure(
        student, pair.teacher, points, objective,
        make_optimizer(options, None), updates=updates, **ids,
    )  # fmt: skip
    numbers = report(found, points.distance)
    figure = plots.corrections(
        found, numbers["methods"], PAPER["mean"], folder
    )
    result = {
        **facts,
        "source": settings.student.source,
        "seed": settings.seed,
        "count": len(points.distance),
        "window": objective.window,
        "updates": updates,
        "learning_rate": learning_rate,
        "optimizer": "AdamW, constant rate, a fresh state for each prefix",
        "beta1": options.beta1,
        "beta2": options.beta2,
        "weight_decay": options.weight_decay,
        "clip": options.clip,
        "guidance_weight": objective.guidance_weight,
        **numbers,
        "paper": PAPER,
        "figure": str(figure),
    }
    prefixes = {
        name: {key: values.tolist() for key, values in of_method.items()}
        for name, of_method in found.items()
    }
    (folder / "correct.json").write_text(
        json.dumps(result | {"prefixes": prefixes}, indent=1)
    )
    return result

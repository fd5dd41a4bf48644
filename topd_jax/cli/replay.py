"""``topd replay``: a dumped step again, and where it stopped being finite."""

import dataclasses
import pathlib
import re
import tempfile
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from topd_jax.data.packing import PackedRows
from topd_jax.losses.divergences import forward_kl
from topd_jax.losses.fused import fused_weighted_sum
from topd_jax.models.io import runs
from topd_jax.models.passes import trajectory_states
from topd_jax.objectives.objective import Objective
from topd_jax.objectives.pieces import describe
from topd_jax.objectives.statistics import pick
from topd_jax.parallel import buckets, hosts
from topd_jax.parallel.compilation import keep_compiled
from topd_jax.parallel.layouts import loss_layout
from topd_jax.training.compiled import compile_step, phase_of, step_keys
from topd_jax.training.config import settings_from
from topd_jax.training.dumps import arrays_of, read_dump
from topd_jax.training.logging import read_jsonl
from topd_jax.training.loop import Run
from topd_jax.training.setup import Setup, load_setup
from topd_jax.training.sft import row_states
from topd_jax.training.step import TrainState, rows_by_teacher

_TIMES = ("seconds", "rate")
_SHOWN = 5  # tokens


def replay(
    dump: pathlib.Path,
    *,
    setup: Setup | None = None,
    objective: Objective | None = None,
) -> dict[str, Any]:
    """Repeat a dumped step from its checkpoint; the run is left alone.

    Args:
      dump: the directory, as a run names it in its alarm.
      setup: of the run; None loads the models that its settings name.
      objective: of the run; None makes the one that its settings name.

    Returns:
      "step", "alarm" and "text" of the dump; "same", whether batch and metrics
      came again bit for bit; "metrics", name -> [dumped, repeated]; of an
      update that was left out "began", see :func:`_began`.

    Raises:
      ValueError: for no dump, or one of other models, another objective or
        another number of devices.
    """
    about = read_dump(dump)
    there, here = about["devices"], jax.device_count()
    if there != here:
        raise ValueError(
            f"{dump} is of a run on {there} device(s) and here are {here}; "
            "repeat it on as many, in one process (on CPU: "
            f"XLA_FLAGS=--xla_force_host_platform_device_count={there})"
        )
    settings = settings_from(about["settings"])
    log = dataclasses.replace(
        settings.log, completions_every=0, tensorboard=False
    )
    settings = dataclasses.replace(settings, log=log)
    keep_compiled(settings.train.compilation_cache)
    setup = setup or load_setup(settings, dump)
    with tempfile.TemporaryDirectory() as folder, jax.set_mesh(setup.mesh):
        workdir = pathlib.Path(folder)
        if about["checkpoint"] is not None:
            saved = buckets.copied(dump / runs.LATEST)
            (workdir / runs.LATEST).symlink_to(saved.absolute())
        run = Run(settings, workdir, setup, objective)
        if describe(run.objective) != about["objective"]:
            raise ValueError(
                f"the objective of {dump} was given in Python; repeat the step "
                "there: topd_jax.cli.replay.replay(dump, objective=...)"
            )
        if about["restart"]:
            run.resume(run.step, about["restart"])
        run.repeat(about["step"])
        again = read_jsonl(workdir / "metrics.jsonl")[-1]
        out = {name: about[name] for name in ("step", "alarm", "text")}
        out |= _compared(about, again, run.batches[about["step"]])
        if again["skipped"]:
            out["began"] = _began(run)
        for part in (run.logs, run.checkpoints, run.best):
            part.close()
    return out


def _compared(
    about: dict[str, Any], again: dict[str, Any], batch: Any
) -> dict[str, Any]:
    """Lay the metrics side by side; "same" says whether batch and they are."""
    metrics = {
        name: [value, again.get(name)]
        for name, value in about["metrics"].items()
        if not name.startswith(_TIMES)
    }
    same = all(a == b for a, b in metrics.values()) and all(
        # Bytes: what is not a number equals itself too.
        about["batch"][name].tobytes() == np.asarray(x).tobytes()
        for name, x in jax.device_get(arrays_of(batch)).items()
    )
    return {"same": same, "metrics": metrics}


def _began(run: Run) -> dict[str, Any]:
    """Find what was not finite in the last step.

    An update that is left out changes nothing, so the student is still the one
    of the step.

    Returns:
      "parameters", those of student and teachers that are not finite;
      "num_tokens", how many tokens have a loss that is not, and the first of
      them as "tokens": row, place, id and text, loss, and the teacher's
      log-probability; "gradients", the parameters whose gradient is not.
    """
    rows = run.batches[run.step]
    teachers = run.setup.teachers
    scored = phase_of(run.phases, run.step).score(
        run.student, teachers, rows, step_keys(run.key, run.step)[1]
    )
    models = {"student": run.student} | {
        f"teacher {t.name}".rstrip(): t.model for t in teachers
    }
    losses = np.asarray(_token_losses(run, rows, scored))
    teacher = -np.concatenate([s.teacher_token_loss for s in scored])
    places = np.argwhere(np.asarray(rows.mask) & ~np.isfinite(losses))
    tokens = np.asarray(rows.tokens)
    return {
        "parameters": [
            f"{model} {name}"
            for model, tree in models.items()
            for name in not_finite(tree)
        ],
        "num_tokens": len(places),
        "tokens": [
            {
                "row": int(row),
                "place": int(place),
                "id": int(tokens[row, place]),
                "text": run.setup.tokenizer.decode([int(tokens[row, place])]),
                "loss": str(losses[row, place]),
                "teacher_logp": str(teacher[row, place]),
            }
            for row, place in places[:_SHOWN]
        ],
        "gradients": not_finite(_gradients(run, rows, scored)),
    }


def not_finite(tree: Any) -> list[str]:
    """Name the arrays in which something is not finite.

    Args:
      tree: of arrays; every process must call this with the same.

    Returns:
      Their paths.
    """
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return [
        # Without what nnx calls the array of a parameter, and qwix its scale.
        re.sub(
            r"\.value(\.scale)?$",
            "",
            jax.tree_util.keystr(path, simple=True, separator="."),
        )
        for path, x in leaves
        if jnp.issubdtype(x.dtype, jnp.floating)
        and not hosts.on_host(jax.jit(jnp.isfinite)(x).all())
    ]


def _token_losses(run: Run, rows: Any, scored: Any) -> jax.Array:
    """Compute the loss of every token [B, T], unweighted."""
    packed = isinstance(rows, PackedRows)
    states = row_states if packed else trajectory_states
    loss = forward_kl if packed else run.objective.token_loss
    layout = loss_layout(chunk_size=run.settings.train.chunk_size)

    @jax.jit
    def losses_of(student: Any, rows: Any, scored: Any) -> jax.Array:
        losses = []
        parts = rows_by_teacher(rows, scored, 1, layout)
        for (own, notes), teacher in zip(parts, scored, strict=True):
            offered = {"tokens": own.tokens, "uniforms": notes.uniforms}
            _, of_rows = fused_weighted_sum(
                states(student, own), student.head,
                notes.teacher_hidden, teacher.head_beside(student),
                own.mask.astype(jnp.float32), loss, layout=layout,
                rows=pick(loss, offered),
                temperature=1.0 if packed else run.objective.temperature,
            )  # fmt: skip
            losses.append(of_rows)
        return jnp.concatenate(losses)

    return losses_of(run.student, rows, scored)


def _gradients(run: Run, rows: Any, scored: Any) -> Any:
    """Compute the gradients of the step, as its optimizer is given them."""
    kept: list[Any] = []

    def update(gradients: Any, state: Any, params: Any = None) -> Any:
        jax.debug.callback(kept.append, gradients)
        return gradients, state

    # The step would keep the old student, and no trace of them.
    keeping = optax.GradientTransformation(lambda _: optax.EmptyState(), update)
    phases = run.objective.phases(run.settings.train.steps)
    objective, tokenizer = phase_of(phases, run.step), run.setup.tokenizer
    step = compile_step(
        run.settings, objective, keeping, eos_ids=tokenizer.eos_ids,
        pad_id=tokenizer.pad_id, mesh=run.setup.mesh,
    ).train_step  # fmt: skip
    zeros = (jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32))
    state = TrainState(
        jax.tree.map(jnp.copy, run.state.student), optax.EmptyState(), *zeros
    )
    jax.block_until_ready(step(state, rows, scored, run.frozen))
    jax.effects_barrier()
    return kept[0]

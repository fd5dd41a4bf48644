"""The training loop: read, dispatch the stages of a step, log, save, evaluate.

A run that is killed at any moment and started again with the same command
resumes from its last checkpoint and ends with the same bits: every step's
randomness comes from (run key, step), the data's position is saved, and logs
are cut back to the checkpoint.
"""

import json
import pathlib
import time
from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

import jax
from absl import logging
from tqdm import tqdm

from topd_jax.data import solutions as solution_data
from topd_jax.data.packing import PackedRows
from topd_jax.evaluation.metrics import better
from topd_jax.models.io import runs
from topd_jax.models.lora import join, split
from topd_jax.objectives.loading import make_objective, names_code, parse
from topd_jax.objectives.objective import Objective
from topd_jax.objectives.pieces import describe
from topd_jax.parallel import buckets, hosts, lock, sharding, stopping
from topd_jax.training import checkpointing, identity, recovery
from topd_jax.training.ahead import compile_ahead, trace_run
from topd_jax.training.compiled import (
    compile_phases,
    initial_state,
    make_optimizer,
    phase_of,
    step_keys,
)
from topd_jax.training.config import Settings, check_fits, settings_from
from topd_jax.training.logging import Clock, Logs, completion_rows
from topd_jax.training.recovery import say
from topd_jax.training.restore import require_same_settings
from topd_jax.training.setup import Setup, load_setup, with_models
from topd_jax.training.watch import Watch


def train(
    config: Mapping | Settings,
    workdir: str | pathlib.Path,
    *,
    objective: Objective | None = None,
    student: Any = None,
    teacher: Any = None,
    setup: Setup | None = None,
) -> dict[str, Any]:
    """Train a student by on-policy distillation; rerun to resume.

    Args:
      config: a ConfigDict, as the files in ``configs`` return it, or its
        :class:`~topd_jax.training.config.Settings`.
      workdir: where everything is written, and found again.
      objective: trains on this instead of ``config.objective``.
      student: any model instead of ``config.student``.
      teacher: any model instead of ``config.teacher``.
      setup: of the run, where it is loaded already; its student is let go.

    Returns:
      The final evaluation, name -> number.

    Raises:
      ValueError: for settings or files that do not fit together, before
        training starts.

    Example:
      ``topd.train(tiny.get_config(), "runs/mine", objective=topd.opd())``
    """
    settings = config if isinstance(config, Settings) else settings_from(config)
    workdir = buckets.as_path(workdir)
    require_solutions(settings)
    if objective is None:
        require_same_settings(settings, workdir)
    with lock.held(workdir):
        setup = setup or load_setup(settings, workdir)
        if student is not None or teacher is not None:
            setup = with_models(setup, student=student, teacher=teacher)
        with jax.set_mesh(setup.mesh):
            run = Run(settings, workdir, setup, objective)
            setup.student = None  # the run's own copy is the only one
            return run.train()


def require_solutions(settings: Settings) -> None:
    """Refuse a set of solutions that cannot be read, before models are made.

    Args:
      settings: of the run.

    Raises:
      ValueError: naming the setting.
    """
    offline = settings.offline
    told = offline.pack_length, offline.keep
    if offline.path:
        solution_data.find_set(offline.path)
    elif settings.is_offline and told != (0, "all"):
        raise ValueError(
            "offline.pack_length={} and offline.keep={} are for what topd "
            "generate wrote; set offline.path to its directory, or leave them "
            "at 0 and all".format(*told)
        )


class Run:
    """One training run in one work directory."""

    def __init__(
        self,
        settings: Settings,
        workdir: pathlib.Path,
        setup: Setup,
        objective: Objective | None = None,
    ) -> None:
        """Place models, open data, checkpoints and logs; resume.

        Args:
          settings: of the run.
          workdir: where everything is written.
          setup: models, tokenizer and data.
          objective: instead of the one that the settings name.

        Raises:
          ValueError: for a checkpoint of another run.
        """
        self.settings, self.workdir, self.setup = settings, workdir, setup
        workdir.mkdir(parents=True, exist_ok=True)
        self.name = parse(settings.objective)[0] if objective is None else "own"
        self.objective = objective or make_objective(settings.objective)
        check_fits(self.objective, settings)
        optimizer = make_optimizer(settings.optimizer, settings.train.steps)
        tokenizer = setup.tokenizer
        self.data = setup.stream(settings)
        self.key = jax.random.key(settings.seed)
        self.state = initial_state(setup.student, optimizer, setup.mesh)
        self.step, self.rollbacks, self.restart = 0, 0, None
        self.watch = Watch(settings.guard, settings.train.max_skipped)
        # The last two steps': an alarm is known one step late.
        self.batches: dict[int, Any] = {}
        self.phases = compile_phases(
            settings, self.objective, optimizer,
            eos_ids=tokenizer.eos_ids, pad_id=tokenizer.pad_id,
            shardings=jax.tree.map(lambda x: x.sharding, self.state),
            mesh=setup.mesh, teachers=setup.teachers,
            shared=objective is None and setup.is_ours
            and not names_code(settings.objective),
        )  # fmt: skip
        # Shared with the setup: a step neither changes nor donates it.
        self.frozen = split(setup.student)[1]
        self.shape = getattr(setup.student, "config", None)
        self.checkpoints, self.best = (
            checkpointing.Checkpoints(workdir / name, keep)
            for name, keep in (
                (runs.LATEST, settings.checkpoint.keep),
                (runs.BEST, 1),
            )
        )
        latest = self.checkpoints.newest_intact()
        self.best.newest_intact(required=False)
        if latest is not None:
            self.resume(latest)
        self.logs = self.open_logs()
        self.evaluator = setup.evaluator(settings)
        self._record_settings()

    def _record_settings(self) -> None:
        if not hosts.is_first():
            return
        text = json.dumps(self.settings.to_dict(), indent=1)
        (self.workdir / runs.SETTINGS).write_text(text)
        # So that the run can be the source of another one.
        with buckets.uploaded(self.workdir / runs.TOKENIZER) as folder:
            self.setup.tokenizer.save_pretrained(folder)

    def open_logs(self) -> Logs:
        """Open the logs, cut back to the step that the run goes on from."""
        return Logs(self.workdir, step=self.step or -1, watch=self.watch,
                    tensorboard=self.settings.log.tensorboard)  # fmt: skip

    def resume(self, step: int, restart: dict[str, Any] | None = None) -> None:
        """Take up a checkpoint; ``restart`` is of a roll-back."""
        saved, setup = self.checkpoints.record(step), self.setup
        where = str(self.workdir / runs.LATEST)
        changed = identity.require_same_settings(
            saved, self.settings, describe(self.objective), where
        )
        identity.require_same_models(
            saved, setup.teacher_fingerprints, setup.frozen_fingerprint, where
        )
        for line in changed:
            logging.warning("resumed with another setting: %s", line)
        recovery.require_steps(changed, self.settings, step, where)
        like = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(
                x.shape, x.dtype, sharding=x.sharding
            ),
            self.state,
        )
        self.state = None  # never two states on the devices
        self.state, self.key = self.checkpoints.restore(step, like)
        self.step = step
        self.best.drop_after(step)
        recovery.take_up(self, saved, restart)

    def repeat(self, last: int) -> None:
        """Make and log the steps up to one; evaluate and save nothing."""
        for step in range(self.step + 1, last + 1):
            self._one_step(step)
            self.step = step
        self.logs.flush()

    @property
    def student(self) -> Any:
        """The model as it is now, whole."""
        return join(self.state.student, self.frozen)

    def train(self) -> dict[str, Any]:
        """Run to the last step, evaluate and save.

        Returns:
          The final evaluation, name -> number.
        """
        settings, steps = self.settings, self.settings.train.steps
        bar = tqdm(
            total=steps, initial=self.step, unit="step", mininterval=1.0,
            desc=self.name, disable=not hosts.is_first(),
        )  # fmt: skip
        with jax.set_mesh(self.setup.mesh), bar, ExitStack() as signals:
            first, started = self.step + 1, time.perf_counter()
            if first <= steps:
                say(bar, "compiling rollout, score, train_step and evaluation; "
                    "later steps are fast")  # fmt: skip
                compiled = compile_ahead(trace_run(self))
            if self._owes_evaluation():
                self.evaluate()
            while self.step < steps:
                step = self.step + 1
                row = self._one_step(step)
                if recovery.attend(self):
                    bar.n, first = self.step, None
                    continue
                bar.update()
                if step == first:
                    jax.block_until_ready(self.state.step)
                    took = time.perf_counter() - started
                    say(bar, f"{compiled}, step {step} done in {took:.1f} s")
                    signals.enter_context(stopping.after_the_step())
                if row:
                    bar.set_postfix(
                        loss=row["loss"], kl=row["divergence"], refresh=False,
                        **self.watch.counts,
                    )  # fmt: skip
                self.step = step
                due = _is_due(step, settings.eval.every)
                self._stop(hosts.told_to_stop(wait=due or step == steps))
                if due:
                    self.evaluate()
                if _is_due(step, settings.checkpoint.every) and step < steps:
                    self.save()
            final = self._finished() or self.evaluate(final=True)
            if self.checkpoints.latest() != self.step:
                self.save()
            self._close()
        return final

    def place(self, batch: Any) -> Any:
        """Spread the rows of a batch over the mesh."""
        rows = batch if isinstance(batch, PackedRows) else batch.prompts
        return sharding.spread_rows(rows, self.setup.mesh)

    def _one_step(self, step: int) -> dict[str, float] | None:
        """Dispatch a step; return the metrics of the one before."""
        compiled = phase_of(self.phases, step)
        settings, teachers = self.settings, self.setup.teachers
        student = self.student
        timed = _is_due(step, settings.log.statistics_every)
        if timed:  # its stages are waited for, so nothing else may be pending
            self.logs.flush()
        started, clock = time.perf_counter(), Clock(timed)
        rollout_key, score_key = step_keys(self.key, step)
        batch = next(self.data)
        packed = isinstance(batch, PackedRows)
        prompts = self.place(batch)
        trajectories = clock(
            "rollout", compiled.rollout(student, teachers, prompts, rollout_key)
        )
        scored = clock(
            "score", compiled.score(student, teachers, trajectories, score_key)
        )
        extra = {}
        if timed:
            extra = compiled.statistics(student, teachers, trajectories)
            extra = clock("statistics", extra)
        self.state, metrics = clock(
            "update",
            compiled.train_step(self.state, trajectories, scored, self.frozen),
        )
        # What the teacher wrote beforehand is in its own files.
        if _is_due(step, settings.log.completions_every) and not packed:
            for line in completion_rows(
                step, trajectories, teachers, self.setup.tokenizer.decode,
                settings.log.completions,
            ):  # fmt: skip
                self.logs.write("completions", line)
        row = self.logs.later(step, metrics | extra, clock.times, started)
        if timed:
            row = self.logs.flush()
        before = self.batches.get(step - 1)
        self.batches = {step - 1: before, step: trajectories}
        return row

    def _stop(self, number: int) -> None:
        """Save and leave by a signal, if any; from a thread in evaluations.

        Not with 0: whoever restarts failed jobs must not think this one done.
        """
        if not number:
            return
        if self.step:
            self.save()
        self._close()
        saved = self.checkpoints.latest()
        done = f" and saved after step {saved}" if saved else ""
        stopping.leave(number, done)

    def _owes_evaluation(self) -> bool:
        """Whether the step to begin at is still to be evaluated."""
        due = self.step == 0 or _is_due(self.step, self.settings.eval.every)
        return due and not any(
            r["step"] == self.step and not r["final"] for r in self.logs.evals
        )

    def _close(self) -> None:
        for part in (self.logs, self.checkpoints, self.best):
            part.close()

    def _finished(self) -> dict[str, Any] | None:
        """Return the final evaluation of a finished run that is rerun."""
        # A run that was made longer has one of its earlier end too.
        ends = (r for r in self.logs.evals if r["final"])
        return next((r for r in ends if r["step"] == self.step), None)

    def evaluate(self, final: bool = False) -> dict[str, Any]:
        """Evaluate the student as it is, and log the result."""
        self.logs.flush()
        with stopping.answered_by(self._stop):
            row, problems = self.evaluator.evaluate(
                self.student, self.step, final=final,
                keep=self.settings.log.problems,
                pause=lambda: self._stop(hosts.told_to_stop(wait=True)),
            )  # fmt: skip
        others = (r for r in self.logs.evals if not r["final"])
        # None after a roll-back; or one of an attempt that saved nothing else.
        best = self.best.latest() is None or all(better(row, r) for r in others)
        if best and not final and self.settings.eval.every:
            self.best.drop_after(self.step - 1)
            self._save_to(self.best)
            if self.checkpoints.latest() == self.step:
                self.best.wait()  # what resumes here will not evaluate again
        self.logs.write("evals", row)
        for problem in problems:
            self.logs.write("problems", problem)
        return row

    def save(self) -> None:
        """Save a checkpoint of the step that was just made.

        Not while updates are left out, before the end: what a run rolls back
        to has made one.
        """
        self.logs.sync()
        recovery.tell(self)
        if self.watch.in_a_row and self.step < self.settings.train.steps:
            return
        self.best.wait()  # the run that resumes here will not save it again
        self._save_to(self.checkpoints)
        self.restart = None

    def _save_to(self, checkpoints: checkpointing.Checkpoints) -> None:
        record = identity.record(
            self.settings,
            describe(self.objective),
            self.setup.teacher_fingerprints,
            self.data.get_state(),
            self.shape,
            frozen=self.setup.frozen_fingerprint,
        ) | {"guard": {"rollbacks": self.rollbacks, "watch": self.watch.state}}
        checkpoints.save(self.step, self.state, self.key, record)


def _is_due(step: int, every: int) -> bool:
    return bool(every) and step % every == 0

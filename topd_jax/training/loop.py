"""The host loop: read, dispatch three jitted phases, log, save, evaluate.

A run that is killed at any moment and started again with the same command
goes on from its last checkpoint and ends with the same bits: every step's
randomness comes from (run key, step), the data's position is saved, and logs
are cut back to the checkpoint.
"""

import json
import pathlib
import signal
import sys
import time
from typing import Any

import jax
import numpy as np
import optax
from tqdm import tqdm

from topd_jax.cli.doctor import preflight
from topd_jax.data import solutions as solution_data
from topd_jax.data.packing import PackedRows
from topd_jax.evaluation.evaluator import Evaluator
from topd_jax.models.io import runs
from topd_jax.models.lora import join, split
from topd_jax.parallel import apart, hosts, sharding
from topd_jax.training import checkpointing
from topd_jax.training.config import Settings
from topd_jax.training.logging import Logs
from topd_jax.training.phases import make_optimizer, make_phases
from topd_jax.training.setup import Pair, load_pair
from topd_jax.training.step import TrainState, init_state
from topd_jax.training.teachers import Teachers
from topd_jax.types import Trajectories


def initial_state(
    pair: Pair, optimizer: optax.GradientTransformation
) -> TrainState:
    """The train state at step 0, spread over the mesh as its parameters are.

    Args:
      pair: whose student is copied, or of one with adapters these alone.
      optimizer: of the student.

    Returns:
      The state.
    """

    def make(student: Any) -> TrainState:
        return init_state(student, optimizer)

    shapes = jax.eval_shape(make, pair.student)
    shardings = sharding.tree_shardings(
        shapes, pair.mesh, pair.student.logical_axes
    )
    return jax.jit(make, out_shardings=shardings)(pair.student)


class Run:
    """One training run in one work directory."""

    def __init__(
        self, settings: Settings, workdir: pathlib.Path, pair: Pair
    ) -> None:
        """Places models, opens data, checkpoints and logs; resumes.

        Args:
          settings: of the run.
          workdir: where everything is written.
          pair: student, teacher, tokenizer and data.

        Raises:
          ValueError: for a checkpoint of another run, or a batch that does
            not divide over the mesh.
        """
        self.settings, self.workdir, self.pair = settings, workdir, pair
        workdir.mkdir(parents=True, exist_ok=True)
        self.mesh = pair.mesh
        self.optimizer = make_optimizer(
            settings.optimizer, settings.train.steps
        )
        self.phases = make_phases(
            settings,
            self.optimizer,
            eos_ids=pair.tokenizer.eos_ids,
            pad_id=pair.tokenizer.pad_id,
        )
        self.reading = apart.make_reading(settings, pair, self.phases)
        self.data = pair.stream(settings)
        self.key = jax.random.key(settings.seed)
        self.state = initial_state(pair, self.optimizer)
        # Shared with the pair: an update neither changes nor donates it.
        self.frozen = split(pair.student)[1]
        self.checkpoints, self.best = (
            checkpointing.Checkpoints(workdir / name, keep, self.mesh)
            for name, keep in (
                (runs.LATEST, settings.checkpoint.keep),
                (runs.BEST, 1),
            )
        )
        found = self.checkpoints.latest()
        self.step = 0 if found is None else self._resume(found)
        self.logs = Logs(
            workdir,
            step=-1 if found is None else found,
            tensorboard=settings.log.tensorboard,
        )
        self.evaluator = Evaluator(settings, pair)
        if hosts.is_first():
            (workdir / runs.SETTINGS).write_text(
                json.dumps(settings.to_dict(), indent=1)
            )
            # So that the run can be the source of another one.
            tokenizer = pair.hub_tokenizer or pair.tokenizer
            tokenizer.save_pretrained(workdir / runs.TOKENIZER)

    def _resume(self, step: int) -> int:
        found = self.checkpoints.record(step)
        where = str(self.workdir / runs.LATEST)
        checkpointing.require_same_run(
            found,
            self.settings,
            self.pair.teacher_fingerprint,
            where,
            frozen=self.pair.frozen_fingerprint,
        )
        like = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(
                x.shape, x.dtype, sharding=x.sharding
            ),
            self.state,
        )
        self.state = None  # never two states on the devices
        self.state, self.key = self.checkpoints.restore(step, like)
        self.data.set_state(found["data"])
        return step

    @property
    def student(self) -> Any:
        """The model as it is now, whole."""
        return join(self.state.student, self.frozen)

    def train(self) -> dict[str, Any]:
        """Runs to the last step, evaluates and saves.

        Returns:
          The final evaluation, name -> number.
        """
        settings, steps = self.settings, self.settings.train.steps
        bar = tqdm(
            total=steps, initial=self.step, unit="step", mininterval=1.0,
            desc=settings.objective.variant, disable=not hosts.is_first(),
        )  # fmt: skip
        with jax.set_mesh(self.mesh), bar:
            if self.step == 0:
                self.evaluate()
            while self.step < steps:
                row = self._one_step()
                bar.update()
                if row:
                    bar.set_postfix(
                        loss=row["loss"], kl=row["divergence"], refresh=False
                    )
                every, last = settings.eval.every, self.step == steps
                if every and self.step % every == 0:
                    self.evaluate()
                every = settings.checkpoint.every
                if every and self.step % every == 0 and not last:
                    self.save()
                if not last and hosts.told_to_stop(self.step):
                    self._stop()
            final = self._finished() or self.evaluate(final=True)
            if self.checkpoints.latest() != self.step:
                self.save()
        self._close()
        return final

    def _stop(self) -> None:
        """Saves and leaves, with the exit code of a process that SIGTERM ends.

        Not with 0: whoever restarts failed jobs must not think this one done.
        """
        self.save()
        self._close()
        if hosts.is_first():
            tqdm.write(
                f"topd: stopped by SIGTERM and saved after step {self.step}; "
                "the same command goes on from there",
                file=sys.stderr,
            )
        raise SystemExit(128 + signal.SIGTERM)

    def _close(self) -> None:
        for part in (self.logs, self.checkpoints, self.best):
            part.close()

    def _finished(self) -> dict[str, Any] | None:
        """The final evaluation, where a finished run is started again."""
        return next((r for r in self.logs.evals if r["final"]), None)

    def _one_step(self) -> dict[str, float] | None:
        """Dispatches a step; returns the metrics of the one before."""
        settings = self.settings
        step, every = self.step + 1, settings.log.statistics_every
        timed = bool(every) and step % every == 0
        if timed:  # its phases are waited for, so nothing else may be pending
            self.logs.flush()
        started = time.perf_counter()
        key = jax.random.fold_in(self.key, step)
        student = self.student
        clock = _Clock(timed)
        batch = next(self.data)
        packed = isinstance(batch, PackedRows)
        prompts = batch if packed else batch.prompts
        keys = jax.random.split(key)
        trajectories, notes = self.reading(student, prompts, keys, clock)
        extra = {}
        if timed:
            extra = clock(
                "statistics", self.reading.statistics(student, trajectories)
            )
        self.state, metrics = clock(
            "update",
            self.phases.update(
                self.state, self.reading.head, trajectories, notes, self.frozen
            ),
        )
        self.step = step
        every = settings.log.completions_every
        # What the teacher wrote beforehand stands in its own files.
        if every and step % every == 0 and not packed:
            self._log_completions(trajectories)
        row = self.logs.later(step, metrics | extra, clock.times, started)
        if timed:
            row = self.logs.flush()
        self._watch(trajectories)
        return row

    def evaluate(self, final: bool = False) -> dict[str, Any]:
        """Evaluates the student as it is, and logs the result."""
        self.logs.flush()
        row, written = self.evaluator.write_down(
            self.student,
            self.step,
            final=final,
            keep=self.settings.log.problems,
        )
        best = all(better(row, r) for r in self.logs.evals)
        self.logs.write("evals", row)
        for problem in written:
            self.logs.write("problems", problem)
        if best and not final:
            self._save_to(self.best)
        return row

    def save(self) -> None:
        """Saves a checkpoint of the step that was just made."""
        self.logs.sync()
        self._save_to(self.checkpoints)

    def _save_to(self, checkpoints: checkpointing.Checkpoints) -> None:
        checkpoints.save(
            self.step,
            self.state,
            self.key,
            checkpointing.record(
                self.settings,
                self.pair.teacher_fingerprint,
                self.data.get_state(),
                getattr(self.student, "config", None),
                frozen=self.pair.frozen_fingerprint,
            ),
        )

    def _log_completions(self, trajectories: Trajectories) -> None:
        rows = hosts.on_host(trajectories)
        decode = self.pair.tokenizer.decode
        size, names = len(rows.tokens), None
        wanted = range(min(self.settings.log.completions, size))
        if isinstance(self.pair.teacher, Teachers):
            # Rows are ordered by teacher: from all over the batch, then.
            wanted = [i * size // len(wanted) for i in wanted]
            names = self.pair.teacher.row_names(size)
        for i in wanted:
            prompt = rows.prompt[i][rows.prompt_mask[i]].tolist()
            tokens = rows.tokens[i][rows.mask[i]].tolist()
            self.logs.write(
                "completions",
                {
                    "step": self.step,
                    **({"teacher": names[i]} if names else {}),
                    "prompt": decode(prompt),
                    "completion": decode(tokens),
                    "truncated": bool(rows.truncated[i]),
                },
            )

    def _watch(self, trajectories: Trajectories) -> None:
        """Gives up, with the batch kept, after too many skipped updates."""
        if not self.logs.skipped:
            return
        self.logs.skipped = False
        skipped = int(hosts.on_host(self.state.skipped))
        if skipped <= self.settings.train.max_skipped:
            return
        path = self.workdir / f"skipped-{self.step}.npz"
        batch = hosts.on_host(vars(trajectories))
        if hosts.is_first():
            np.savez(path, **batch)
        self.logs.sync()
        raise FloatingPointError(
            f"{skipped} updates had a non-finite loss or gradient, more than "
            f"train.max_skipped={self.settings.train.max_skipped}; the last "
            f"batch is in {path}; lower optimizer.learning_rate, or raise "
            "objective.log_floor"
        )


def better(row: dict[str, Any], than: dict[str, Any]) -> bool:
    """Whether an evaluation beats another: accuracy, else reverse KL.

    Args:
      row: an evaluation.
      than: another one.
    """
    if row.get("exact_match") is not None:
        return row["exact_match"] > than["exact_match"]
    return row["reverse_kl"] < than["reverse_kl"]


class _Clock:
    """Seconds a phase; waits for each only in the steps that are timed."""

    def __init__(self, timed: bool) -> None:
        self.times: dict[str, float] = {}
        self._timed = timed
        self._last = time.perf_counter()

    def __call__(self, name: str, value: Any) -> Any:
        if self._timed:
            jax.block_until_ready(value)
            now = time.perf_counter()
            self.times[f"seconds_{name}"] = now - self._last
            self._last = now
        return value


def _require_solutions(settings: Settings) -> None:
    """Refuses a set that cannot be read, before any model is made."""
    offline = settings.offline
    if offline.path:
        solution_data.find_set(offline.path)
    elif settings.objective.offline and offline.pack_length:
        raise ValueError(
            f"offline.pack_length={offline.pack_length} packs what topd "
            "generate wrote; set offline.path to its directory, or "
            "offline.pack_length=0"
        )


def train(settings: Settings, workdir: pathlib.Path) -> dict[str, Any]:
    """Trains a student by on-policy distillation; resumes where it stopped.

    Args:
      settings: of the run.
      workdir: where everything is written, and found again.

    Returns:
      The final evaluation, name -> number.

    Raises:
      ValueError: for what the preflight finds, before a fresh run begins.
    """
    _require_solutions(settings)
    # A run that goes on has passed it.
    fresh = not checkpointing.has_steps(workdir / "checkpoints")
    looked = settings.train.preflight and fresh
    if looked:
        preflight.check_files(settings, workdir)
    pair = load_pair(settings, workdir, apart=True)
    if looked:
        preflight.check_pair(settings, pair)
    with jax.set_mesh(pair.mesh):
        run = Run(settings, workdir, pair)
    pair.student = None  # the run's own copy is the only one
    return run.train()

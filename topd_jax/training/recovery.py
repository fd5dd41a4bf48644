"""What a run refuses or tells when it resumes, and does when it goes wrong."""

import dataclasses
import sys
from collections.abc import Sequence
from typing import Any

import jax
from absl import logging
from tqdm import tqdm

from topd_jax.models.io import runs
from topd_jax.parallel import hosts
from topd_jax.sampling import Stream, stream_key
from topd_jax.training.compiled import make_schedule
from topd_jax.training.config import OptimizerSettings, Settings
from topd_jax.training.dumps import write_dump


def require_steps(
    changed: Sequence[str], settings: Settings, step: int, where: str
) -> None:
    """Refuse a run that has no step left to do what its settings ask for.

    Args:
      changed: settings that differ, each with its name at the begin.
      settings: of the run.
      step: of the checkpoint.
      where: the checkpoints' directory, for the error.

    Raises:
      ValueError: for an end before the checkpoint that it resumes from, or,
        at its end, another rate or clip.
    """
    if settings.train.steps < step:
        raise ValueError(
            f"train.steps={settings.train.steps} must be at least {step}, the "
            f"step of the checkpoint in {where}; raise it, or use another "
            "--workdir"
        )
    unused = [line for line in changed if line.startswith("optimizer.")]
    if settings.train.steps == step and unused:
        raise ValueError(
            f"the run in {where} is finished at train.steps={step}, and no "
            f"step would use what differs ({'; '.join(unused)}): raise "
            "train.steps, or use another --workdir"
        )


def _before(saved: dict[str, Any]) -> OptimizerSettings:
    """Return the optimizer's settings in the record of a checkpoint."""
    optimizer = saved["settings"]["optimizer"]
    known = {f.name for f in dataclasses.fields(OptimizerSettings)}
    return OptimizerSettings(
        **{name: optimizer[name] for name in known & optimizer.keys()}
    )


def tell_schedule(saved: dict[str, Any], settings: Settings, state: Any) -> str:
    """Log what another length or learning rate does to the next update.

    Args:
      saved: the record of the checkpoint.
      settings: of the run that continues it.
      state: the train state that was restored.

    Returns:
      The line; "" where the next update's rate and the length are the same.
    """
    before, steps = _before(saved), settings.train.steps
    length = saved["settings"]["train"]["steps"]
    tried, skipped = hosts.on_host((state.step, state.skipped))
    updates = int(tried - skipped)
    old, new = (
        float(make_schedule(*schedule)(updates))
        for schedule in ((before, length), (settings.optimizer, steps))
    )
    if (old, length) == (new, steps):
        return ""
    stretched = (
        f"the cosine ends at step {steps}, not {length}, and a share of the "
        "steps, such as guidance's, with it; "
    ) * (steps != length)
    line = (
        f"{stretched}the learning rate of update {updates + 1} is {new:.3g}, "
        f"not {old:.3g}"
    )
    logging.warning("%s", line)
    return line


def say(bar: Any, text: str) -> None:
    """Print one line above the progress bar, from the first process."""
    if hosts.is_first():
        bar.write(f"topd: {text}", file=sys.stderr)


def take_up(run: Any, saved: dict[str, Any], restart: Any = None) -> None:
    """Go on from a checkpoint whose state has just been restored.

    Args:
      run: that resumes, or rolls back.
      saved: the record of the checkpoint.
      restart: of a roll-back: "rollbacks", how many with this one, and "data",
        the position in the data to go on from.
    """
    guard = saved["guard"]
    run.watch.set_state(guard["watch"])
    run.rollbacks, run.restart = guard["rollbacks"], restart
    if restart:
        run.rollbacks = restart["rollbacks"]
        key = stream_key(run.key, Stream.ROLLBACK)
        run.key = jax.random.fold_in(key, run.rollbacks)
    run.data.set_state((restart or saved)["data"])
    tell_schedule(saved, run.settings, run.state)


def attend(run: Any) -> bool:
    """Tell of new alarms; after too many skipped updates roll back or give up.

    Args:
      run: that has just dispatched a step.

    Returns:
      Whether it was rolled back.

    Raises:
      FloatingPointError: where roll-backs do not help.
    """
    tell(run)
    watch, guard = run.watch, run.settings.guard
    if not watch.hopeless:
        return False
    if run.rollbacks < guard.rollbacks and run.checkpoints.latest():
        _roll_back(run)
        return True
    path = write_dump(run, watch.last_skipped._replace(name="given_up"))
    run.logs.sync()
    most, tries = run.settings.train.max_skipped, run.rollbacks
    saved = run.checkpoints.steps()
    where, removal = "resume", ""
    if not saved:
        where = (
            "nothing is saved yet to roll back to "
            f"(checkpoint.every={run.settings.checkpoint.every}); start again"
        )
    elif len(saved) > 1:
        removal = (
            f"; remove {run.workdir / runs.LATEST / str(saved[-1])} to resume "
            f"from step {saved[-2]}"
        )
    raise FloatingPointError(
        f"{most + 1} updates in a row had a non-finite loss or gradient, more "
        f"than train.max_skipped={most}"
        + f", also after {tries} roll-back(s)"
        * bool(tries)
        + f"; topd replay {path} shows where it began; {where} with a lower "
        f"optimizer.learning_rate or optimizer.clip{removal}"
    )


def tell(run: Any) -> None:
    """Print the first alarm of each name, and dump its step."""
    fresh, run.watch.fresh = run.watch.fresh, []
    for alarm in fresh:
        path = write_dump(run, alarm)
        say(
            tqdm, f"alarm {alarm.name} at step {alarm.step}: {alarm.text}; "
            f"topd replay {path} repeats it",
        )  # fmt: skip


def _roll_back(run: Any) -> None:
    """Return to the newest checkpoint; go on with other data and keys.

    A run that is killed and resumed makes the same steps, and so the same
    roll-back, again.
    """
    alarm, most = run.watch.last_skipped, run.settings.train.max_skipped
    run.logs.close()
    # The data go on where they are.
    restart = {"rollbacks": run.rollbacks + 1, "data": run.data.get_state()}
    run.resume(run.checkpoints.newest_intact(), restart)
    # What later steps left is undone; the next evaluation is the best.
    run.logs = run.open_logs()
    text = (
        f"to step {run.step}, from the {most + 1} skipped updates up to step "
        f"{alarm.step}"
    )
    line = {"step": run.step + 1, "alarm": "rollback", "text": text}
    run.logs.write("alarms", line)
    say(tqdm, f"rolled back {text}; other data and keys follow")

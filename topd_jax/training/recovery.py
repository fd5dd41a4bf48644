"""What a run does when it resumes with another schedule, or goes wrong."""

import dataclasses
import pathlib
from typing import Any

from absl import logging

from topd_jax.parallel import hosts
from topd_jax.training.compiled import make_schedule
from topd_jax.training.config import OptimizerSettings, Settings


def require_steps(settings: Settings, step: int, where: pathlib.Path) -> None:
    """Refuse to end a run before the checkpoint that it resumes from.

    Args:
      settings: of the run.
      step: of the checkpoint.
      where: the checkpoints' directory, for the error.

    Raises:
      ValueError: naming both numbers.
    """
    if settings.train.steps < step:
        raise ValueError(
            f"train.steps={settings.train.steps} must be at least {step}, the "
            f"step of the checkpoint in {where}; raise it, or use another "
            "--workdir"
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
    optimizer, steps = saved["settings"]["optimizer"], settings.train.steps
    known = {f.name for f in dataclasses.fields(OptimizerSettings)}
    before = OptimizerSettings(
        **{name: optimizer[name] for name in known & optimizer.keys()}
    )
    length = saved["settings"]["train"]["steps"]
    tried, skipped = hosts.on_host((state.step, state.skipped))
    updates = int(tried - skipped)
    old, new = (
        float(make_schedule(*schedule)(updates))
        for schedule in ((before, length), (settings.optimizer, steps))
    )
    if (old, length) == (new, steps):
        return ""
    stretched = f"the cosine ends at step {steps}, not {length}; " * (
        steps != length
    )
    line = (
        f"{stretched}the learning rate of update {updates + 1} is {new:.3g}, "
        f"not {old:.3g}"
    )
    logging.warning("%s", line)
    return line

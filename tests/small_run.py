"""A whole run in seconds: the tiny world with barely trained models."""

import sys
from pathlib import Path

from ml_collections import ConfigDict

from topd_jax.configs import tiny
from topd_jax.training.config import Settings, settings_from


def small_config() -> ConfigDict:
    """The tiny config, cut down until a run takes seconds."""
    config = tiny.get_config()
    config.student.unroll = config.teacher.unroll = 1
    world = config.world
    world.solutions = 400
    world.prompts = 64
    world.teacher_layers = world.student_layers = 1
    world.teacher_width = world.student_width = 32
    world.teacher_heads = world.student_heads = 2
    world.teacher_steps = world.student_steps = 3
    world.batch_size = 16
    config.data.batch_size = 8
    config.rollout.max_new_tokens = 16
    config.objective.candidates = 2
    config.objective.window = 4
    config.train.steps = 6
    config.train.preflight = False  # tests of its own; seconds a run
    config.log.statistics_every = 3
    config.log.completions_every = 3
    config.log.tensorboard = False
    config.eval.every = 4
    config.eval.problems = config.eval.final_problems = 8
    config.eval.batch_size = 8
    config.checkpoint.every = 2
    return config


def settings_with(cache: Path | None = None, **changes: object) -> Settings:
    """The small settings; changes as section__name=value."""
    config = small_config()
    if cache is not None:
        config.world.cache = str(cache)
    for name, value in changes.items():
        section, key = name.split("__")
        config[section][key] = value
    return settings_from(config)


def get_config() -> ConfigDict:
    """So that this file serves as --config."""
    return small_config()


if __name__ == "__main__":  # a run of its own, to be killed
    import os
    import signal

    from topd_jax.training import loop

    workdir, kill_at, where = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    name = {"before_save": "save", "after_step": "_one_step"}[where]
    plain = getattr(loop.Run, name)

    def deadly(self: loop.Run) -> object:
        if where == "before_save" and self.step == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        value = plain(self)
        if where == "after_step" and self.step == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        return value

    setattr(loop.Run, name, deadly)
    loop.train(settings_from(small_config()), workdir)

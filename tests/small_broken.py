"""A command line whose run fails in its numbers once: steps 5 and 6."""

from typing import Any

import jax.numpy as jnp

from topd_jax.training import loop


def breaking(run: loop.Run, steps: set[int], tries: int = 1) -> loop.Run:
    """Let the updates of these steps fail until a run has rolled back."""
    ((last, compiled),) = run.phases
    train_step = compiled.train_step

    def step(state: Any, *arguments: Any) -> tuple[Any, dict]:
        state, metrics = train_step(state, *arguments)
        if int(state.step) in steps and run.rollbacks < tries:
            metrics |= {"skipped": (jnp.ones(()), jnp.ones(()))}
        return state, metrics

    step.trace = train_step.trace
    run.phases = ((last, compiled._replace(train_step=step)),)
    return run


if __name__ == "__main__":
    from topd_jax.cli import main

    train = loop.Run.train
    loop.Run.train = lambda run: train(breaking(run, {5, 6}))
    main.main()

"""Compile a run's programs before their first calls, several at a time.

Python traces one program after another. XLA compiles without Python's lock,
so those that are traced compile in threads meanwhile.
"""

import os
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax

from topd_jax.parallel.sharding import mesh_in_use
from topd_jax.training.compiled import step_keys

# A name, and programs that compile one after the other.
Programs = tuple[str, Sequence[jax.stages.Traced]]

# XLA compiles even one program in several threads: as many programs as cores
# would wait for one another.
_AT_ONCE = max((os.cpu_count() or 1) // 2, 1)


def compile_ahead(programs: Iterable[Programs]) -> str:
    """Compile traced programs in parallel, and wait for all.

    A jitted function then finds its program at the first call with arguments
    of these shapes, dtypes and shardings; any other call compiles anew. No
    thread outlives this function, whatever is raised: an interpreter that
    ends while XLA compiles crashes.

    Args:
      programs: the next is asked for, and so traced, while those before it
        compile.

    Returns:
      For the log: the seconds of tracing and compiling each, and those that
      passed in all.
    """
    seconds: dict[str, float] = {}

    def finish(name: str, lowered: list[Any], tracing: float) -> None:
        begin = time.perf_counter()
        for program in lowered:
            program.compile()
        seconds[name] = tracing + time.perf_counter() - begin

    pool, jobs = ThreadPoolExecutor(_AT_ONCE), []
    start = begin = time.perf_counter()
    try:
        for name, traced in programs:
            lowered = [program.lower() for program in traced]
            tracing = time.perf_counter() - begin
            jobs.append(pool.submit(finish, name, lowered, tracing))
            begin = time.perf_counter()
        for job in jobs:
            job.result()
    finally:
        pool.shutdown(cancel_futures=True)
    each = ", ".join(f"{name} {taken:.1f} s" for name, taken in seconds.items())
    total = time.perf_counter() - start
    mesh = mesh_in_use()
    axes = mesh.shape.items() if mesh else ()
    where = ", ".join(f"{axis}={size}" for axis, size in axes if size > 1)
    return (
        f"compiled {each} (in parallel: {total:.1f} s)"
        f"{where and f' for the mesh {where}'}"
    )


def trace_run(run: Any) -> Iterator[Programs]:
    """Trace the programs of a run, each from what the one before returns.

    Args:
      run: that is about to make its next step; nothing of it changes.

    Yields:
      A stage's name and its programs.
    """
    position = run.data.get_state()
    prompts = run.place(next(run.data))
    run.data.set_state(position)
    models = run.student, run.setup.teachers
    key, _ = step_keys(run.key, 0)
    rollout = None
    for last, compiled in run.phases:
        if last <= run.step:
            continue
        if rollout is None:
            rollout = compiled.rollout.trace(*models, prompts, key)
            yield "rollout", [rollout]
        rows = rollout.out_info
        of = f" to step {last}" if len(run.phases) > 1 else ""
        score = compiled.score.trace(*models, rows, key)
        yield f"score{of}", [score]
        step = compiled.train_step
        step = step.trace(run.state, rows, score.out_info, run.frozen)
        yield f"train_step{of}", [step]
    if 0 < run.settings.log.statistics_every <= run.settings.train.steps:
        yield "statistics", [compiled.statistics.trace(*models, rows)]
    yield from run.evaluator.trace(run.student)

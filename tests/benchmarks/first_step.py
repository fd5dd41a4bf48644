"""The first step, which compiles: today's against that of an older commit.

Every measurement starts two processes on one empty compilation cache
(``JAX_COMPILATION_CACHE_DIR``, every program kept): ``cold`` is the seconds of
the first step in the first process, ``again`` those in the second.
"""

import functools
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from serving import serve

ROOT = Path(__file__).resolve().parents[2]


def first(commit, **spec):
    """Return a repetition: a cold process, then a second one.

    Args:
      commit: whose package steps; "" is this checkout.
      **spec: of the step, see ``ours.step``.
    """
    if commit:
        tree = tempfile.TemporaryDirectory(prefix="topd-")
        archive = subprocess.run(
            ["git", "archive", commit], cwd=ROOT, capture_output=True
        )
        if archive.returncode:
            raise RuntimeError(archive.stderr.decode())
        subprocess.run(
            ["tar", "x", "-C", tree.name], input=archive.stdout, check=True
        )

    def run():
        with tempfile.TemporaryDirectory() as cache:
            environment = os.environ | {
                "PYTHONPATH": tree.name if commit else str(ROOT),
                "JAX_COMPILATION_CACHE_DIR": cache,
                "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            }
            way = "before" if commit else "now"
            line = [sys.executable, __file__, way, json.dumps(spec)]
            return {
                key: float(
                    subprocess.run(
                        line, env=environment, stdout=subprocess.PIPE,
                        text=True, check=True,
                    ).stdout.split()[-1]
                )
                for key in ("cold", "again")
            }  # fmt: skip

    return run


def now(**spec):
    """Make the first step of this checkout."""
    import ours

    return ours.step(**spec)


def before(student, teacher, rows, prompt, new, objective):
    """Make the first step of commit f1e0a0f, by the names of its time."""
    import jax
    import optax
    from ours import IDS, model, prompts

    from topd_jax import Objective, annotate, init_state, rollout, update

    variant, options = objective
    goal = Objective(**options, variant=variant)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-4))
    read = jax.jit(functools.partial(annotate, objective=goal, **IDS))
    learn = jax.jit(
        functools.partial(update, objective=goal, optimizer=optimizer),
        donate_argnums=0,
    )
    judge = model(teacher, seed=1)
    state = init_state(model(student), optimizer)
    asked, key = prompts(rows, prompt, student["vocab_size"]), jax.random.key(0)

    def run():
        told = rollout(state.student, asked, key, max_new_tokens=new, **IDS)
        notes = read(state.student, judge, told, key)
        jax.block_until_ready(learn(state, judge.head, told, notes))

    return run


if __name__ == "__main__":
    if sys.argv[1] == "first":
        serve({"first": first})
    else:
        ways = {"now": now, "before": before}
        repetition = ways[sys.argv[1]](**json.loads(sys.argv[2]))
        start = time.perf_counter()
        repetition()
        print(time.perf_counter() - start)

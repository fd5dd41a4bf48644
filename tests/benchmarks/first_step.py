"""The first step, which compiles, in a process of its own.

Every measurement starts two processes on one empty compilation cache
(``JAX_COMPILATION_CACHE_DIR``, every program kept): ``cold`` is the seconds of
the first step in the first process, ``again`` those in the second. ``traced``
is how long Python traces and lowers in the second, which no cache spares.
``plain`` is a cold step of programs that XLA does not optimize: what is left
where its compiler does as little as it can.
"""

import json
import os
import subprocess
import sys
import tempfile
import time

import jax
from serving import serve

TRACING = (
    "/jax/core/compile/jaxpr_trace_duration",
    "/jax/core/compile/jaxpr_to_mlir_module_duration",
)


def first(**spec):
    """Return a repetition: a cold process, then a second one.

    Args:
      **spec: of the step, see ``ours.step``.
    """
    line = [sys.executable, __file__, "now", json.dumps(spec)]

    def seconds(cache, **more):
        environment = os.environ | more | {
            "JAX_COMPILATION_CACHE_DIR": cache,
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        }  # fmt: skip
        done = subprocess.run(
            line, env=environment, stdout=subprocess.PIPE, text=True, check=True
        )
        return json.loads(done.stdout.splitlines()[-1])

    def run():
        with tempfile.TemporaryDirectory() as cache:
            cold, again = seconds(cache), seconds(cache)
        with tempfile.TemporaryDirectory() as cache:
            plain = seconds(cache, JAX_DISABLE_MOST_OPTIMIZATIONS="1")
        return {
            "cold": cold["first"],
            "again": again["first"],
            "traced": again["traced"],
            "plain": plain["first"],
        }

    return run


def now(spec):
    """Make the step, and return its seconds and those of tracing."""
    from ours import step

    traced = 0.0

    def note(event, seconds, **_):
        nonlocal traced
        if event in TRACING:
            traced += seconds

    repetition = step(**spec)
    jax.monitoring.register_event_duration_secs_listener(note)
    start = time.perf_counter()
    repetition()
    return {"first": time.perf_counter() - start, "traced": traced}


if __name__ == "__main__":
    if sys.argv[1] == "first":
        serve({"first": first})
    else:
        print(json.dumps(now(json.loads(sys.argv[2]))))

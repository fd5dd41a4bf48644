"""The first step, which compiles, in a process of its own.

Every measurement starts two processes on one empty compilation cache
(``JAX_COMPILATION_CACHE_DIR``, every program kept): ``cold`` is the seconds of
the first step in the first process, ``again`` those in the second.
"""

import json
import os
import subprocess
import sys
import tempfile
import time

from serving import serve


def first(**spec):
    """Return a repetition: a cold process, then a second one.

    Args:
      **spec: of the step, see ``ours.step``.
    """
    line = [sys.executable, __file__, "now", json.dumps(spec)]

    def seconds(cache):
        environment = os.environ | {
            "JAX_COMPILATION_CACHE_DIR": cache,
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        }
        done = subprocess.run(
            line, env=environment, stdout=subprocess.PIPE, text=True, check=True
        )
        return float(done.stdout.split()[-1])

    def run():
        with tempfile.TemporaryDirectory() as cache:
            return {key: seconds(cache) for key in ("cold", "again")}

    return run


if __name__ == "__main__":
    if sys.argv[1] == "first":
        serve({"first": first})
    else:
        from ours import step

        repetition = step(**json.loads(sys.argv[2]))
        start = time.perf_counter()
        repetition()
        print(time.perf_counter() - start)

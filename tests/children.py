"""Scripts of this directory, run in a process of their own by the tests."""

import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
# The TPU compiler, on a machine without one, several at a time.
LIBTPU = {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}


def run_script(*arguments: object, **environment: str) -> str:
    """What python prints for them, a script's name first, in this directory.

    An assertion with its last words where it failed.
    """
    done = subprocess.run(
        [sys.executable, *map(str, arguments)],
        env=os.environ | {"JAX_PLATFORMS": "cpu"} | environment,
        cwd=HERE,
        capture_output=True,
        text=True,
        timeout=1200,
    )
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    return done.stdout


def on_eight_devices(*arguments: object) -> str:
    """:func:`run_script` on eight simulated devices."""
    flags = "--xla_force_host_platform_device_count=8"
    return run_script(*arguments, XLA_FLAGS=flags)

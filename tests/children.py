"""Scripts of this directory, run in a process of their own by the tests."""

import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

HERE = Path(__file__).parent
# The TPU compiler, on a machine without one, several at a time; it knows no
# flags of the CPU's, and compiles as it does for users.
LIBTPU = {
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "JAX_DISABLE_MOST_OPTIMIZATIONS": "0",
    "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
}


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


def run_topd(*arguments: object, cwd: Path) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of the command line, as a shell sees it."""
    done = subprocess.run(
        [sys.executable, "-m", "topd_jax.cli", *map(str, arguments)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=600,
    )
    return done.returncode, done.stdout, done.stderr


def starts_with(flags: str) -> bool:
    """Whether XLA knows all of these flags."""
    client = "from jaxlib import xla_client; xla_client.make_cpu_client()"
    done = subprocess.run(
        [sys.executable, "-c", client],
        env=os.environ | {"XLA_FLAGS": flags},
        stderr=subprocess.DEVNULL,
    )
    return done.returncode == 0


def simulated(devices: int | str) -> str:
    """XLA_FLAGS for so many devices, beside the flags of this process."""
    count = f"--xla_force_host_platform_device_count={devices}"
    return f"{os.environ.get('XLA_FLAGS', '')} {count}"


def on_eight_devices(*arguments: object) -> str:
    """:func:`run_script` on eight simulated devices, compiled anew.

    On CPU a program of several devices that is read from the compilation
    cache can wait for itself: its collectives have no order there.
    """
    return run_script(
        *arguments,
        XLA_FLAGS=simulated(8),
        JAX_ENABLE_COMPILATION_CACHE="false",
    )


def start_several(
    arguments: Sequence[object],
    count: int,
    *,
    devices: int = 1,
    last: Sequence[str] = (),
    scripts: Sequence[Sequence[str]] = (),
    **of_last: str,
) -> list[subprocess.Popen]:
    """Python with these arguments as so many processes of some devices each.

    Of more than one, each is told how to join the others; the last one may
    have more arguments, and variables of its environment. The last ones run
    the scripts of the tests, each with its arguments, in the place of ``-m``.
    """
    lines = [[sys.executable, *map(str, arguments)] for _ in range(count)]
    if count > 1:
        with socket.socket() as probe:
            probe.bind(("localhost", 0))
            address = f"localhost:{probe.getsockname()[1]}"
        several = [f"--coordinator={address}", f"--processes={count}"]
        for i, line in enumerate(lines):
            line += [*several, f"--process={i}"]
    lines[-1] += last
    for number, (script, *words) in enumerate(reversed(scripts), start=1):
        lines[-number][1:3] = [str(HERE / script), *words]
    plain = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": simulated(devices),
    }
    return [
        subprocess.Popen(
            line, env=plain | (of_last if line is lines[-1] else {}),
            text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )
        for line in lines
    ]  # fmt: skip


def finish(children: list[subprocess.Popen]) -> list[tuple[str, str, int]]:
    """What each process printed, stdout and stderr, and its exit code."""
    return [(*c.communicate(timeout=600), c.returncode) for c in children]

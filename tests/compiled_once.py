"""A small run that counts what it compiles; also a script on many devices.

python compiled_once.py WORKDIR
"""

import collections
import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path

import jax
from small_run import interrupted, run_in, settings_with

from topd_jax.training import loop

# The stages of a step, and of an evaluation.
PROGRAMS = ("_write", "score", "train_step", "_compare", "write", "compare")


@contextlib.contextmanager
def compilations() -> Iterator[list[str]]:
    """The names of the programs that are compiled within, or read back."""
    names: list[str] = []

    def listen(event: str, _: float, **about: str) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            names.append(about["fun_name"].removeprefix("jit(")[:-1])

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield names
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def check(run: loop.Run, programs: tuple[str, ...] = PROGRAMS) -> None:
    """These compile once each, others not, and none after the first step."""
    step, late = run._one_step, []
    with compilations() as names:

        def counted(number: int) -> object:
            row = step(number)
            late.append(len(names))
            return row

        run._one_step = counted
        run.train()
    times = collections.Counter(names)
    expected = dict.fromkeys(PROGRAMS, 0) | collections.Counter(programs)
    assert {name: times[name] for name in PROGRAMS} == expected, times
    assert not names[late[0] :], names[late[0] :]


def main(workdir: str) -> None:
    """Run on all devices, and resume, which compiles nothing anew."""
    whole, resumed = Path(workdir) / "whole", Path(workdir) / "resumed"
    settings = settings_with(mesh__fsdp=4, mesh__tensor=2)
    setup = loop.load_setup(settings, whole)
    with jax.set_mesh(setup.mesh):
        check(run_in(settings, whole, setup))
        with interrupted(4):
            run_in(settings, resumed, setup).train()
        check(run_in(settings, resumed, setup), ())
    print("each program once")


if __name__ == "__main__":
    main(*sys.argv[1:])

"""A command line that a signal reaches in one of its phases.

    small_stop.py PHASE SIGNAL topd's arguments

The process sends itself the signal; where the first is to end it at once, what
follows would take a minute.
"""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import jax

from topd_jax.cli import main
from topd_jax.evaluation import grading
from topd_jax.evaluation.evaluator import Evaluator
from topd_jax.parallel import stopping
from topd_jax.training.loop import Run

FOREVER = 60.0  # seconds
NUMBER = signal.Signals[sys.argv[2]]
# As hard to read as math-verify can be made to.
HOSTILE = "\\boxed{(x+y+z)^{300}}"


def send(_: object = None) -> None:
    os.kill(os.getpid(), NUMBER)


def before(owner: Any, name: str, action: Callable[..., None]) -> None:
    """Does something before each call of a function."""
    plain = getattr(owner, name)

    def acting(*arguments: Any, **options: Any) -> Any:
        action(*arguments)
        return plain(*arguments, **options)

    setattr(owner, name, acting)


def at_step(step: int, action: Callable[..., None]) -> Callable[..., None]:
    def acting(run: Any, at: int, *_: Any) -> None:
        if at == step:
            action(run)

    return acting


def compile_long(_: object) -> None:
    """Compiles, in the main thread, and is not back in Python for long."""

    def long(x: jax.Array) -> jax.Array:
        for i in range(4000):
            x = jax.numpy.sin(x) @ jax.numpy.cos(x + i)
        return x

    lowered = jax.jit(long).lower(jax.numpy.ones((3, 3)))
    threading.Timer(0.3, send).start()
    lowered.compile()


def send_and_wait(*_: object) -> None:
    send()
    time.sleep(FOREVER)


def send_twice(_: object) -> None:
    send()
    time.sleep(1)
    send_and_wait(_)


def grade(_: object) -> None:
    def say_and_send() -> None:
        me = str(os.getpid())
        workers = subprocess.run(["pgrep", "-P", me], stdout=subprocess.PIPE)
        print("\nworkers", *map(int, workers.stdout.split()), file=sys.stderr)
        send()

    threading.Timer(3.0, say_and_send).start()
    record = {"prompt": "", "answer": "1", "source": "", "index": 0}
    grading.grade_answers([record], [HOSTILE], deadline=20 * FOREVER)


def evaluate_long(_: Evaluator, student: Any, step: int) -> None:
    if step == 4:
        send_and_wait(student)


def evaluate_asked(_: Evaluator, student: Any, step: int) -> None:
    """One of several processes, which hear of it between two batches."""
    if step == 4:
        send()
        while not stopping.asked():
            time.sleep(0.01)


PHASES = {
    "step": (Run, "_one_step", at_step(3, send)),
    "twice": (Run, "_one_step", at_step(3, send_twice)),
    "compile": (Run, "_one_step", at_step(1, compile_long)),
    "asked": (Evaluator, "evaluate", evaluate_asked),
    "evaluate": (Evaluator, "evaluate", evaluate_long),
    "grade": (Run, "_one_step", at_step(1, grade)),
}


if __name__ == "__main__":
    owner, name, action = PHASES[sys.argv[1]]
    before(owner, name, action)
    # Whatever the shell that runs the tests ignores.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    del sys.argv[1:3]
    main.main()

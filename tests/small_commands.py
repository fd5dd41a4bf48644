"""Every command that runs a model, one after the other in one process.

    small_commands.py ROOT TOPD'S ARGUMENTS OF THE FIRST COMMAND

The first command joins the other processes. Prints what each returned, a line
of JSON a command.
"""

import json
import sys
from pathlib import Path

from topd_jax.cli import main
from topd_jax.parallel import hosts

ROOT, *FIRST = sys.argv[1:]
LATER = [a for a in FIRST if not a.startswith(("--coord", "--process"))]


def call(name: str, folder: str, *more: str) -> None:
    given = FIRST if name == "train" else LATER
    result = main._call(name, f"--workdir={ROOT}/{folder}", *given, *more)
    print(json.dumps({name: result}), flush=True)


def damage() -> None:
    files = [*Path(ROOT, "run/checkpoints/2/state").rglob("d/*")]
    max(files, key=lambda p: p.stat().st_size).write_bytes(b"")


if __name__ == "__main__":
    call("train", "run")
    # A number that fills neither the last batch nor the last shard.
    call("generate", "solutions", "--count=20")
    call("eval", "run", "--config.eval.samples=2")
    call("sample", "run", "--prompt=1+2?", "--prompt=3*4?", "--prompt=5?")
    call("inspect", "run", "--count=5")
    call("probe", "run", "--count=12", "--which=start")
    call("correct", "run", "--count=2", "--updates=1")
    call("export", "run", f"--output={ROOT}/exported")
    call("sweep", "sweep", "--config.sweep.variants=opd")
    hosts.from_first(damage)
    try:
        call("sample", "run")
    except ValueError as error:
        print(json.dumps({"refused": str(error)}))

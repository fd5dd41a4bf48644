"""Print ours and theirs, side by side in one run, as ratios.

    python -m tests.benchmarks [WORK ...] [--only ours] [--peers DIR]

WORK is the beginning of a name that ``--list`` prints: ``decode``,
``decode-8x64``. Without one, all run. Prints one JSON line a work.
"""

import argparse
import json
import os
import platform
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import jax
from peers import interpreter
from rounds import ROOT, measure
from works import Work, all_works

SEED = 0  # of weights and prompts


def chosen(prefixes: Sequence[str]) -> dict[str, Work]:
    """Return the works whose names begin so; all without a prefix.

    Raises:
      SystemExit: for a prefix of no work.
    """
    works = all_works()
    for prefix in prefixes:
        if not any(name.startswith(prefix) for name in works):
            raise SystemExit(
                f"WORK={prefix!r} begins no work; they are {', '.join(works)}"
            )
    begins = tuple(prefixes) or ("",)
    return {n: work for n, work in works.items() if n.startswith(begins)}


def environments(
    works: Sequence[Work], directory: Path
) -> dict[str, str | Exception]:
    """Return the interpreter of every peer, or why there is none."""
    out: dict[str, str | Exception] = {}
    for peer in {side.peer for work in works for side in work.values()} - {""}:
        try:
            out[peer] = interpreter(peer, directory)
        except (RuntimeError, OSError) as error:
            out[peer] = error
            print(json.dumps({"peer": peer, "skipped": str(error)}), flush=True)
    return out


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return 1 where a side failed."""
    parser = argparse.ArgumentParser(
        "python -m tests.benchmarks", description=__doc__.split("\n")[0]
    )
    parser.add_argument("work", nargs="*", help="beginning of a name; all")
    parser.add_argument("--list", action="store_true", help="print names")
    parser.add_argument("--only", choices=["ours"], help="without peers")
    parser.add_argument(
        "--peers", type=Path, default=ROOT / ".venv-peers",
        help="where their virtual environments are, or are made",
    )  # fmt: skip
    parser.add_argument(
        "--rounds", type=int, default=7, help="of first-*: half of them"
    )
    told = parser.parse_args(arguments)
    works = chosen(told.work)
    if told.list:
        print("\n".join(works))
        return 0
    if told.only:
        works = {
            name: {k: side for k, side in work.items() if not side.peer}
            for name, work in works.items()
        }
    pythons = environments(list(works.values()), told.peers.resolve())
    machine = {
        "cores": len(os.sched_getaffinity(0)),
        "cpu": platform.machine(),
        "jax": jax.__version__,
    }
    failed = False
    for name, work in works.items():
        rounds = told.rounds
        if name.startswith("first"):
            rounds = max(rounds // 2, 1)
        row = measure(work, rounds, pythons)
        failed |= "failed" in row
        head = {"work": name, "machine": machine, "seed": SEED}
        print(json.dumps({**head, "rounds": rounds, **row}), flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())

"""Print what refilled slots save, where lengths are spread like real ones.

    python tests/benchmarks/slots.py [--slots 8] [--limit 512] [--rounds 5]

Lengths are log-normal: median a tenth of the limit, sigma 1, at most the
limit. A fixed batch of ``slots`` rows waits for its longest row; the bound
that no order beats is max(longest row, all tokens / slots) steps. A step of
the bound takes as long as one of the fixed batch. Both take turns.
"""

import argparse
import functools
import json
import os
import platform
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import jax
import jax.numpy as jnp
import numpy as np
from ours import IDS, model, prompts, timed
from works import STUDENT

import topd_jax as topd
from topd_jax.sampling import slots as refilled

SEED = 0  # of lengths, weights and prompts


def counted(write):
    """Count the steps of a rollout in slots, as its loop does."""
    counts, plain = [], refilled.write_in_slots

    def watched(*args, **options):
        written = plain(*args, **options)
        jax.debug.callback(lambda n: counts.append(int(n)), written.steps)
        return written

    refilled_by = topd.sampling.rollouts
    refilled_by.write_in_slots = watched
    try:
        jax.block_until_ready(write())
        jax.effects_barrier()
    finally:
        refilled_by.write_in_slots = plain
        jax.clear_caches()
    return counts[0]


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    for name, default in (("slots", 8), ("rows-a-slot", 8), ("limit", 512),
                          ("prompt", 32), ("rounds", 5)):  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--seed", type=int, default=SEED)
    told = parser.parse_args()
    slots, limit = told.slots, told.limit
    rows = slots * told.rows_a_slot
    rng = np.random.default_rng(told.seed)
    lengths = limit / 10 * np.exp(rng.standard_normal(rows))
    lengths = np.clip(np.round(lengths), 1, limit).astype(np.int32)
    student = model(STUDENT)
    asked = prompts(rows, told.prompt, STUDENT["vocab_size"])
    key, limits = jax.random.key(told.seed), jnp.asarray(lengths)
    write = functools.partial(
        topd.rollout, student, max_new_tokens=limit, **IDS
    )

    def fixed():
        for i in range(0, rows, slots):
            some = jax.tree.map(lambda x, i=i: x[i : i + slots], asked)
            out = write(some, key, limits=limits[i : i + slots])
        return out

    def filled():
        return write(asked, key, limits=limits, slots=slots)

    tokens = int(lengths.sum())
    steps = {
        "fixed": int(lengths.reshape(-1, slots).max(1).sum()),
        "slots": counted(filled),
        "bound": max(int(lengths.max()), -(-tokens // slots)),
    }
    sides = {"fixed": fixed, "slots": filled}
    for side in sides.values():
        jax.block_until_ready(side())
    seconds = {name: [] for name in sides}
    for _ in range(told.rounds):
        for name, side in sides.items():
            seconds[name].append(timed(side)[1])
    bound = steps["bound"] / steps["fixed"]
    rounds = list(zip(*seconds.values(), strict=True))
    faster = statistics.median(a / b for a, b in rounds)
    row = {
        "machine": {
            "cores": len(os.sched_getaffinity(0)), "cpu": platform.machine(),
            "jax": jax.__version__,
        },
        "seed": told.seed, "rows": rows, "slots": slots, "limit": limit,
        "prompt": told.prompt, "rounds": told.rounds, "tokens": tokens,
        "steps": steps,
        "tokens_a_second": {
            name: round(tokens / statistics.median(s))
            for name, s in seconds.items()
        },
        "slots/fixed": round(faster, 2),
        "slots/bound": {
            "steps": round(steps["bound"] / steps["slots"], 3),
            "seconds": round(faster * bound, 3),
        },
    }  # fmt: skip
    print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()

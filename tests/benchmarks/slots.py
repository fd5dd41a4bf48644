"""Print what refilled slots save, where lengths are spread like real ones.

    python tests/benchmarks/slots.py [--slots 8] [--limit 512] [--rounds 9]

Lengths are log-normal: median a tenth of the limit, sigma 1, at most the
limit; every round draws others. A fixed batch of ``slots`` rows waits for its
longest row; no order of rows takes fewer steps than the bound, max(longest
row, all tokens / slots). The bound reads prompts and takes steps as fast as the
fixed batch. "first" is what rows in order of their number allow, the next one
begun when one ends, with no loss at all: a step takes what one of a fixed batch
takes while its longest row is as long. All take turns.
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
from topd_jax.sampling import rollouts
from topd_jax.sampling.caches import stretches

SEED = 0  # of lengths, weights and prompts


def counting():
    """Return a list that grows by the steps of every rollout in slots."""
    counts, plain = [], rollouts.write_in_slots

    def watched(*args, **options):
        written = plain(*args, **options)
        jax.debug.callback(lambda n: counts.append(int(n)), written.steps)
        return written

    rollouts.write_in_slots = watched
    return counts


def draw(rows, limit, seed):
    """Draw the length of every row."""
    lengths = np.random.default_rng(seed).standard_normal(rows)
    lengths = np.round(limit / 10 * np.exp(lengths))
    return np.clip(lengths, 1, limit).astype(np.int32)


def first_come(lengths, slots, costs):
    """Return steps and seconds of rows that begin as soon as a slot is free.

    ``costs`` are (length, seconds a step while the longest row is no longer).
    """
    waiting, alive = list(lengths[::-1]), []  # (tokens, tokens to come)
    steps = seconds = 0
    while waiting or alive:
        while waiting and len(alive) < slots:
            alive.append((0, waiting.pop()))
        longest = max(n for n, _ in alive)
        steps += 1
        seconds += next(cost for end, cost in costs if longest < end)
        alive = [(n + 1, left - 1) for n, left in alive if left > 1]
    return steps, seconds


def costs_of(fixed, reading, rows, slots, limit):
    """Time a step of fixed batches, stretch by stretch of the cache."""
    begin, before, costs = 0, reading, []
    for end in stretches(limit):
        seconds = timed(fixed, jnp.full(rows, end))[1]
        batches = rows // slots
        costs.append((end, (seconds - before) / batches / (end - begin)))
        begin, before = end, seconds
    return costs


def main(arguments=None) -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    for name, default in (("slots", 8), ("rows-a-slot", 8), ("limit", 512),
                          ("prompt", 32), ("rounds", 9)):  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--seed", type=int, default=SEED)
    told = parser.parse_args(arguments)
    slots, limit = told.slots, told.limit
    rows = slots * told.rows_a_slot
    student = model(STUDENT)
    asked = prompts(rows, told.prompt, STUDENT["vocab_size"])
    key = jax.random.key(told.seed)
    write = functools.partial(
        topd.rollout, student, max_new_tokens=limit, **IDS
    )

    def fixed(lengths):
        for i in range(0, rows, slots):
            some = jax.tree.map(lambda x, i=i: x[i : i + slots], asked)
            out = write(some, key, limits=lengths[i : i + slots])
        return out

    def filled(lengths):
        return write(asked, key, limits=lengths, slots=slots)

    counts, sums, ratios, firsts = counting(), [], [], []
    ones = jnp.ones(rows, jnp.int32)  # prompts alone
    for number in range(-1, told.rounds):  # the first one compiles
        lengths = draw(rows, limit, told.seed + max(number, 0))
        limits, tokens = jnp.asarray(lengths), int(lengths.sum())
        seconds = [timed(side, limits)[1] for side in (fixed, filled)]
        reading = timed(fixed, ones)[1]
        jax.effects_barrier()
        longest = int(lengths.reshape(-1, slots).max(1).sum())
        bound = max(int(lengths.max()), -(-tokens // slots))
        if number >= 0:
            sums.append((tokens, longest, counts[-1], bound, *seconds))
            costs = costs_of(fixed, reading, rows, slots, limit)
            count, ideal = first_come(lengths, slots, costs)
            firsts.append(count)
            least = reading + (seconds[0] - reading) * bound / longest
            times = (seconds[0], least, reading + ideal)
            ratios.append([x / seconds[1] for x in times])
    tokens, *steps, one, other = np.sum(sums, axis=0)
    steps = dict(zip(("fixed", "slots", "bound"), map(int, steps), strict=True))
    faster, reached, possible = (
        round(statistics.median(x), 3) for x in zip(*ratios, strict=True)
    )
    machine = {
        "cores": len(os.sched_getaffinity(0)), "cpu": platform.machine(),
        "jax": jax.__version__,
    }  # fmt: skip
    row = {
        "machine": machine, **vars(told), "rows": rows, "steps": steps,
        "tokens_a_second": {
            "fixed": round(tokens / one), "slots": round(tokens / other),
        },
        "slots/fixed": faster,
        "slots/bound": {
            "steps": round(steps["bound"] / steps["slots"], 3),
            "seconds": reached,
        },
        "slots/first": {
            "steps": round(sum(firsts) / steps["slots"], 3),
            "seconds": possible,
        },
    }  # fmt: skip
    print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()

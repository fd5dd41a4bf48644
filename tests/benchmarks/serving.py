"""The child's half of a benchmark: one repetition for every line on stdin.

Imports only the standard library, because peers' environments import it too. On
stdout there is one JSON line when the work is warm, and one a repetition;
whatever a library prints goes to stderr.
"""

import importlib.metadata
import json
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

Row = dict[str, Any]


class Skip(Exception):
    """Say why a side cannot run here."""


class Channel:
    """Talk to the parent over stdin and stdout."""

    def __init__(self) -> None:
        self._out = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)

    def say(self, row: Row) -> None:
        """Answer with one JSON line."""
        print(json.dumps(row), file=self._out, flush=True)

    def wait(self) -> bool:
        """Wait for a line; False where the parent wants no more."""
        return bool(sys.stdin.readline())


def loss_arrays(
    rows: int, tokens: int, vocab: int, student: int, teacher: int
) -> Iterator[Any]:
    """Draw a fused loss's hidden states and head, then the teacher's."""
    import numpy as np

    draw = np.random.default_rng(0).standard_normal
    for width in (student, teacher):
        yield draw((rows, tokens, width), np.float32)
        yield draw((vocab, width), np.float32) / np.float32(width**0.5)


def status(field: str) -> float:
    """Read MiB of a field of /proc/self/status, VmRSS or VmHWM."""
    with open("/proc/self/status") as file:
        return int(re.search(rf"{field}:\s+(\d+)", file.read())[1]) / 1024


def serve(works: Mapping[str, Callable[..., Callable[[], Row]]]) -> None:
    """Build the work of the command line, then run it on demand.

    Args:
      works: name -> function of the specification that returns a function of
        one repetition, which returns its row. Of "loss", which has compiled
        by then, the first repetition's growth of the peak memory is told as
        ``extra_mb``.
    """
    channel = Channel()
    name, specification, package = sys.argv[1:4]
    try:
        run = works[name](**json.loads(specification))
    except Skip as reason:
        channel.say({"skip": str(reason)})
        return
    try:  # the peak so far is that of building
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
    except OSError:
        pass
    before = status("VmRSS")
    first = run()
    extra = round(status("VmHWM") - before)
    ready = {"version": importlib.metadata.version(package)} if package else {}
    if name == "loss":
        ready["extra_mb"] = extra
    channel.say(first | ready)
    while channel.wait():
        channel.say(run())

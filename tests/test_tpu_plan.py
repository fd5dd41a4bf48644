"""``topd plan`` with the real TPU compiler."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from children import LIBTPU

HERE = Path(__file__).parent

pytestmark = pytest.mark.slow


def topd(*arguments):
    pytest.importorskip("libtpu", reason="pip install libtpu")
    # large_run.py takes what it does not change from small_run.py beside it.
    env = os.environ | LIBTPU
    env |= {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(HERE)}
    return subprocess.run(
        [sys.executable, "-m", "topd_jax.cli.main", "plan", *arguments],
        env=env, capture_output=True, text=True, timeout=1800,
    )  # fmt: skip


def test_a_small_run_on_eight_chips(tmp_path):
    output = tmp_path / "plan.json"
    done = topd(
        f"--config={HERE / 'small_run.py'}",
        "--config.mesh.fsdp=2",
        "--topology=v5e:2x4",
        f"--output={output}",
    )
    assert done.returncode == 0, done.stderr[-3000:]
    plan = json.loads(output.read_text())["plan"]
    assert plan["fits"] and plan["mesh"]["data"] == 4
    names = [p["name"] for p in plan["programs"]]
    assert names == [
        "rollout", "annotate", "update", "statistics", "evaluate", "restore",
    ]  # fmt: skip
    assert all(p["total"] > 0 and p["seconds"] > 0 for p in plan["programs"])
    phases = {p["name"]: p for p in plan["phases"]}
    assert set(phases) == {
        "prefill", "decode", "scoring", "branches", "update",
    }  # fmt: skip
    # A student of one layer of width 32, written 15 times after the first.
    decode = phases["decode"]["cost"]
    least = 15 * 2 * (4 * 32 * 32 + 3 * 32 * 64 + 64 * 32)
    assert least <= decode["flops"] < 3 * least
    assert phases["update"]["cost"]["collectives"]["all-reduce"] > 0
    for word in ("arguments", "MFU", "looking ahead adds", "8 devices"):
        assert word in done.stdout


def test_a_teacher_on_its_own_chips(tmp_path):
    output = tmp_path / "plan.json"
    done = topd(
        f"--config={HERE / 'small_run.py'}",
        "--config.mesh.fsdp=2",
        "--config.teacher_mesh.devices=4",
        "--config.teacher_mesh.tensor=2",
        "--config.teacher_mesh.parts=2",
        "--topology=v5e:2x4",
        f"--output={output}",
    )
    assert done.returncode == 0, done.stderr[-3000:]
    plan = json.loads(output.read_text())["plan"]
    assert plan["fits"] and plan["mesh"]["data"] == 2
    assert plan["teacher_mesh"]["tensor"] == 2
    assert {p["name"] for p in plan["programs"]} > {"join", "read", "update"}
    # A part is written while another is scored.
    seconds = sum(p["seconds"] for p in plan["phases"])
    assert 0 < plan["step_seconds"] < seconds
    assert plan["moved"] > 8 * 16 * 32 * 4  # the teacher's hidden states
    for word in ("8 devices", "the teacher's mesh", "move between the meshes"):
        assert word in done.stdout


def test_a_teacher_on_hosts_of_its_own(tmp_path):
    output = tmp_path / "plan.json"
    done = topd(
        f"--config={HERE / 'small_run.py'}",
        "--config.mesh.fsdp=2",
        "--config.teacher_mesh.devices=8",
        "--config.teacher_mesh.tensor=2",
        "--topology=v5e:4x4",
        f"--output={output}",
    )
    assert done.returncode == 0, done.stderr[-3000:]
    plan = json.loads(output.read_text())["plan"]
    assert plan["fits"] and plan["mesh"]["data"] == 4
    assert plan["teacher_mesh"]["data"] == 4
    assert all(p["seconds"] > 0 for p in plan["programs"])


def test_chips_of_several_hosts_that_form_no_slice_are_refused():
    done = topd(
        f"--config={HERE / 'small_run.py'}",
        "--config.teacher_mesh.devices=16",
        "--topology=v5e:4x8",
    )
    assert done.returncode == 2
    (line,) = [x for x in done.stderr.splitlines() if x.startswith("topd:")]
    assert "16 chips of 4 hosts" in line and "teacher_mesh.devices=0" in line


def test_what_does_not_fit_is_told_and_what_would(tmp_path):
    done = topd(
        f"--config={HERE / 'large_run.py'}",
        "--topology=v5e:2x4",
        "--search=1500",
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "too much" in done.stdout
    assert "--config." in done.stdout.split("change:")[1].splitlines()[0]
    assert "fits" in done.stdout.split("change:")[1]


def test_an_unknown_topology_is_one_line():
    done = topd("--config=tiny", "--topology=v5e:9x9x9")
    assert done.returncode == 2
    assert done.stderr.startswith("topd: --topology v5e:9x9x9")
    done = topd("--config=tiny")
    assert "--topology is missing" in done.stderr

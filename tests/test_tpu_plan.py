"""``topd plan`` with the real TPU compiler."""

import json
import os
import re
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
        [sys.executable, "-m", "topd_jax.cli", "plan", *arguments],
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
    assert plan["mesh"]["data"] == 4 and plan["mesh"]["fsdp"] == 2
    costs = {p["name"]: p["cost"] for p in plan["programs"]}
    assert list(costs) == [
        "rollout", "score", "train_step", "statistics", "evaluate",
    ]  # fmt: skip
    assert all(p["temporaries"] > 0 for p in plan["programs"])
    # A student of one layer of width 32 writes a row: a prompt, 15 tokens.
    token = 2 * (4 * 32 * 32 + 3 * 32 * 64)
    head = 2 * 64 * 32
    least = 15 * (token + head)
    assert least <= costs["rollout"]["flops"] < 3 * least
    # Gradients are summed over the replicas.
    assert costs["train_step"]["sent"] > 0
    assert done.stdout.count("fits") == 5 and "8 devices" in done.stdout


def test_what_does_not_fit_is_told_and_what_may_help():
    done = topd(f"--config={HERE / 'large_run.py'}", "--topology=v5e:2x4")
    assert done.returncode == 0, done.stderr[-3000:]
    (missing,) = re.findall(r"([-\d.]+) too much", done.stdout)
    assert 0 < float(missing) < 8
    assert "change: --config." in done.stdout

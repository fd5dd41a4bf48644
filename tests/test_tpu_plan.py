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
        "compare",
    ]  # fmt: skip
    assert all(p["temporaries"] > 0 for p in plan["programs"])
    # A student of one layer of width 32 writes a row: a prompt, 15 tokens.
    token = 2 * (4 * 32 * 32 + 3 * 32 * 64)
    head = 2 * 64 * 32
    least = 15 * (token + head)
    assert least <= costs["rollout"]["flops"] < 3 * least
    # Gradients are summed over the replicas.
    assert costs["train_step"]["sent"] > 0
    assert done.stdout.count("fits") == 6 and "8 devices" in done.stdout


def test_what_does_not_fit_is_told_and_what_may_help():
    done = topd(f"--config={HERE / 'large_run.py'}", "--topology=v5e:2x4")
    assert done.returncode == 0, done.stderr[-3000:]
    (missing,) = re.findall(r"([-\d.]+) too much", done.stdout)
    assert 0 < float(missing) < 8
    assert "change: --config." in done.stdout


# Four layers of the smallest Qwen3.5: of what its scan repeats.
QWEN = {
    "model_type": "qwen3_5_text", "vocab_size": 1024, "hidden_size": 1024,
    "num_hidden_layers": 4, "intermediate_size": 3584, "head_dim": 256,
    "num_attention_heads": 8, "num_key_value_heads": 2, "hidden_act": "silu",
    "linear_num_key_heads": 16, "linear_num_value_heads": 16,
    "linear_key_head_dim": 128, "linear_value_head_dim": 128,
    "linear_conv_kernel_dim": 4, "full_attention_interval": 4,
    "rms_norm_eps": 1e-6, "attn_output_gate": True, "attention_bias": False,
    "tie_word_embeddings": True, "rope_parameters": {
        "rope_type": "default", "rope_theta": 1e7,
        "partial_rotary_factor": 0.25,
    },
}  # fmt: skip


def test_recurrent_layers_and_their_branches_compile(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(QWEN))
    done = topd(
        f"--config={HERE / 'small_run.py'}", "--topology=v5e:2x4",
        f"--config.student.source={tmp_path}", "--config.mesh.fsdp=8",
        f"--config.teacher.source={tmp_path}",
        "--config.objective=topd(candidates=16, window=4, branch_fraction=1.0)",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("fits") == 6

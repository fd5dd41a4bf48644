"""Every phase of a step compiles for a TPU topology, without a TPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("name", ["tiny", "smollm2_gsm8k"])
def test_phases_compile_for_v5e(name):
    pytest.importorskip("libtpu", reason="pip install libtpu")
    env = dict(
        os.environ,
        JAX_PLATFORMS="cpu",
        TPU_SKIP_MDS_QUERY="1",
        ALLOW_MULTIPLE_LIBTPU_LOAD="1",
    )
    done = subprocess.run(
        [sys.executable, HERE / "tpu_compile.py", name, "v5e:2x4"],
        env=env,
        capture_output=True,
        text=True,
        timeout=1200,
    )
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    for phase in ("rollout", "annotate", "update", "statistics"):
        assert f"{phase} compiled" in done.stdout, done.stdout

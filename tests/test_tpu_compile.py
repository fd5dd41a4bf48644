"""Every phase of a step compiles for a TPU topology, without a TPU."""

import pytest
from children import LIBTPU, run_script

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("name", ["tiny", "smollm2_gsm8k"])
def test_phases_compile_for_v5e(name):
    pytest.importorskip("libtpu", reason="pip install libtpu")
    said = run_script("tpu_compile.py", name, "v5e:2x4", **LIBTPU)
    for phase in ("rollout", "annotate", "update", "statistics"):
        assert f"{phase} compiled" in said, said


def test_arrays_are_sent_between_hosts_of_v5e():
    pytest.importorskip("libtpu", reason="pip install libtpu")
    said = run_script("tpu_transfers.py", "v5e:4x4", **LIBTPU)
    assert "sent between halves" in said, said

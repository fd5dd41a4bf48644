"""The base that ``topd growth`` doubles from: small, and every term visible."""

from ml_collections import ConfigDict

from topd_jax.configs import default


def get_config() -> ConfigDict:
    """Models of width 64 whose head weighs as much as their layers."""
    config = default.get_config()
    config.data.batch_size = 4
    config.eval.batch_size = 64  # sixteen devices divide it
    config.rollout.max_new_tokens = 64
    config.objective.candidates = 4
    config.objective.window = 4
    config.world.vocab_size = 2048  # up to 32,768
    for model in ("student", "teacher"):
        # A stack that is scanned: of one layer, decoding is another program.
        config.world[f"{model}_layers"] = 2
        config.world[f"{model}_width"] = 64
    return config

"""Every setting at its default; ``topd settings`` prints what each means.

Other files start from this one and change what differs.
"""

from ml_collections import ConfigDict

from topd_jax.training.config import default_config


def get_config() -> ConfigDict:
    """Return the default configuration."""
    return default_config()

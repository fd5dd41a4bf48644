"""Draw tokens from a model: rollouts, and branches off them.

* ``rollouts``: complete prompts; ``branches``: continue many prefixes at once;
* ``slots``: rollouts that hold fewer rows than they write; ``slot_cache``:
  what moves in their cache;
* ``drawing``: one step of both loops; ``samplers``: temperature, top-k, top-p;
* ``caches``: their rows and columns, whatever model keeps them;
* ``checks``: static checks, and ``checked`` for values;
* ``streams``: named random streams.
"""

from topd_jax.sampling.branches import branch, branch_columns
from topd_jax.sampling.checks import checked
from topd_jax.sampling.rollouts import rollout
from topd_jax.sampling.streams import Stream, stream_key

__all__ = [
    "Stream",
    "branch",
    "branch_columns",
    "checked",
    "rollout",
    "stream_key",
]

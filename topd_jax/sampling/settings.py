"""Settings of the student's rollouts."""

import dataclasses

from topd_jax.parallel.rules import DECODING
from topd_jax.sampling.samplers import MAX_TEMPERATURE
from topd_jax.settings import setting


@dataclasses.dataclass(frozen=True)
class RolloutSettings:
    """How the student writes, and the teacher its branches."""

    max_new_tokens: int = setting(48, "tokens (paper, App. B: 8000)", least=1)
    temperature: float = setting(
        1.0,
        "0 is greedy (paper, App. B: 1)",
        least=0,
        most=MAX_TEMPERATURE,
    )
    top_p: float = setting(1.0, "1 is off (paper, App. B)", above=0, most=1)
    top_k: int = setting(0, "0 is off", least=0)
    slots: int = setting(
        0,
        "rows of a batch that are written at once: the next one begins where "
        "one has ended, and the cache is of so many; 0: all. Training, "
        "evaluation and topd generate",
        least=0,
    )
    sharding: str = setting(
        "train",
        'where parameters are meanwhile: "train", as they are trained, '
        'gathered over fsdp at every token; "gathered", once, in compute '
        'dtype; "tensor": fsdp is a second tensor axis; "rows": as "tensor" '
        "for products, rows come back for attention",
        choices=DECODING,
    )
    branch_sharding: str = setting(
        "train",
        "the same while the teacher writes its branches",
        choices=tuple(s for s in DECODING if s != "tensor"),
    )

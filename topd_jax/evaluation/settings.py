"""Settings of evaluations."""

import dataclasses

from topd_jax.settings import setting


@dataclasses.dataclass(frozen=True)
class EvalSettings:
    """Accuracy on held-out problems, and how often."""

    every: int = setting(50, "steps; 0: at start and end, and no best", least=0)
    problems: int = setting(400, "on the interval", least=1, most=10_000_000)
    final_problems: int = setting(1000, "at the end", least=1, most=10_000_000)
    batch_size: int = setting(200, "problems at once", least=1, most=100_000)
    temperature: float = setting(1.0, "0 is greedy", least=0, most=1e3)
    samples: int = setting(
        1, "completions a problem (topd eval only)", least=1, most=10_000
    )
    benchmarks: tuple[str, ...] = setting(
        (),
        "topd eval only, instead of the test problems: JSONL files with "
        '"problem" or "question" and "answer", "tfds:NAME", "hub:NAME" or '
        '"reasoning_gym:TASK"',
    )

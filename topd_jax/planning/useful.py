"""How many tokens a step works on, and what its models must compute for them.

Operations of the models alone: 2 for every parameter that a token meets, 4 x
heads x head size for every column that it attends to, three times that in an
update (forward, and twice backward). Nothing that is computed again, padded or
masked counts, so that a share of a chip's peak made of it (MFU) compares
programs, whatever they recompute. Ours, after arXiv:2204.02311, appendix B.
"""

from collections.abc import Sequence

from topd_jax.models.config import DecoderConfig
from topd_jax.models.io.shapes import parameters_read
from topd_jax.training.config import Settings


def phase_work(
    settings: Settings,
    student: DecoderConfig,
    teachers: Sequence[tuple[int, DecoderConfig]],
) -> dict[str, tuple[int, float]]:
    """What each phase of a step has to do, over all devices.

    Every prompt and every rollout is as long as it may be.

    Args:
      settings: of the run.
      student: its shape.
      teachers: (prompts in a batch, shape) of each.

    Returns:
      "prefill", "decode", "scoring", "branches" and "update" -> (tokens
      worked on, operations of the models).
    """
    parts = [
        _work(settings, prompts, student, teacher)
        for prompts, teacher in teachers
    ]
    return {
        phase: tuple(sum(values) for values in zip(*of_phase, strict=True))
        for phase, of_phase in (
            (name, [part[name] for part in parts]) for name in parts[0]
        )
    }


def _work(
    settings: Settings,
    prompts: int,
    student: DecoderConfig,
    teacher: DecoderConfig,
) -> dict[str, tuple[int, float]]:
    """The same of one teacher's prompts."""
    data, objective = settings.data, settings.objective
    rows = prompts * data.samples
    prompt, new = data.max_prompt_length, settings.rollout.max_new_tokens
    writer = teacher if objective.offline else student
    whole = prompt + new
    steps = objective.candidates * (objective.window - 1)
    # A branch leaves the rollout anywhere: half of it lies before, on average.
    ahead = steps * (prompt + new // 2 + objective.window // 2)
    read = _forward(teacher, whole, whole**2 / 2, new)
    branch = _forward(teacher, steps, ahead, steps)
    learn = _forward(student, whole, whole**2 / 2, new)
    tokens = whole
    if objective.trains_on_branch:
        learn += _forward(student, steps, ahead, steps)
        tokens += steps
    filled = _forward(writer, prompt, prompt**2 / 2, 1)
    decoded = _forward(writer, new, new * (prompt + new / 2), new)
    learnt = 3 * learn + _head(teacher) * new
    return {
        "prefill": (prompts * prompt, prompts * filled),
        "decode": (rows * new, rows * decoded),
        "scoring": (rows * whole, rows * read),
        "branches": (rows * steps, rows * branch),
        "update": (rows * tokens, rows * learnt),
    }


def _forward(
    config: DecoderConfig, tokens: float, columns: float, logits: float
) -> float:
    """Operations to read tokens that attend to ``columns`` in all."""
    weights = 2.0 * parameters_read(config) - _head(config)
    attention = 4.0 * config.layers * config.heads * config.head_dim
    return weights * tokens + attention * columns + _head(config) * logits


def _head(config: DecoderConfig) -> float:
    return 2.0 * config.vocab_size * config.width

"""Settings of prompts, of written solutions, and of the tiny world."""

import dataclasses

from topd_jax.settings import check, setting


@dataclasses.dataclass(frozen=True)
class DataSettings:
    """Where prompts come from."""

    source: str = setting(
        "world",
        "of the prompts",
        choices=("world", "jsonl", "tfds", "hub", "reasoning_gym"),
    )
    path: str = setting(
        "",
        "JSONL file, TFDS name, hub name, or task of reasoning-gym: "
        "chain_sum(max_terms=4, size=2000)",
    )
    eval_path: str = setting("", 'held-out JSONL; "": held out of the prompts')
    split: str = setting("train", "TFDS or hub split")
    eval_split: str = setting("test", "the same for held-out prompts")
    prompt_field: str = setting("question", "of a record")
    answer_field: str = setting("answer", "of a record")
    teacher_field: str = setting("", "names one of config.teachers")
    prompts_per_teacher: tuple[int, ...] = setting(
        (),
        "prompts a step of each of config.teachers, by name; (): as many as "
        "their share of the records, at least one",
        least=1,
    )
    batch_size: int = setting(
        32, "prompts a step (paper, App. B: 1)", least=1, most=100_000
    )
    samples: int = setting(
        1, "rollouts a prompt (paper, App. B: 4)", least=1, most=10_000
    )
    max_prompt_length: int = setting(16, "tokens (paper, App. B: 800)", least=1)
    max_teacher_prompt_length: int = setting(
        0, "of what a teacher reads instead; 0: data.max_prompt_length", least=0
    )
    on_long_prompt: str = setting(
        "error", "what to do about it", choices=("error", "skip")
    )
    thinking: bool | None = setting(
        None, "enable_thinking of the chat template; None passes nothing"
    )
    end_ids: tuple[int, ...] = setting(
        (), "ids that end a completion, beside those of tokenizer and models",
        least=0,
    )  # fmt: skip
    held_out: int = setting(64, "prompts set aside without eval_path", least=1)


@dataclasses.dataclass(frozen=True)
class OfflineSettings:
    """Stage 1: how the teacher writes, and what the student reads (App. B)."""

    kd_ratio: float = setting(
        0.5, "forward KL's share of the loss (App. B)", least=0, most=1
    )
    temperature: float = setting(0.6, "App. B", least=0, most=1e3)
    top_p: float = setting(0.95, "App. B", above=0, most=1)
    shard_size: int = setting(256, "solutions a shard, at least", least=1)
    path: str = setting(
        "",
        'directory of topd generate; "": the teacher writes within each step. '
        "A step takes data.batch_size x data.samples solutions",
    )
    keep: str = setting(
        "all", "of them", choices=("all", "correct", "complete")
    )
    pack_length: int = setting(
        0,
        "tokens of a row of several solutions (App. B: 16384); 0: one each",
        least=0,
    )


@dataclasses.dataclass(frozen=True)
class WorldSettings:
    """The tiny world's models, trained from scratch and cached."""

    seed: int = setting(0, "of problems and models", least=0)
    from_scratch: bool = setting(
        False, "train the models also where the package has them"
    )
    cache: str = setting("", 'directory; "": WORKDIR/world')
    solutions: int = setting(50_000, "of each corpus", least=1)
    prompts: int = setting(
        20_000, "distinct problems that runs draw from", least=1
    )
    vocab_size: int = setting(64, "pieces of the tokenizer", least=1)
    teacher_layers: int = setting(3, "depth", least=1)
    teacher_width: int = setting(128, "of hidden states", least=1)
    teacher_heads: int = setting(4, "of attention", least=1)
    teacher_steps: int = setting(2300, "of pretraining", least=0)
    student_layers: int = setting(2, "depth", least=1)
    student_width: int = setting(96, "of hidden states", least=1)
    student_heads: int = setting(4, "of attention", least=1)
    student_steps: int = setting(2600, "of pretraining", least=0)
    student_left_to_right: float = setting(
        0.8, "share of problems read without precedence", least=0, most=1
    )
    student_drops_carry: float = setting(
        0.3, "share of additions with a carry", least=0, most=1
    )
    student_sharpness: float = setting(
        1.0, "factor of the trained student's logits", above=0, most=100
    )
    batch_size: int = setting(64, "solutions a step", least=1)
    learning_rate: float = setting(2e-3, "peak", least=0, most=1)

    def __post_init__(self) -> None:
        check(self, "world")
        for name in ("teacher", "student"):
            width = getattr(self, f"{name}_width")
            heads = getattr(self, f"{name}_heads")
            # Rotary positions turn pairs of a head's numbers.
            if width % (2 * heads):
                raise ValueError(
                    f"world.{name}_width={width} must be divisible by "
                    f"2 x world.{name}_heads={heads}"
                )

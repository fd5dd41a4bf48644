"""Settings of a model: where it comes from and how it computes."""

import dataclasses

from topd_jax.models.config import DELTA_TARGETS, LORA_TARGETS
from topd_jax.settings import setting


@dataclasses.dataclass(frozen=True)
class ModelSettings:
    """One model of a run."""

    source: str = setting(
        "world",
        '"world", or "world:student" for a teacher that is the initial '
        'student; "student" for one that is the student of every step '
        "(SDFT, OPSD), of which there is no copy; "
        "a Hugging Face directory or hub name; a .gguf file; "
        '"package:NAME" for the GGUF file of an installed package; or a '
        "run's work directory (WORKDIR, WORKDIR/best, "
        "WORKDIR/checkpoints/STEP)",
    )
    keep_layers: tuple[int, ...] = setting(
        (), "indices of layers kept; () keeps all"
    )
    dtype: str = setting(
        "float32",
        "compute (paper: bfloat16)",
        choices=("float32", "bfloat16"),
    )
    param_dtype: str = setting(
        "float32", "of the parameters", choices=("float32", "bfloat16")
    )
    remat: str = setting(
        "none",
        "what a layer recomputes in the backward pass",
        choices=("none", "dots", "full"),
    )
    unroll: int = setting(1, "layers unrolled in the scan", least=1)
    attention: str = setting(
        "blocks",
        'of many queries: "blocks" of them, or "flash", TPU kernels that skip '
        "what is masked (arXiv:2205.14135, 2307.08691), on a GPU cuDNN's",
        choices=("blocks", "flash"),
    )
    quantize: str = setting(
        "",
        "large matrices kept as integers, frozen: of a teacher, or of a "
        "student that has adapters",
        choices=("", "int8", "int4"),
    )
    lora_rank: int = setting(
        0,
        "r of low-rank adapters (arXiv:2106.09685), the only thing trained; "
        "0: the whole student is",
        least=0,
    )
    lora_alpha: float = setting(
        16.0, "scale is alpha / r (PEFT's scripts)", above=0, most=1e6
    )
    lora_targets: tuple[str, ...] = setting(
        (),
        "maps that have adapters; (): all that a model has, but never experts",
        choices=LORA_TARGETS + DELTA_TARGETS,
    )
    lora_rank_stabilised: bool = setting(
        False, "scale alpha / sqrt(r) instead (arXiv:2312.03732)"
    )
    adapter: str = setting(
        "",
        "directory or hub name of a PEFT adapter to start from; the "
        "teacher's is merged into it, or stands beside it where it is "
        "quantized",
    )
    prompt: str = setting(
        "",
        "what a teacher reads instead of the student's prompt: a template over "
        "fields of a record, '{question} The answer is {answer}.'; a record's "
        'own teacher_prompt comes first; "": the same',
    )

    @property
    def in_world(self) -> bool:
        """Whether it is a model of the tiny world."""
        return self.source in ("world", "world:student")

    @property
    def is_student(self) -> bool:
        """Whether it is a teacher that is the current student."""
        return self.source == "student"

    def world_part(self, section: str) -> str:
        """Return which of the world's models it is.

        Args:
          section: of the config that these settings are.

        Returns:
          "student" or "teacher".
        """
        own = section == "student" or self.source == "world:student"
        return "student" if own else "teacher"

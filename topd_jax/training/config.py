"""The door where a ConfigDict becomes frozen dataclasses, and stops.

``configs/default.py`` documents every knob with its unit and source; the
dataclasses here mirror its sections, and nothing past :func:`settings_from`
sees a ConfigDict. A key that no section has is an error that names the
nearest one.
"""

import dataclasses
import hashlib
import json
import typing
from collections.abc import Mapping

from topd_jax.models.quantization import check_quantized
from topd_jax.objectives.objective import Objective
from topd_jax.parallel.sharding import DECODING
from topd_jax.parallel.teacher_mesh import ONE_MESH, TeacherMeshSettings, check
from topd_jax.training.adapters import check_settings
from topd_jax.training.sections import build, flat
from topd_jax.training.teachers import check_teachers

# Of section eval, read by ``topd eval`` alone: no run depends on them.
EVAL_ONLY = ("samples", "benchmarks")
# What may change without making it another run.
NO_IDENTITY = (
    *(f"eval.{name}" for name in EVAL_ONLY), "train.preflight",
    "train.heartbeat",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class MeshSettings:
    """Sizes of the mesh axes; see ``sharding.make_mesh``."""

    data: int = -1
    fsdp: int = 1
    tensor: int = 1
    expert: int = 1
    sequence: int = 1


@dataclasses.dataclass(frozen=True)
class ModelSettings:
    """Where a model comes from and how it computes."""

    source: str = "world"
    keep_layers: tuple[int, ...] = ()
    dtype: str = "float32"
    param_dtype: str = "float32"
    remat: str = "none"
    unroll: int = 1
    attention: str = "blocks"
    quantize: str = ""
    quantize_tile: int = 0
    lora_rank: int = 0
    lora_alpha: float = 16.0
    lora_targets: tuple[str, ...] = ()
    lora_rank_stabilised: bool = False
    adapter: str = ""


@dataclasses.dataclass(frozen=True)
class DataSettings:
    """Where prompts come from."""

    source: str = "world"
    path: str = ""
    eval_path: str = ""
    split: str = "train"
    eval_split: str = "test"
    prompt_field: str = "question"
    answer_field: str = "answer"
    teacher_field: str = ""
    teacher_prompts: tuple[int, ...] = ()
    batch_size: int = 32
    samples: int = 1
    max_prompt_length: int = 16
    on_long_prompt: str = "error"
    thinking: bool | None = None
    end_ids: tuple[int, ...] = ()
    held_out: int = 64


@dataclasses.dataclass(frozen=True)
class RolloutSettings:
    """How the student (offline: the teacher) writes."""

    max_new_tokens: int = 48
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    sharding: str = "train"


@dataclasses.dataclass(frozen=True)
class OfflineSettings:
    """How the teacher writes in stage 1, and what is read of it (App. B)."""

    temperature: float = 0.6
    top_p: float = 0.95
    format: str = "array_record"
    shard_size: int = 256
    path: str = ""
    keep: str = "all"
    pack_length: int = 0


@dataclasses.dataclass(frozen=True)
class OptimizerSettings:
    """AdamW with linear warm-up and cosine decay."""

    learning_rate: float = 3e-4
    end_learning_rate: float = 1e-8
    warmup_fraction: float = 0.05
    beta1: float = 0.9
    beta2: float = 0.98
    eps: float = 1e-8
    weight_decay: float = 0.0
    clip: float = 1.0
    accumulate: int = 1


@dataclasses.dataclass(frozen=True)
class TrainSettings:
    """Length of the run and when to give up."""

    steps: int = 300
    max_skipped: int = 10
    preflight: bool = True
    heartbeat: int = 100


@dataclasses.dataclass(frozen=True)
class LogSettings:
    """What is written down, and how often (steps)."""

    every: int = 1
    statistics_every: int = 10
    completions_every: int = 50
    completions: int = 4
    problems: int = 8
    tensorboard: bool = True
    top_k: int = 16


@dataclasses.dataclass(frozen=True)
class EvalSettings:
    """Accuracy on held-out problems, and how often (steps; 0: never)."""

    every: int = 50
    problems: int = 400
    final_problems: int = 1000
    batch_size: int = 200
    temperature: float = 1.0
    split: str = "validation"
    samples: int = 1
    benchmarks: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class CheckpointSettings:
    """When the run is saved (steps; 0: only at the end)."""

    every: int = 50
    keep: int = 2


@dataclasses.dataclass(frozen=True)
class WorldSettings:
    """The tiny world's models, trained from scratch and cached."""

    seed: int = 0
    cache: str = ""
    solutions: int = 50_000
    prompts: int = 20_000
    vocab_size: int = 64
    teacher_layers: int = 3
    teacher_width: int = 128
    teacher_heads: int = 4
    teacher_steps: int = 2300
    student_layers: int = 2
    student_width: int = 96
    student_heads: int = 4
    student_steps: int = 2600
    student_left_to_right: float = 0.8
    student_drops_carry: float = 0.3
    batch_size: int = 64
    learning_rate: float = 2e-3


@dataclasses.dataclass(frozen=True)
class SweepSettings:
    """Runs of ``topd sweep``: every variant on every seed."""

    variants: tuple[str, ...] = ("opd", "topd:teacher", "topd:student")
    seeds: tuple[int, ...] = (0,)
    record: str = ""


_LEAST = {
    ("data", "batch_size"): 1,
    ("data", "samples"): 1,
    ("data", "max_prompt_length"): 1,
    ("data", "held_out"): 1,
    ("student", "lora_rank"): 0,
    ("rollout", "max_new_tokens"): 1,
    ("train", "steps"): 1,
    ("train", "max_skipped"): 0,
    ("train", "heartbeat"): 1,
    ("optimizer", "accumulate"): 1,
    ("log", "top_k"): 1,
    ("log", "problems"): 0,
    ("eval", "problems"): 1,
    ("eval", "final_problems"): 1,
    ("eval", "batch_size"): 1,
    ("eval", "samples"): 1,
    ("checkpoint", "keep"): 1,
    ("optimizer", "learning_rate"): 0,
    ("rollout", "temperature"): 0,
    ("offline", "temperature"): 0,
    ("offline", "shard_size"): 1,
    ("offline", "pack_length"): 0,
    ("eval", "temperature"): 0,
}

_CHOICES = {
    ("data", "source"): ("world", "jsonl", "tfds", "hub"),
    ("data", "on_long_prompt"): ("error", "skip"),
    ("rollout", "sharding"): tuple(DECODING),
    ("offline", "format"): ("array_record", "jsonl"),
    ("offline", "keep"): ("all", "correct", "complete"),
    ("eval", "split"): ("train", "validation", "test"),
}


@dataclasses.dataclass(frozen=True)
class Settings:
    """Everything a run is told; one field a section of the config."""

    seed: int
    mesh: MeshSettings
    student: ModelSettings
    teacher: ModelSettings
    data: DataSettings
    rollout: RolloutSettings
    objective: Objective
    offline: OfflineSettings
    optimizer: OptimizerSettings
    train: TrainSettings
    log: LogSettings
    eval: EvalSettings
    checkpoint: CheckpointSettings
    world: WorldSettings
    sweep: SweepSettings
    teachers: dict[str, ModelSettings] = dataclasses.field(default_factory=dict)
    teacher_mesh: TeacherMeshSettings = ONE_MESH

    def __post_init__(self) -> None:
        for (section, name), least in _LEAST.items():
            value = getattr(getattr(self, section), name)
            if value < least:
                raise ValueError(
                    f"{section}.{name}={value} must be at least {least}"
                )
        for (section, name), choices in _CHOICES.items():
            value = getattr(getattr(self, section), name)
            if value not in choices:
                raise ValueError(
                    f"{section}.{name}={value!r} must be one of "
                    f"{', '.join(choices)}"
                )
        several = {f"teachers.{n}": m for n, m in self.teachers.items()}
        teachers = {"teacher": self.teacher} | several
        for name, model in ({"student": self.student} | teachers).items():
            check_quantized(name, model.quantize, model.quantize_tile)
        check_settings(self.student, teachers)
        check(self.teacher_mesh, self.objective, self.data, self.teachers)
        self._check_offline()
        rows = self.data.batch_size * self.data.samples
        if rows % self.optimizer.accumulate:
            raise ValueError(
                f"data.batch_size x data.samples = {rows} rows must be "
                f"divisible by optimizer.accumulate={self.optimizer.accumulate}"
            )
        if self.objective.window > self.rollout.max_new_tokens:
            raise ValueError(
                f"objective.window={self.objective.window} must not exceed "
                f"rollout.max_new_tokens={self.rollout.max_new_tokens}; lower "
                "the one or raise the other"
            )
        check_teachers(self.data, list(self.teachers))

    def _check_offline(self) -> None:
        path, what = self.offline.path, ""
        if not self.objective.offline:
            what = "needs objective.stage=offline"
        elif self.teachers:
            what = "is a set of one teacher; leave config.teachers out"
        if path and what:
            raise ValueError(f"offline.path={path!r} {what}")

    def to_dict(self) -> dict:
        """The settings as plain nested dictionaries, for JSON."""
        return json.loads(json.dumps(dataclasses.asdict(self)))

    def fingerprint(self) -> str:
        """Sixteen hex digits that change with any setting of a run.

        Settings at their default do not enter it: one that is added later
        leaves the fingerprints of earlier runs as they are.
        """
        known = defaults_of(self.to_dict())
        values = {
            name: value
            for name, value in flat(self.to_dict()).items()
            if name not in NO_IDENTITY and known.get(name, ...) != value
        }
        text = json.dumps(values, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def _defaults() -> dict[str, object]:
    made = {
        name: dataclasses.asdict(kind())
        for name, kind in typing.get_type_hints(Settings).items()
        if dataclasses.is_dataclass(kind)
    }
    return flat(json.loads(json.dumps(made)))


# "section.key" -> what a run that does not say has.
DEFAULTS = _defaults()


def defaults_of(tree: Mapping) -> dict[str, object]:
    """:data:`DEFAULTS`, and those of the sections that the settings name.

    Args:
      tree: what :meth:`Settings.to_dict` gives, of any version.

    Returns:
      "section.key" -> default; the source of one of ``teachers`` has none,
      for it makes the section.
    """
    keys = flat(dataclasses.asdict(ModelSettings()))
    return DEFAULTS | {
        f"teachers.{name}.{key}": DEFAULTS[f"teacher.{key}"]
        for name in tree.get("teachers", {})
        for key in keys
        if key != "source"
    }


def settings_from(config: Mapping) -> Settings:
    """Checks a config and turns it into frozen dataclasses.

    Args:
      config: a ConfigDict, or nested mappings, with the sections and keys of
        ``configs/default.py``.

    Returns:
      The settings.

    Raises:
      ValueError: an unknown key (naming the nearest), a missing section, a
        value of the wrong type or out of bounds.
    """
    return build(Settings, config, "config")

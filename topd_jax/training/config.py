"""All settings of a run: the rooms' dataclasses, composed and checked.

``topd settings`` prints every setting with its default, bounds and source.
Nothing past :func:`settings_from` sees a ConfigDict.
"""

import dataclasses
import hashlib
import json
import typing
from collections.abc import Mapping

from flax.traverse_util import flatten_dict
from ml_collections import ConfigDict, config_dict

from topd_jax.data.settings import (
    DataSettings,
    OfflineSettings,
    WorldSettings,
)
from topd_jax.data.teachers import check_teachers
from topd_jax.data.templates import check_templates
from topd_jax.evaluation.settings import EvalSettings
from topd_jax.models.adapters import check_settings
from topd_jax.models.settings import ModelSettings
from topd_jax.objectives.loading import make_objective
from topd_jax.objectives.objective import Objective
from topd_jax.parallel.settings import MeshSettings
from topd_jax.sampling.settings import RolloutSettings
from topd_jax.settings import build, check, setting

# What may change without making it another run. Samples and benchmarks are of
# ``topd eval`` alone.
NO_IDENTITY = (
    "eval.samples", "eval.benchmarks", "train.preflight", "train.heartbeat",
    "train.compilation_cache",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class OptimizerSettings:
    """AdamW with linear warm-up and cosine decay."""

    learning_rate: float = setting(
        3e-4, "peak (paper, App. B: 2e-6)", least=0, most=10
    )
    end_learning_rate: float = setting(
        1e-8, "of the cosine (the paper's trainer)", least=0, most=10
    )
    warmup_fraction: float = setting(
        0.05, "of the steps (paper, App. B)", least=0, most=1
    )
    beta1: float = setting(0.9, "the paper's trainer", least=0, below=1)
    beta2: float = setting(0.98, "the paper's trainer", least=0, below=1)
    eps: float = setting(1e-8, "of AdamW", above=0, most=1)
    weight_decay: float = setting(0.0, "the paper's trainer", least=0, most=10)
    clip: float = setting(
        1.0, "global norm of the gradient (paper, App. B)", above=0, most=1e9
    )
    accumulate: int = setting(1, "slices of a batch", least=1)


@dataclasses.dataclass(frozen=True)
class TrainSettings:
    """Length of the run, its stage, and when to give up."""

    steps: int = setting(300, "updates", least=1, most=1_000_000_000)
    stage: str = setting(
        "on_policy",
        '"on_policy"; or "offline", stage 1 (App. B): the teacher writes, '
        "the student learns by forward KL and cross-entropy",
        choices=("on_policy", "offline"),
    )
    max_skipped: int = setting(
        10, "non-finite updates in a row before rolling back or giving up",
        least=0,
    )  # fmt: skip
    preflight: bool = setting(True, "topd doctor before the first step")
    compilation_cache: str = setting(
        "auto",
        'of compiled programs; "auto": the user\'s cache directory; "off"; '
        "or a directory",
    )
    heartbeat: int = setting(
        100,
        "seconds without a sign of life after which one of several processes "
        "counts as dead, and the others stop with an error that names it",
        least=1,
    )
    chunk_size: int | None = setting(
        None, "tokens of a chunk of the fused losses; None: by shape", least=1
    )


@dataclasses.dataclass(frozen=True)
class LogSettings:
    """What is logged, and how often (steps)."""

    statistics_every: int = setting(
        10, "exact and sampled KLs, entropies; 0: never", least=0
    )
    completions_every: int = setting(50, "0: never", least=0)
    completions: int = setting(4, "how many", least=0)
    problems: int = setting(
        8, "graded completions of every evaluation, the same ones", least=0
    )
    tensorboard: bool = setting(True, "write for TensorBoard too")
    top_k: int = setting(16, "of the overlap statistics", least=1)


@dataclasses.dataclass(frozen=True)
class CheckpointSettings:
    """When the run is saved."""

    every: int = setting(50, "steps; 0: only at the end", least=0)
    keep: int = setting(2, "latest ones, beside the best", least=1)


@dataclasses.dataclass(frozen=True)
class GuardSettings:
    """When numbers raise an alarm, and what a run that goes wrong may do."""

    window: int = setting(
        50,
        "steps that are compared with: the last ones for loss and gradient, "
        "the first ones for truncation and repetition",
        least=2,
        most=10_000,
    )
    factor: float = setting(
        8.0, "times the 90th percentile of the last losses or gradients is a "
        "spike; entropy below the teacher's by it is a collapse",
        above=1, most=1e6,
    )  # fmt: skip
    rise: float = setting(
        0.5, "share of truncated rows or repeated tokens above the median",
        least=0, most=1,
    )  # fmt: skip
    rollbacks: int = setting(
        1,
        "after train.max_skipped, to the newest checkpoint, with other data "
        "and keys: one tells a bad batch from bad settings; 0: never",
        least=0,
    )
    dumps: int = setting(2, "newest directories in dumps that stay", least=1)


@dataclasses.dataclass(frozen=True)
class SweepSettings:
    """Runs of ``topd sweep``: every objective on every seed."""

    variants: tuple[str, ...] = setting(
        ("opd", "topd", "topd(context='student')"),
        'objectives, with other settings after a ";": "opd;train.steps=450"',
    )
    worlds: tuple[str, ...] = setting(
        (),
        "tiny worlds that all variants train in; (): that of the config. As "
        '"world.student_left_to_right=0.99;world.student_sharpness=2"',
    )
    seeds: tuple[int, ...] = setting((0,), "of the runs")


@dataclasses.dataclass(frozen=True)
class Settings:
    """All run settings; one field a section of the config."""

    seed: int = setting(
        0, "of the order of prompts, rollouts, branches, controls", least=0,
        most=2**32 - 1,
    )  # fmt: skip
    objective: str = setting(
        "topd",
        "a preset or package.module:function, with options: "
        "\"topd(context='student', window=20)\"",
    )
    mesh: MeshSettings = MeshSettings()
    student: ModelSettings = ModelSettings()
    teacher: ModelSettings = ModelSettings()
    teachers: dict[str, ModelSettings] = dataclasses.field(default_factory=dict)
    data: DataSettings = DataSettings()
    rollout: RolloutSettings = RolloutSettings()
    offline: OfflineSettings = OfflineSettings()
    optimizer: OptimizerSettings = OptimizerSettings()
    train: TrainSettings = TrainSettings()
    log: LogSettings = LogSettings()
    eval: EvalSettings = EvalSettings()
    checkpoint: CheckpointSettings = CheckpointSettings()
    guard: GuardSettings = GuardSettings()
    world: WorldSettings = WorldSettings()
    sweep: SweepSettings = SweepSettings()

    def __post_init__(self) -> None:
        several = {f"teachers.{n}": m for n, m in self.teachers.items()}
        teachers = {"teacher": self.teacher} | several
        read = [m for m in self.by_teacher.values() if not m.is_student]
        check(self)
        for name, section in (vars(self) | several).items():
            if dataclasses.is_dataclass(section):
                check(section, name)
        if self.data.end_ids and all(m.in_world for m in (self.student, *read)):
            raise ValueError(
                f"data.end_ids={self.data.end_ids} must be () in the tiny "
                "world, whose tokenizer has one end"
            )
        check_settings(self.student, teachers)
        check_teachers(self.data, list(self.teachers))
        check_templates(self.student.prompt, self.templates)
        self._check_offline()
        rows = self.data.batch_size * self.data.samples
        if rows % self.optimizer.accumulate:
            raise ValueError(
                f"data.batch_size x data.samples = {rows} rows must be "
                f"divisible by optimizer.accumulate={self.optimizer.accumulate}"
            )
        most = max(rows, self.eval.batch_size)
        if self.rollout.slots >= most:
            raise ValueError(
                f"rollout.slots={self.rollout.slots} must be below {most}, the "
                "rows of the largest batch: no other row waits for a slot; 0 "
                "writes all rows side by side"
            )
        check_fits(make_objective(self.objective), self)

    def _check_offline(self) -> None:
        teachers = self.by_teacher.values()
        if self.is_offline and any(t.is_student for t in teachers):
            raise ValueError(
                "teacher.source='student' writes no solutions; take another, "
                "or train.stage='on_policy'"
            )
        path, needs = self.offline.path, ""
        if not self.is_offline:
            needs = "needs train.stage=offline"
        elif self.teachers:
            needs = "is a set of one teacher; leave config.teachers out"
        if path and needs:
            raise ValueError(f"offline.path={path!r} {needs}")

    @property
    def by_teacher(self) -> dict[str, ModelSettings]:
        """Name of each teacher, "" for the only one -> its settings."""
        return dict(self.teachers) or {"": self.teacher}

    @property
    def templates(self) -> dict[str, str]:
        """Name of each teacher, "" for the only one -> ``prompt`` of it."""
        return {n: m.prompt for n, m in self.by_teacher.items()}

    @property
    def writing(self) -> RolloutSettings:
        """How a teacher writes solutions."""
        offline = self.offline
        return dataclasses.replace(
            self.rollout, temperature=offline.temperature, top_k=0,
            top_p=offline.top_p,
        )  # fmt: skip

    @property
    def is_offline(self) -> bool:
        """Whether this is stage 1."""
        return self.train.stage == "offline"

    def to_dict(self) -> dict:
        """Return the settings as plain nested dictionaries, for JSON."""
        return json.loads(json.dumps(dataclasses.asdict(self)))

    def fingerprint(self) -> str:
        """Return sixteen hex digits that change with any setting of a run.

        Settings at their default do not enter it: one that is added later
        leaves the fingerprints of earlier runs as they are.
        """
        known = defaults_of(self.to_dict())
        values = {
            name: value
            for name, value in flatten_dict(self.to_dict(), sep=".").items()
            if name not in NO_IDENTITY and known.get(name, ...) != value
        }
        text = json.dumps(values, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def check_fits(objective: Objective, settings: Settings) -> None:
    """Refuse an objective that looks further than completions are long.

    Args:
      objective: of the run.
      settings: of the run.

    Raises:
      ValueError: naming both numbers.
    """
    ahead, length = objective.near_future, settings.rollout.max_new_tokens
    if ahead is None:
        return
    for name in ("window", "candidates"):
        if getattr(ahead, name) > length:
            raise ValueError(
                f"objective: {name}={getattr(ahead, name)} must not exceed "
                f"rollout.max_new_tokens={length}; lower the one or raise the "
                "other"
            )


def defaults_of(tree: Mapping) -> dict[str, object]:
    """Return the default of every setting, those of named teachers included.

    Args:
      tree: what :meth:`Settings.to_dict` gives, of any version.

    Returns:
      "section.key" -> default; the source of one of ``teachers`` has none,
      for it makes the section.
    """
    keys = dataclasses.asdict(ModelSettings())
    defaults = flatten_dict(Settings().to_dict(), sep=".")
    return defaults | {
        f"teachers.{name}.{key}": defaults[f"teacher.{key}"]
        for name in tree.get("teachers", {})
        for key in keys
        if key != "source"
    }


def default_config() -> ConfigDict:
    """Make the ConfigDict of all defaults, for a config file to change."""
    config = ConfigDict(dataclasses.asdict(Settings()))
    kinds = typing.get_type_hints(Settings)
    for section, kind in kinds.items():
        if not dataclasses.is_dataclass(kind):
            continue
        for field in dataclasses.fields(kind):
            if field.default is None:  # may be set later, to its type
                hint = typing.get_type_hints(kind)[field.name]
                inner = next(t for t in typing.get_args(hint) if t is not None)
                config[section][field.name] = config_dict.placeholder(inner)
    return config


def explain() -> str:
    """Spell every setting with default, bounds, meaning and source."""
    lines = []

    def add(kind: type, prefix: str) -> None:
        hints = typing.get_type_hints(kind)
        for field in dataclasses.fields(kind):
            name = prefix + field.name
            if dataclasses.is_dataclass(hints[field.name]):
                lines.append(f"\n{name}: {hints[field.name].__doc__}")
                add(hints[field.name], f"{name}.")
            elif field.name == "teachers":
                text = "name -> section with the keys of config.teacher, whose"
                lines.append(f"\n{name} = {{}}: {text} place they take")
            elif field.metadata:
                limits = field.metadata
                bounds = [
                    f"{k} {limits[k]}"
                    for k in ("least", "above", "most", "below")
                    if limits[k] is not None
                ]
                if limits["choices"]:
                    bounds.append(" | ".join(map(repr, limits["choices"])))
                bound = f" ({', '.join(bounds)})" if bounds else ""
                text = f"{name} = {field.default!r}{bound}"
                lines.append(f"{text}: {limits['text']}")

    add(Settings, "config.")
    return "\n".join(lines)


def settings_from(config: Mapping) -> Settings:
    """Check a config and turn it into frozen dataclasses.

    Args:
      config: a ConfigDict, or nested mappings.

    Returns:
      The settings.

    Raises:
      ValueError: an unknown key (naming the nearest), or a value of the wrong
        type or out of bounds.
    """
    return build(Settings, config, "config")

"""Read what the files of a run say of it, but no weights."""

import dataclasses
import functools
import pathlib

from jax.sharding import Mesh

from topd_jax.cli.doctor import findings
from topd_jax.cli.doctor.findings import Finding
from topd_jax.data.sources import Record
from topd_jax.data.tokenizers import Tokenizer, wrap_tokenizer
from topd_jax.data.toy_world.models import world_models
from topd_jax.data.vocabulary import require_same_vocabulary
from topd_jax.models import DecoderConfig, Description, describe
from topd_jax.parallel import buckets
from topd_jax.training.config import Settings
from topd_jax.training.loop import require_solutions
from topd_jax.training.placement import check_batches, make_run_mesh
from topd_jax.training.setup import (
    prompts_by_teacher,
    read_prompts,
    tokenizer_options,
)
from topd_jax.training.shapes import model_configs, model_settings

# Records that are tokenized to look at lengths and at other encodings.
_SAMPLE = 200


@dataclasses.dataclass(frozen=True)
class ModelFiles:
    """A model of the run, as far as its files tell.

    Attributes:
      config: its shape, as the settings have it computed.
      tokenizer: its own; None where it has none.
      described: what its files say; None in the tiny world.
    """

    config: DecoderConfig
    tokenizer: Tokenizer | None = None
    described: Description | None = None


@dataclasses.dataclass(frozen=True)
class Context:
    """A run, as far as its files tell: what the first checks look at.

    Attributes:
      settings: of the run.
      models: "student", then every teacher.
      records: the first training prompts; none where they cannot be read.
      mesh: of devices; None where there are too few.
    """

    settings: Settings
    models: dict[str, ModelFiles]
    records: list[Record]
    mesh: Mesh | None

    @property
    def configs(self) -> dict[str, DecoderConfig]:
        """Return the shape of every model."""
        return {name: model.config for name, model in self.models.items()}

    @functools.cached_property
    def tokenizers(self) -> list[Tokenizer]:
        """Return each tokenizer once, the run's own first."""
        every = (m.tokenizer for m in self.models.values())
        return list({id(t): t for t in every if t is not None}.values())

    @functools.cached_property
    def mismatch(self) -> Exception | None:
        """Return why ids do not mean the same to all models, if they do not."""
        try:
            for other in self.tokenizers[1:]:
                require_same_vocabulary(self.tokenizers[0], other)
        except ValueError as raised:
            return raised
        return None

    @functools.cached_property
    def prompts(self) -> list[list[int]]:
        """Return the records' prompts as ids; [] where they cannot be made."""
        try:
            chat = self.tokenizers[0].chat
            return [chat(record["prompt"]) for record in self.records]
        except Exception:  # templates raise whatever they like
            return []


def gather(
    settings: Settings, workdir: pathlib.Path
) -> tuple[list[Finding], Context | None]:
    """Read the files of a run.

    Args:
      settings: of the run.
      workdir: of the run, where the tiny world's models are trained.

    Returns:
      (what cannot be read or does not divide, the rest; None where a model is
      missing, or the world is not worth training).
    """
    errors: list[Finding] = []
    attempt = functools.partial(findings.attempt, errors)
    mesh = attempt("mesh", make_run_mesh, settings)
    parts = attempt("data", read_prompts, settings)
    attempt("solutions", require_solutions, settings)
    if mesh is not None:
        attempt("mesh", check_batches, settings, mesh)
        if parts:
            attempt("teachers", prompts_by_teacher, settings, parts, mesh)
    if errors and uses_world(settings):
        return errors, None  # training it takes minutes
    read = functools.cache(functools.partial(_read, settings, workdir))
    files = {
        name: attempt(name, read, "world" if model.in_world else model.source)
        for name, model in model_settings(settings).items()
    }
    if None in files.values():
        return errors, None
    configs = attempt("models", model_configs, settings)
    if configs is None:
        return errors, None
    models = {n: ModelFiles(configs[n], *files[n]) for n in files}
    records = parts[0][:_SAMPLE] if parts else []
    return errors, Context(settings, models, records, mesh)


def uses_world(settings: Settings) -> bool:
    """Return whether a model of the run is the tiny world's."""
    models = model_settings(settings).values()
    return any(model.in_world for model in models)


def _read(
    settings: Settings, workdir: pathlib.Path, source: str
) -> tuple[Tokenizer | None, Description | None]:
    """Return the tokenizer of a model, and what else its files say."""
    if source == "world":
        where = settings.world.cache or workdir / "world"
        return world_models(settings.world, buckets.as_path(where))[2], None
    described = describe(source)
    if described.tokenizer is None:
        return None, described
    options = tokenizer_options(settings)
    return wrap_tokenizer(described.tokenizer, **options), described

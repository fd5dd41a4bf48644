"""The two stages of the preflight: files and settings, then the models."""

import dataclasses
import pathlib
from typing import Any

import jax
from jax.sharding import Mesh

from topd_jax.cli.doctor import fit, meshes, scored, tokens, verdicts
from topd_jax.cli.doctor.findings import Finding, count, refusal
from topd_jax.cli.doctor.kernels import kernels
from topd_jax.data.records import check_rows, read_records, teacher_shares
from topd_jax.data.sources import Record
from topd_jax.data.tokenizers import (
    HuggingFaceTokenizer,
    SentencePieceTokenizer,
    Tokenizer,
)
from topd_jax.data.toy_world import models as toy_models
from topd_jax.models import DecoderConfig, Description, describe
from topd_jax.parallel.apart import together
from topd_jax.parallel.teacher_mesh import make_meshes
from topd_jax.training.config import ModelSettings, Settings
from topd_jax.training.setup import (
    Pair,
    load_pair,
    model_settings,
    tokenizer_options,
)


@dataclasses.dataclass
class _Side:
    """A model of the run, as far as its files tell."""

    config: DecoderConfig
    tokenizer: Tokenizer | None
    described: Description | None = None


def examine_files(settings: Settings, workdir: pathlib.Path) -> list[Finding]:
    """Everything that can be seen without reading a weight.

    Args:
      settings: of the run.
      workdir: where the tiny world's models are kept; they are made where a
        run would make them.

    Returns:
      The findings; errors are collected, not raised.
    """
    found: list[Finding] = []

    def tried(name: str, call: Any, *args: Any) -> Any:
        try:
            return call(*args)
        except (ValueError, OSError) as raised:
            found.append(refusal(name, raised))
            return None

    mesh, theirs = tried(
        "mesh", make_meshes, settings.mesh, settings.teacher_mesh
    ) or (None, None)
    if mesh is not None:
        for section in ("data", "eval"):
            tried("mesh", check_rows, settings, mesh, section, theirs)
    parts = tried("data", read_records, settings)
    if mesh is not None and parts and settings.teachers:
        tried("teachers", teacher_shares, settings, parts, mesh)
    models = model_settings(settings)
    world = any(m.source == "world" for m in models.values())
    if world and count(found, "error"):
        return found  # making it takes minutes
    made = _world(settings, workdir) if world else None
    files = {}
    for name, model in models.items():
        if model.source not in ("world", *files):
            files[model.source] = tried(
                name, _described, settings, model.source
            )
    if None in files.values():
        return found
    sides = {
        name: _side(settings, name, model, files.get(model.source), made)
        for name, model in models.items()
    }
    records = parts[0] if parts else []
    return [*found, *_compare(settings, sides, records, mesh, theirs)]


def _world(settings: Settings, workdir: pathlib.Path) -> Tokenizer:
    where = settings.world.cache or str(workdir / "world")
    return toy_models.world_models(settings.world, pathlib.Path(where))[2]


def _described(
    settings: Settings, source: str
) -> tuple[Description, Tokenizer | None]:
    found = describe(source)
    if found.tokenizer is None:
        return found, None
    if isinstance(found.tokenizer, SentencePieceTokenizer):
        return dataclasses.replace(found, tokenizer=None), found.tokenizer
    options = tokenizer_options(settings)
    return found, HuggingFaceTokenizer(found.tokenizer, **options)


def _side(
    settings: Settings,
    name: str,
    model: ModelSettings,
    files: tuple[Description, Tokenizer | None] | None,
    made: Tokenizer | None,
) -> _Side:
    names = ("dtype", "param_dtype", "remat", "unroll", "attention")
    kinds = {key: getattr(model, key) for key in names}
    described, tokenizer = files or (None, made)
    if described is None:
        make = toy_models.teacher_config
        if name == "student":
            make = toy_models.student_config
        config = make(settings.world)
    else:
        config = described.config
    config = dataclasses.replace(config, **kinds)
    if model.keep_layers:
        config = config.keep_layers(model.keep_layers)
    return _Side(config, tokenizer, described)


def _compare(
    settings: Settings,
    sides: dict[str, _Side],
    records: list[Record],
    mesh: Mesh | None,
    theirs: Mesh | None,
) -> list[Finding]:
    configs = {name: side.config for name, side in sides.items()}
    found = _tokens(settings, sides, records)
    found += fit.dtypes(settings, configs)
    if mesh is not None:
        misfits = meshes.mesh_fit(configs, mesh, theirs)
        found += misfits
        found += meshes.decoding(settings, configs["student"], mesh)
        if not count(misfits, "error"):
            found += fit.memory(settings, configs, mesh, theirs)
    return found


def _tokens(
    settings: Settings, sides: dict[str, _Side], records: list[Record]
) -> list[Finding]:
    owners = [side for side in sides.values() if side.tokenizer is not None]
    if not owners:
        return [
            refusal(
                "tokenizers",
                ValueError("no model has one; put its files beside the model"),
            )
        ]
    configs = {name: side.config for name, side in sides.items()}
    tokenizer = owners[0].tokenizer
    found, made = [], []
    for side in owners[1:] or owners:
        other = side.tokenizer
        same = tokens.vocabularies(tokenizer, other)
        found += same
        if records and other is not tokenizer and not count(same, "error"):
            found += tokens.encodings(tokenizer, other, records)
        if records:
            made += tokens.templates(tokenizer, other, records)
    apart = bool(count(found, "error"))
    found = list(dict.fromkeys([*found, *made]))
    if records and not count(made, "error"):
        found += tokens.thinking(tokenizer, settings.data.thinking)
        found += tokens.beginning(tokenizer, records[0]["prompt"])
        found += tokens.prompt_lengths(tokenizer, records, settings)
    found += tokens.rows(configs, tokenizer)
    if apart:
        return found
    least = min(c.vocab_size for c in configs.values())
    found += tokens.ends(tokenizer, _other_ends(sides, tokenizer), least)
    owner = next(
        (s.described for s in sides.values() if s.tokenizer is tokenizer), None
    )
    if owner is not None and owner.tokenizer is not None:
        found += tokens.pad(tokenizer, owner.tokenizer.pad_token_id)
    return found


def _other_ends(
    sides: dict[str, _Side], tokenizer: Tokenizer
) -> dict[str, tuple[int, ...]]:
    others = {"the chat template": tokens.turn_end(tokenizer)}
    for name, side in sides.items():
        if side.described is None:
            continue
        others[f"the {name}'s config.json"] = side.described.config_end_ids
        if side.described.tokenizer is not None:
            own = side.described.tokenizer.eos_token_id
            others[f"the {name}'s tokenizer"] = () if own is None else (own,)
    return others


def examine_pair(settings: Settings, pair: Pair) -> list[Finding]:
    """What the models do with one small batch.

    Every process of a run must call this: its programs run on the whole mesh.

    Args:
      settings: of the run.
      pair: of the run, before anything is trained.

    Returns:
      The findings.
    """
    pair = together(pair)
    several = list(pair.by_teacher(pair.encoded, len(pair.encoded.records)))
    models = {f"teacher {name}".strip(): model for name, model, *_ in several}
    found = scored.weights({"student": pair.student} | models)
    found += kernels({"student": pair.student} | models)
    if count(found, "error"):
        return found
    for name, teacher, prompts, _ in several:
        one = dataclasses.replace(pair, teacher=teacher, encoded=prompts)
        with jax.set_mesh(pair.mesh):
            scores = scored.score(settings, one)
        where = f" ({name})" if name else ""
        found += [
            dataclasses.replace(f, name=f.name + where)
            for f in verdicts.judge(scores, settings, one)
        ]
    return found


def examine(settings: Settings, workdir: pathlib.Path) -> list[Finding]:
    """Both stages; the second only where the first found no error.

    Args:
      settings: of the run.
      workdir: of the run.

    Returns:
      The findings, in the order of the report.
    """
    found = examine_files(settings, workdir)
    if count(found, "error"):
        return found
    try:
        pair = load_pair(settings, workdir, apart=True)
    except (ValueError, OSError) as raised:
        return [*found, refusal("loading", raised)]
    return [*found, *examine_pair(settings, pair)]

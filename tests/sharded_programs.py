"""Compiles every program of a run over a mesh, and looks what is gathered.

    python sharded_programs.py DIRECTORY dense|experts|columns [TOPOLOGY]

DIRECTORY gets the models' config.json. The rules of a run are
``rollout.sharding``, and ``rollout.branch_sharding`` where that knows them;
without a topology the programs are compiled for eight simulated devices. Whole
stacks of parameters, all logits [B, T, V] and the cache may never come together
on a device: no collective that moves arrays may make one of their size, nor of
a part of it that is larger than a device's own. Sizes are odd enough to tell
them from everything else.
"""

import dataclasses
import json
import math
import pathlib
import sys
from collections.abc import Iterator

import jax

from topd_jax.configs import default
from topd_jax.models.parameters import parameter_table
from topd_jax.objectives.loading import spell
from topd_jax.parallel import sharding
from topd_jax.planning import hlo
from topd_jax.planning.chips import topology_devices, without_tpu
from topd_jax.planning.programs import calls
from topd_jax.sampling import branch_columns
from topd_jax.training.config import Settings, settings_from
from topd_jax.training.shapes import abstract_models

MESHES = {
    "dense": (1, 4, 2, 1, 1),
    "experts": (1, 2, 2, 2, 1),
    "columns": (1, 2, 2, 1, 2),
}
LAYERS = {"student": 5, "teacher": 7}
PROMPT, NEW, ROWS, VOCAB = 16, 22, 16, 1144
MOVING = ("all-gather", "all-to-all", "collective-permute")


def model_files(folder: pathlib.Path, name: str, kind: str) -> str:
    """A directory with the config.json of a small Qwen3."""
    width = {"student": 104, "teacher": 136}[name]
    fields = {
        "model_type": "qwen3", "vocab_size": VOCAB, "hidden_act": "silu",
        "head_dim": 12, "num_key_value_heads": 4, "num_attention_heads": 8,
        "hidden_size": width, "intermediate_size": 3 * width,
        "num_hidden_layers": LAYERS[name], "rms_norm_eps": 1e-6,
        "rope_theta": 1e4, "max_position_embeddings": 512,
        "attention_bias": False, "tie_word_embeddings": name == "student",
    }  # fmt: skip
    if kind == "experts":
        fields |= {
            "model_type": "qwen3_moe", "num_experts": 4,
            "num_experts_per_tok": 2, "moe_intermediate_size": 2 * width,
            "norm_topk_prob": True, "decoder_sparse_step": 1,
            "mlp_only_layers": [],
        }  # fmt: skip
    path = folder / f"{name}-{kind}"
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps(fields), encoding="utf-8")
    return str(path)


def settings_of(folder: pathlib.Path, kind: str, rules: str) -> Settings:
    config = default.get_config()
    names = ("data", "fsdp", "tensor", "expert", "sequence")
    for name, size in zip(names, MESHES[kind], strict=True):
        config.mesh[name] = size
    for name in LAYERS:
        config[name].source = model_files(folder, name, kind)
    config.data.source = "jsonl"
    config.data.batch_size = config.eval.batch_size = ROWS
    config.data.max_prompt_length = PROMPT
    config.rollout.max_new_tokens = NEW
    config.rollout.sharding = rules
    if rules != "tensor":
        config.rollout.branch_sharding = rules
    config.rollout.top_p = 0.9  # the filter sorts logits
    config.objective = spell("topd", candidates=3, window=4)
    config.train.chunk_size = 64
    return settings_from(config)


def wholes(
    settings: Settings, mesh: jax.sharding.Mesh, moved: str
) -> Iterator[tuple[str, int, int]]:
    """(what may not come together, its elements, parts it is spread in).

    Args:
      settings: of the run.
      mesh: of its devices.
      moved: whose parameters the rules move once, as a whole; "" nobody's.
    """
    fsdp, tensor = settings.mesh.fsdp, settings.mesh.tensor
    expert, sequence = settings.mesh.expert, settings.mesh.sequence
    models = abstract_models(settings, mesh)
    shapes = [m.config for m in (models.student, models.teachers[0].model)]
    for name, config in zip(("student", "teacher"), shapes, strict=True):
        for part, row in parameter_table(config).items():
            # Norms are whole everywhere.
            if row.axes[0] == "layers" and row.scale and name != moved:
                ways = fsdp * (tensor if part != "router" else 1)
                ways *= expert if "expert" in row.axes else 1
                yield f"{name}'s {part}", math.prod(row.shape), ways
        ahead = branch_columns(3, 4) if name == "teacher" else 0
        rows = fsdp * expert * sequence
        size = ROWS * config.layers * config.kv_heads * config.head_dim
        for columns in {PROMPT, PROMPT + NEW, PROMPT + NEW + ahead}:
            yield f"{name}'s cache", size * columns, rows * tensor
    yield "logits", ROWS * NEW * VOCAB, rows * tensor


def gathered(
    program: hlo.Program,
    settings: Settings,
    mesh: jax.sharding.Mesh,
    rules: str,
    name: str,
) -> list[str]:
    """What a program brings together and may not."""
    moved = {"score": "teacher"}.get(name, "student")
    if rules == "train" or name not in ("rollout", "evaluate", "score"):
        moved = ""
    sizes = {
        whole // part: what
        for what, whole, ways in wholes(settings, mesh, moved)
        for part in range(1, ways)
        if ways % part == 0
    }
    return [
        f"{sizes[array.size]}: {one.op} of {array}"
        for place in program.computations.values()
        for one in place.instructions.values()
        if one.op.removesuffix("-start") in MOVING
        for array in one.arrays
        if array.size in sizes
    ]


def look(settings: Settings, devices: list | None, rules: str) -> None:
    mesh = sharding.make_mesh(
        **dataclasses.asdict(settings.mesh), devices=devices
    )
    with jax.set_mesh(mesh):
        run = calls(settings, mesh)
        names = {"train": tuple(run), "tensor": ("rollout",)}
        for name in names.get(rules, ("rollout", "score")):
            text = run[name].fn.lower(*run[name].args).compile().as_text()
            found = gathered(hlo.parse(text), settings, mesh, rules, name)
            assert not found, f"{rules}: {name} gathers {found}"
            print(f"{rules}: {name} gathers no whole", flush=True)


def main(folder: str, kind: str, topology: str = "") -> None:
    devices, names = None, ["train", "tensor", "rows"]
    if topology:
        without_tpu()
        devices = topology_devices(topology)
    elif kind == "dense":
        names.append("gathered")
    for rules in names:
        look(settings_of(pathlib.Path(folder), kind, rules), devices, rules)


if __name__ == "__main__":
    main(*sys.argv[1:])

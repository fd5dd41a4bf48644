"""``topd growth``: how the cost of a step grows, and how it should.

One size at a time is doubled from a base: tokens T, rows B, vocabulary V,
candidates M, window K, layers N, devices n. Every program of a step is
compiled at each, from shapes alone, and its operations, bytes, temporaries and
bytes sent are counted (:mod:`topd_jax.planning.hlo_cost`); on this machine the
programs also run. The exponent of a doubling is log2 of the ratio; beside it
stands that of the formula (:mod:`topd_jax.planning.growth_formulas`). What
grows half a power faster than its formula is a surprise. Ours.
"""

import dataclasses
import json
import os
import pathlib
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from topd_jax.models.decoder import init_decoder
from topd_jax.parallel import sharding
from topd_jax.planning import hlo, hlo_cost
from topd_jax.planning.chips import Chip, chip_of
from topd_jax.planning.command import without_a_tpu
from topd_jax.planning.compiling import compile_call
from topd_jax.planning.growth_formulas import formulas
from topd_jax.planning.growth_table import draw, rates, table
from topd_jax.planning.hlo_cost import Cost
from topd_jax.planning.plan import roofline
from topd_jax.planning.programs import (
    Call,
    calls,
    decoder_configs,
    topology_devices,
)
from topd_jax.training.config import Settings
from topd_jax.training.phases import make_optimizer
from topd_jax.training.step import init_state
from topd_jax.types import Prompts

# What is doubled: section and keys of the settings. Devices are no setting.
VARIED = {
    "T": ("rollout", ("max_new_tokens",)),
    "B": ("data", ("batch_size",)),
    "V": ("world", ("vocab_size",)),
    "M": ("objective", ("candidates",)),
    "K": ("objective", ("window",)),
    "N": ("world", ("student_layers", "teacher_layers")),
    "n": ("mesh", ("fsdp",)),
}
DOUBLINGS = 4
_RUNS, _SPREAD = 5, 0.3

# A core's order of magnitude: where its formula turns from bytes to operations.
CORE = Chip("cpu", "cpu", 2.0**34, 1e11, 2e10, 1e10)


def growth(
    settings: Settings, workdir: pathlib.Path, topology: str | None
) -> str:
    """Measures how the costs of a step grow; resumes what was stopped.

    Args:
      settings: the base, of the tiny world's kind of models.
      workdir: where ``growth.jsonl`` grows, and ``growth.png`` is drawn.
      topology: TPU kind and shape to compile for instead of this machine's
        CPU, "v5e:2x2"; nothing is run then, and seconds are rooflines.

    Returns:
      The table of exponents.

    Raises:
      ValueError: for models that are not the world's, or a topology that is
        not known.
    """
    if {settings.student.source, settings.teacher.source} != {"world"}:
        raise ValueError(
            f"student.source={settings.student.source} has a shape of its own; "
            "growth needs the world's models, whose layers and vocabulary can "
            "be doubled: try --config growth"
        )
    devices_of, base = _devices(topology, settings.mesh.fsdp)
    chip = CORE if topology is None else chip_of(devices_of(base))
    settings = dataclasses.replace(
        settings, mesh=dataclasses.replace(settings.mesh, data=1, fsdp=base)
    )
    workdir.mkdir(parents=True, exist_ok=True)
    file = workdir / "growth.jsonl"
    target = topology or f"cpu:{base}"
    rows = [r for r in read(file) if r["target"] == target]
    _begin(file, rows, target, settings)
    done = {(r.get("varied"), r.get("factor")) for r in rows}
    for varied, factor, changed in points(settings):
        if (varied, factor) in done:
            continue
        started = time.perf_counter()
        same = _same(rows, changed)
        if same is None:
            devices = devices_of(changed.mesh.fsdp)
            same = measure(changed, devices, chip, run=topology is None)
        row = {
            "target": target, "varied": varied, "factor": factor,
            "size": size_of(changed, varied), "sizes": sizes_of(changed),
            **same,
        }  # fmt: skip
        _write(file, row)
        rows.append(row)
        passed = time.perf_counter() - started
        print(
            f"{varied} = {row['size']:6d}  {passed:5.1f} s",
            file=sys.stderr, flush=True,
        )  # fmt: skip
    rows = [r for r in rows if "varied" in r]
    draw(rows, chip, workdir / f"growth-{target.replace(':', '-')}.png")
    return table(rates(rows, chip))


def _begin(
    file: pathlib.Path, rows: list, target: str, settings: Settings
) -> None:
    """Writes down what the base is; refuses to go on with another."""
    base = json.loads(json.dumps(settings.to_dict()))
    if not rows:
        about = {"target": target, "base": base, "jax": jax.__version__}
        _write(file, about | {"cores": os.cpu_count()})
    elif rows[0]["base"] != base:
        raise ValueError(
            f"{file} is of another base on {target}; take another --workdir"
        )


def _write(file: pathlib.Path, row: dict[str, Any]) -> None:
    with file.open("a", encoding="utf-8") as out:
        out.write(json.dumps(row) + "\n")


def _same(
    rows: Sequence[dict[str, Any]], settings: Settings
) -> dict[str, Any] | None:
    """What was measured with these sizes: the base is that of every one."""
    for row in rows:
        if row.get("sizes") == sizes_of(settings):
            return {k: row[k] for k in ("phases", "formula", "seconds")}
    return None


def read(file: pathlib.Path) -> list[dict[str, Any]]:
    """The record's lines; what was cut off by a kill is left out."""
    if not file.exists():
        return []
    lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
    return [json.loads(x) for x in lines if x.endswith("}\n")]


def grown(settings: Settings, varied: str, factor: int) -> Settings:
    """The settings with one size multiplied.

    Args:
      settings: the base.
      varied: of :data:`VARIED`.
      factor: at least 1.

    Returns:
      The settings; for "n" over a batch that the most devices can share.
    """
    section, keys = VARIED[varied]
    old = getattr(settings, section)
    new = {key: getattr(old, key) * factor for key in keys}
    changed = {section: dataclasses.replace(old, **new)}
    if varied == "n":
        rows = settings.data.batch_size * 2**DOUBLINGS
        changed["data"] = dataclasses.replace(settings.data, batch_size=rows)
    return dataclasses.replace(settings, **changed)


def size_of(settings: Settings, varied: str) -> int:
    """The size that is varied, of the last of its keys."""
    section, keys = VARIED[varied]
    return getattr(getattr(settings, section), keys[-1])


def sizes_of(settings: Settings) -> dict[str, int]:
    """All that may be varied."""
    return {varied: size_of(settings, varied) for varied in VARIED}


def points(settings: Settings) -> Iterator[tuple[str, int, Settings]]:
    """(what is varied, factor, settings), the quick ones first."""
    for doubling in range(DOUBLINGS + 1):
        for varied in VARIED:
            factor = 2**doubling
            yield varied, factor, grown(settings, varied, factor)


def _devices(
    topology: str | None, base: int
) -> tuple[Callable[[int], Sequence[jax.Device]], int]:
    """(number -> that many devices to compile for, how many the base has)."""
    if topology is None:
        # Before JAX looks for devices: as many as are doubled up to.
        jax.config.update("jax_num_cpu_devices", base * 2**DOUBLINGS)
        return lambda count: jax.devices("cpu")[:count], base
    without_a_tpu()
    base = len(topology_devices(topology))
    return (
        lambda count: topology_devices(larger(topology, count // base)),
        base,
    )


def larger(topology: str, factor: int) -> str:
    """A topology with more chips: the smaller side is doubled first.

    Args:
      topology: kind and shape, "v5e:2x2".
      factor: a power of two.

    Returns:
      Kind and shape, "v5e:2x4" of factor 2.
    """
    kind, _, shape = topology.partition(":")
    sides = [int(side) for side in shape.split("x")]
    while factor > 1:
        least = max(i for i, side in enumerate(sides) if side == min(sides))
        sides[least] *= 2
        factor //= 2
    return f"{kind}:{'x'.join(map(str, sides))}"


def measure(
    settings: Settings, devices: Sequence[jax.Device], chip: Chip, *, run: bool
) -> dict[str, Any]:
    """Compiles the programs of a step, counts what they do and runs them.

    Args:
      settings: of the run.
      devices: all fsdp.
      chip: one of them.
      run: whether to run them too, where there is one device.

    Returns:
      "phases": phase -> flops, bytes, temporaries, sent, of one device;
      temporaries are of the whole program that a phase is a part of.
      "formula": the same of the formulas. "seconds": phase -> the median; {}
      where nothing ran, and the roofline on a topology.
    """
    mesh = sharding.make_mesh(data=1, fsdp=len(devices), devices=devices)
    plain = dataclasses.replace(settings.objective, variant="opd")
    with jax.set_mesh(mesh):
        programs = calls(settings, mesh)
        alone = calls(dataclasses.replace(settings, objective=plain), mesh)
        programs["scoring"] = alone["annotate"]
        made = {
            name: _compiled(programs[name])
            for name in ("rollout", "scoring", "annotate", "update")
        }
        counted = {name: phases_of(name, made) for name in PROGRAMS}
        seconds = {}
        if run and len(devices) == 1:
            writer = calls(settings, mesh, eos_ids=())["rollout"].fn
            seconds = run_seconds(
                settings, writer, {n: m.run for n, m in made.items()}
            )
    work = formulas(settings, len(devices))
    if not run:
        seconds = {
            name: roofline(cost, chip)[0] for name, (cost, _) in counted.items()
        }
    return {
        "phases": {
            name: {
                "flops": cost.flops, "bytes": cost.bytes,
                "temporaries": temporaries, "sent": cost.sent,
            }
            for name, (cost, temporaries) in counted.items()
        },
        "formula": {n: dataclasses.asdict(w) for n, w in work.items()},
        "seconds": seconds,
    }  # fmt: skip


# Phase -> the program that it is a part of.
PROGRAMS = {
    "prefill": "rollout",
    "decode": "rollout",
    "scoring": "scoring",
    "branches": "annotate",
    "update": "update",
}


class Made(NamedTuple):
    """A compiled program.

    Attributes:
      run: call it.
      cost: what one device does in it.
      temporaries: bytes.
    """

    run: Callable[..., Any]
    cost: Cost
    temporaries: float


def _compiled(call: Call) -> Made:
    with tempfile.TemporaryDirectory(prefix="topd-growth-") as folder:
        compiled, text = compile_call(call, pathlib.Path(folder))
    memory = compiled.memory_analysis()
    cost = hlo_cost.count(hlo.parse(text))
    return Made(compiled, cost, float(memory.temp_size_in_bytes))


def phases_of(name: str, made: Mapping[str, Made]) -> tuple[Cost, float]:
    """(What one device does in a phase, temporaries of its program)."""
    whole = made[PROGRAMS[name]]
    cost = whole.cost
    if name == "decode":
        cost = cost.bounded
    elif name == "prefill":
        cost = cost - cost.bounded
    elif name == "branches":
        cost = cost - made["scoring"].cost
    return cost, whole.temporaries


def run_seconds(
    settings: Settings,
    rollout: Callable[..., Any],
    made: Mapping[str, Callable[..., Any]],
) -> dict[str, float]:
    """Seconds of the programs of a step, with random models.

    Args:
      settings: of the run.
      rollout: in which no row ends, so that each writes all of its tokens.
      made: name -> program.

    Returns:
      Phase -> seconds; "decode" holds the prefill too.
    """
    ours, [(_, theirs)] = decoder_configs(settings)
    shape = (settings.data.batch_size, settings.data.max_prompt_length)
    key = jax.random.key(settings.seed)
    student, teacher = (init_decoder(c, key) for c in (ours, theirs))
    tokens = jax.random.randint(key, shape, 2, ours.vocab_size)
    prompts = Prompts(tokens, jnp.ones(shape, bool))
    optimizer = make_optimizer(settings.optimizer, settings.train.steps)
    state = jax.jit(lambda s: init_state(s, optimizer))(student)
    written = rollout(student, teacher, prompts, key)
    notes = made["annotate"](student, teacher, written, key)

    def learn() -> Any:
        nonlocal state
        state, metrics = made["update"](
            state, teacher.head, written, notes, None
        )
        return metrics

    told = (student, teacher, written, key)
    scoring = _median(lambda: made["scoring"](*told))
    return {
        "decode": _median(lambda: rollout(student, teacher, prompts, key)),
        "scoring": scoring,
        "branches": _median(lambda: made["annotate"](*told)) - scoring,
        "update": _median(learn),
    }


def _median(fn: Callable[[], Any]) -> float:
    jax.block_until_ready(fn())  # compiles
    times: list[float] = []
    for _ in range(3):
        for _ in range(_RUNS):
            started = time.perf_counter()
            jax.block_until_ready(fn())
            times.append(time.perf_counter() - started)
        low, middle = min(times), statistics.median(times)
        if middle < (1 + _SPREAD) * low:
            break
    return statistics.median(times)

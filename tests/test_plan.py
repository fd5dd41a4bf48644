"""The plan of a run: figures, table, flags; no TPU compiler needed."""

import dataclasses
import functools
import json
import types

import jax
import pytest
from small_run import changed, settings_with

from topd_jax.configs import qwen3_8b_to_1p7b
from topd_jax.models.settings import ModelSettings
from topd_jax.parallel import sharding
from topd_jax.planning import command
from topd_jax.planning import plan as plan_module
from topd_jax.planning.advice import suggest
from topd_jax.planning.chips import CHIPS, chip_of, topology_devices
from topd_jax.planning.hlo_cost import Cost
from topd_jax.planning.plan import Plan, ProgramPlan, refused_bytes, roofline
from topd_jax.planning.programs import calls
from topd_jax.training.config import settings_from
from topd_jax.training.shapes import (
    abstract_models,
    bytes_held,
    model_configs,
)

GIB = 2**30
V5E = CHIPS[1]


def program(name="train_step", **changes):
    values = dict(
        name=name, held=6 * GIB, temporaries=3 * GIB,
        capacity=15 * GIB, cost=Cost(394e12, 819e9, 100e9),
    )  # fmt: skip
    return ProgramPlan(**values | changes)


def plan_of(*programs, data=1):
    mesh = {"data": data, "fsdp": 8 // data, "tensor": 1, "expert": 1}
    return Plan("v5e:2x4", V5E, mesh, programs, 64)


def devices(kind, chips, cores):
    return [
        types.SimpleNamespace(device_kind=kind, coords=[i, 0, 0])
        for i in range(chips)
        for _ in range(cores)
    ]


def test_a_core_that_is_a_device_has_its_part_of_the_chip():
    whole = chip_of(devices("TPU v5", 4, 1))
    assert whole.memory == 95 * GIB and whole.flops == 459e12
    half = chip_of(devices("TPU7x", 4, 2))
    assert half.memory == 96 * GIB and half.flops == 2307e12 / 2
    assert half.part == 0.5 and half.trained == 0.43  # a share stays one
    with pytest.raises(ValueError, match=r"no figures for a 'cpu'.*v5e"):
        chip_of(devices("cpu", 1, 1))


def test_an_unknown_topology_is_one_line(monkeypatch):
    from jax.experimental import topologies

    def refuse(**_):
        raise RuntimeError("no\nsuch layout")

    monkeypatch.setattr(topologies, "get_topology_desc", refuse)
    with pytest.raises(ValueError, match="v5e:9x9: no such layout; try"):
        topology_devices("v5e:9x9")


def test_a_chip_of_v4_is_one_device_as_on_a_cloud_tpu(monkeypatch):
    from jax.experimental import topologies

    asked = []

    def remember(**given):
        asked.append(given.get("chip_config_name"))
        kind = given["topology_name"].split(":")[0].replace("v4-8", "TPU v4")
        device = types.SimpleNamespace(device_kind=kind)
        return types.SimpleNamespace(devices=[device])

    monkeypatch.setattr(topologies, "get_topology_desc", remember)
    for name in ("v4-8", "v5e:2x4"):
        topology_devices(name)
    assert asked == [None, "megacore", None]


def test_batches_that_a_run_refuses_are_refused_here(monkeypatch):
    mesh = jax.sharding.AbstractMesh((2, 1, 1, 1, 1), sharding.MESH_AXES)
    for name, value in (
        ("topology_devices", None), ("chip_of", V5E), ("make_run_mesh", mesh)
    ):  # fmt: skip
        told = functools.partial(lambda value, *_: value, value)
        monkeypatch.setattr(plan_module, name, told)
    with pytest.raises(ValueError, match=r"eval\.batch_size=3 .*; try 4"):
        plan_module.make_plan(settings_with(eval__batch_size=3), "v5e:1x2")


def test_the_slowest_of_three_bounds_a_program():
    assert roofline(Cost(197e12), V5E) == (1.0, "compute")
    assert roofline(Cost(197e12, 2 * 819e9), V5E) == (2.0, "memory")
    assert roofline(Cost(197e12, 819e9, 600e9), V5E) == (3.0, "links")


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("Ran out of memory. Used 25.06G of 15.75G hbm.", 24.06 * GIB),
        ("Used 1536.0M of 15.75G", 0.5 * GIB),
        ("required for HLO temporaries (16.91G) exceeds", 16.91 * GIB),
        ("something else", 0),
    ],
)
def test_what_a_refusal_says_of_temporaries(text, size):
    assert refused_bytes(text, GIB) == pytest.approx(size)


def test_the_table_says_what_fits_and_by_how_much_not():
    rollout = program("rollout", cost=Cost(0, 819e9), calls=100)
    refused = program("evaluate", temporaries=10.5 * GIB, cost=None)
    score = program("score", calls=25)
    plan = plan_of(rollout, score, program(calls=100), refused)
    lines = command.table(plan).splitlines()
    (step,), (evaluate,) = (
        [line.split() for line in lines if line.startswith(name)]
        for name in ("train_step", "evaluate")
    )
    assert step == [
        "train_step", "6.00", "3.00", "9.00", "fits",
        "394.00", "819.0", "100.00", "2.00", "compute",
        # 2 s at 0.61 of the peak, 100 calls, eight chips
        "3.28", "100", "0.7",
    ]  # fmt: skip
    assert evaluate[-3:] == ["1.50", "too", "much"]
    # One second of reading, two of computing and, in every fourth step, two
    # more; 0.4 and 0.61 of it.
    assert "3.50 s, about 6.60; 64 tokens generated, 18 a second" in lines[-1]
    # Of a step that did not compile nothing is promised.
    plan = plan_of(program("rollout"), program("score", cost=None))
    assert plan.step_seconds == (0, 0)
    assert "generated" not in command.table(plan)


def test_the_command_writes_json_and_names_flags(monkeypatch, tmp_path):
    large = program("score", temporaries=18 * GIB)
    monkeypatch.setattr(command, "without_tpu", lambda: None)
    monkeypatch.setattr(command, "make_plan", lambda *_: plan_of(large))
    path = tmp_path / "new" / "plans.jsonl"
    for _ in range(2):
        said = command.plan(settings_with(), "v5e:2x4", output=path)
    assert said.endswith("change: --config.train.chunk_size=2048")
    one, two = map(json.loads, path.read_text().splitlines())
    assert one == two and one["settings"]["data"]["batch_size"] == 8
    assert one["plan"]["programs"][0]["cost"]["flops"] == 394e12
    small = plan_of(program())
    monkeypatch.setattr(command, "make_plan", lambda *_: small)
    assert "change" not in command.plan(settings_with(), "v5e:2x4")


def run_of(settings):
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    with jax.set_mesh(mesh):
        return abstract_models(settings, mesh), calls(settings, mesh)


def test_every_program_has_its_arguments_on_the_mesh():
    models, run = run_of(settings_with(teacher__attention="flash"))
    assert list(run) == [
        "rollout", "score", "train_step", "statistics", "evaluate",
        "compare",
    ]  # fmt: skip
    # Student, two moments, and a few counters.
    held = bytes_held(models.student)
    assert bytes_held(models.state) == pytest.approx(3 * held, rel=1e-2)
    for call in run.values():
        assert call.times == 1
        assert bytes_held(call.live) > bytes_held(call.args[0])
        for leaf in jax.tree.leaves(call.args[:2]):
            assert leaf.sharding is not None or not leaf.ndim
    student, (teacher,) = run["score"].args[:2]
    assert student.config.attention == "blocks"
    assert teacher.model.config.attention == "flash"


def test_of_a_student_with_adapters_only_these_are_in_the_state():
    models, run = run_of(
        settings_with(student__lora_rank=1, teacher__quantize="int8",
                      log__statistics_every=0, objective="opd")
    )  # fmt: skip
    names = ["rollout", "score", "train_step", "evaluate", "compare"]
    assert list(run) == names  # and no statistics
    held = bytes_held(models.frozen)
    assert bytes_held(models.state) < held / 2
    adapters = bytes_held(models.student) - held
    assert bytes_held(models.state) == pytest.approx(3 * adapters, rel=0.05)
    assert run["train_step"].args[-1] is not None
    wide = abstract_models(settings_with(), sharding.make_mesh())
    assert bytes_held(models.teachers) < 0.5 * bytes_held(wide.teachers)


def test_slots_are_planned_as_batches_of_so_many_rows():
    _, run = run_of(
        settings_with(eval__batch_size=16, rollout__slots=4, objective="opd")
    )
    rows = {n: (c.args[1].tokens.shape[0], c.times) for n, c in run.items()
            if n in ("rollout", "evaluate")}  # fmt: skip
    assert rows == {"rollout": (4, 2), "evaluate": (4, 4)}
    read = run["compare"]  # no more rows at once than are written
    assert (read.args[2].tokens.shape[0], read.times) == (4, 4)
    assert run["score"].args[2].tokens.shape == (8, 16)


def test_a_teacher_that_writes_in_slots_is_planned():
    settings = settings_with(train__stage="offline", rollout__slots=4)
    _, run = run_of(settings)
    call = run["rollout"]
    teacher = run["score"].args[1][0].model
    assert call.args[0] is teacher and call.times == 2
    options = call.fn.__wrapped__.keywords["options"]
    assert options.top_p == settings.offline.top_p
    assert (options.slots, options.max_new_tokens) == (0, 16)


def test_what_cannot_be_planned_is_refused():
    settings = settings_with(train__stage="offline", offline__path="somewhere")
    with pytest.raises(ValueError, match="offline.path='somewhere'"):
        calls(settings, None)
    few = settings_with(student__keep_layers=(4,))
    with pytest.raises(ValueError, match=r"4.*0\.\.0; for instance"):
        model_configs(few)


LARGE = {
    name: program(name, temporaries=18 * GIB)
    for name in ("score", "statistics", "rollout", "evaluate")
}


def large(**sections):
    """Settings of qwen3_8b_to_1p7b, changed as section=dict(key=value)."""
    settings = settings_from(qwen3_8b_to_1p7b.get_config())
    usual = dict(optimizer=dict(accumulate=1), student=dict(remat="none"))
    for section, values in (usual | sections).items():
        settings = changed(settings, section, **values)
    return settings


@pytest.mark.parametrize(
    ("sections", "lacks", "data", "flag"),
    [
        ({}, program(held=12 * GIB, temporaries=9 * GIB), 8,
         "mesh.data=1 --config.mesh.fsdp=8"),
        # 9 GiB of room: half of 18, and a twentieth of 180.
        ({}, program(temporaries=18 * GIB), 1, "optimizer.accumulate=2"),
        ({}, program(temporaries=180 * GIB), 1, "student.remat=full"),
        ({}, LARGE["score"], 1, "train.chunk_size=2048"),
        (dict(teacher=dict(attention="blocks")), LARGE["score"], 1,
         "teacher.attention=flash"),
        # As evaluations, they read with both models.
        (dict(teacher=dict(attention="blocks")), LARGE["statistics"], 1,
         "teacher.attention=flash"),
        # The student of every step, which has its own.
        (dict(student=dict(attention="blocks"),
              teacher=dict(source="student", param_dtype="float32",
                           attention="blocks")),
         LARGE["score"], 1, "student.attention=flash"),
        (dict(rollout=dict(sharding="gathered")), LARGE["rollout"], 1,
         "rollout.sharding=rows"),
        ({}, LARGE["evaluate"], 1, "eval.batch_size=32"),
    ],
)  # fmt: skip
def test_a_flag_follows_from_the_memory_that_is_missing(
    sections, lacks, data, flag
):
    named = suggest(large(**sections), plan_of(lacks, program(), data=data))
    assert named == [f"--config.{flag}"]


def test_a_mesh_is_named_whole():
    """One that was chosen has axes that no flag of the run has named."""
    mesh = {"data": 2, "fsdp": 1, "tensor": 4, "expert": 1, "sequence": 1}
    lacks = program(held=12 * GIB, temporaries=9 * GIB)
    (told,) = suggest(large(), Plan("v5e:2x4", V5E, mesh, (lacks,), 64))
    assert told.split() == [
        "--config.mesh.data=1", "--config.mesh.fsdp=2",
        "--config.mesh.tensor=4",
    ]  # fmt: skip


def test_no_flag_is_named_that_the_run_refuses(tmp_path):
    """No kernel has sinks; a slice holds whole shares of every teacher."""
    fields = {
        "model_type": "gpt_oss", "vocab_size": 64, "num_hidden_layers": 1,
        "hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 8,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(fields))
    sinks = dict(source=str(tmp_path), attention="blocks")
    settings = large(
        student=sinks | dict(remat="full"), data=dict(batch_size=64, samples=1)
    )
    other = dataclasses.replace(settings.teacher, attention="blocks")
    names = {"a": dataclasses.replace(other, **sinks), "b": other, "c": other}
    data = dict(teacher_field="name", prompts_per_teacher=(16, 16, 32))
    several = dataclasses.replace(
        settings, teacher=ModelSettings(), teachers=names,
        data=dataclasses.replace(settings.data, **data),
    )  # fmt: skip
    alone = changed(settings, "teacher", **sinks)
    more = dict(temporaries=18 * GIB)
    for run, name, flags in (
        (alone, "rollout", []),
        (alone, "score", ["--config.train.chunk_size=2048"]),
        (settings, "train_step", ["--config.optimizer.accumulate=2"]),
        (several, "train_step", ["--config.optimizer.accumulate=2"]),
        (several, "score", [
            "--config.teachers.b.attention=flash "
            "--config.teachers.c.attention=flash"
        ]),
    ):  # fmt: skip
        assert suggest(run, plan_of(program(name, **more))) == flags
    uneven = changed(several, "data", prompts_per_teacher=(24, 8, 32))
    chunks = ["--config.train.chunk_size=2048"]
    assert suggest(uneven, plan_of(program(**more))) == chunks


def test_nothing_is_named_where_nothing_helps_or_lacks():
    assert suggest(large(), plan_of(LARGE["rollout"])) == []
    assert suggest(large(), plan_of(program())) == []
    # A smaller evaluation would be written in as many slots.
    sampler = program("evaluate", temporaries=18 * GIB)
    slots = large(rollout=dict(slots=32))
    assert suggest(slots, plan_of(sampler)) == []

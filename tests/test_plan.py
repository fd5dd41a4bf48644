"""The plan of a run: figures, table, search; no TPU compiler needed."""

import dataclasses
import math
import types

import jax
import pytest
from small_run import settings_with

from topd_jax.configs import qwen3_8b_apart, qwen3_8b_to_1p7b, tiny
from topd_jax.parallel import sharding
from topd_jax.planning import plan_search, programs
from topd_jax.planning.chips import CHIPS, chip_of, fits_one_host
from topd_jax.planning.command import advice
from topd_jax.planning.compiling import (
    ProgramPlan,
    largest_buffers,
    used_bytes,
)
from topd_jax.planning.hlo_cost import Cost
from topd_jax.planning.hlo_heaviest import Heavy
from topd_jax.planning.plan import PhasePlan, Plan, roofline
from topd_jax.planning.plan_table import table
from topd_jax.planning.programs import bytes_held, calls, decoder_configs
from topd_jax.planning.useful import phase_work
from topd_jax.training.config import settings_from

GIB = 2**30
V5E = CHIPS[1]


def made(name="update", **changes):
    values = dict(
        name=name, arguments=4 * GIB, elsewhere=2 * GIB, temporaries=3 * GIB,
        results=0, code=0, capacity=15 * GIB, cost=Cost(), seconds=7.0,
    )  # fmt: skip
    return ProgramPlan(**values | changes)


def plan_of(*programs):
    cost = Cost(394e12, 819e9, {"all-gather": 100e9, "all-reduce": 50e9})
    phase = PhasePlan("update", cost, *roofline(cost, V5E), 512, 0.25)
    return Plan(
        "v5e:2x4", V5E, {"data": 1, "fsdp": 8}, programs, (phase,),
        phase.seconds, 0.5, 64,
    )  # fmt: skip


def devices(kind, chips, cores):
    return [
        types.SimpleNamespace(
            device_kind=kind, coords=[i, 0, 0], process_index=0
        )
        for i in range(chips)
        for _ in range(cores)
    ]


@pytest.mark.parametrize(
    ("kind", "count", "one"),
    [("TPU v5 lite", 8, True), ("TPU v6 lite", 8, True),
     ("TPU v5 lite", 16, False), ("TPU v5", 8, False), ("TPU v5", 4, True)],
)  # fmt: skip
def test_which_topologies_one_host_can_have(kind, count, one):
    assert fits_one_host(devices(kind, count, 1)) == one


def test_a_core_that_is_a_device_has_its_share_of_the_chip():
    whole = chip_of(devices("TPU v5", 4, 1))
    assert whole.memory == 95 * GIB and whole.flops == 459e12
    half = chip_of(devices("TPU7x", 4, 2))
    assert half.memory == 96 * GIB and half.flops == 2307e12 / 2
    with pytest.raises(ValueError, match=r"no figures for a 'cpu'.*v5e"):
        chip_of(devices("cpu", 1, 1))


def test_the_slowest_of_three_bounds_a_phase():
    assert roofline(Cost(197e12, 0, {}), V5E) == (1.0, "compute")
    assert roofline(Cost(197e12, 2 * 819e9, {}), V5E) == (2.0, "memory")
    sent = {"all-gather": 300e9, "all-reduce": 300e9}
    assert roofline(Cost(197e12, 819e9, sent), V5E) == (3.0, "links")


def test_what_the_compilers_refusal_says():
    text = "Ran out of memory in memory space hbm. Used 25.06G of 15.75G hbm."
    assert used_bytes(text) == 25.06 * GIB
    assert used_bytes("Used 512.0M of 15.75G") == 512 * 2**20
    assert used_bytes("something else") == 0


REPORT = """\
Memory Space: default (color=0)
Total bytes: 2765625632 (2.58GiB)
  cumulative_size;       size;       offset; used_by_n_values; shapes_list
  ------------------------------------------------------------
  296.75MiB( 24%);  296.75MiB;    618233856;         5; 5×f32[2048,37984]
    1.20GiB( 98%);    3.00MiB;   1045331968;         2; bf16[1,768], 2×bf16[7]
"""


def test_the_largest_buffers_are_in_the_compilers_report(tmp_path):
    assert largest_buffers(tmp_path) == ()
    report = tmp_path / "module_1.jit_f.memory-usage-report.txt"
    report.write_text(REPORT, encoding="utf-8")
    assert largest_buffers(tmp_path) == (
        "296.75 MiB 5×f32[2048,37984]",
        "3.00 MiB bf16[1,768], 2×bf16[7]",
    )


def test_the_table_explains_where_bytes_come_from():
    source = "jit(learn)/" + "while/body/" * 20 + "dot_general"
    heavy = Heavy("all-reduce", source, "bf16[8,16]", 36, 2e9, 3.5e9)
    text = table(plan_of(made(heaviest=(heavy,))))
    (row,) = (r for r in text.splitlines() if "bf16[8,16]" in r)
    for said in ("all-reduce", " 36 ", " 2.00 ", " 3.50 ", "/body/dot_general"):
        assert said in row
    assert len(row) < 150
    assert "moves and sends" not in table(plan_of(made()))


def test_a_program_fits_up_to_what_may_be_used():
    assert made().fits and made().total == 9 * GIB
    large = made(temporaries=10 * GIB)
    assert not large.fits and large.excess == 1 * GIB
    assert not made(error="RESOURCE_EXHAUSTED").fits


def test_the_table_says_what_fits_and_by_how_much_not():
    large = made("annotate", temporaries=10.5 * GIB, error="RESOURCE_EXHAUSTED")
    plan = plan_of(made(), large)
    text = table(plan)
    rows = {line.split()[0]: line for line in text.splitlines() if line}
    assert "fits" in rows["update"] or "394.00" in rows["update"]
    assert "1.50 too much" in rows["annotate"]
    assert "394.00" in text and "100.00" in text and "compute" in text
    assert "adds 50%" in text
    assert not plan.fits and plan.tokens_per_second == 32
    out = plan.to_dict()
    assert out["programs"][0]["total"] == 9 * GIB and not out["fits"]


def test_useful_operations_by_hand():
    settings = settings_from(tiny.get_config())
    work = phase_work(settings, *decoder_configs(settings))
    rows, prompt, new = 32, 16, 48
    assert work["decode"][0] == rows * new
    assert work["scoring"][0] == rows * (prompt + new)
    assert work["branches"][0] == rows * 3 * 9
    assert work["update"][0] == rows * (prompt + new + 3 * 9)
    d, h, v = 96, 96, 64  # width, all heads, vocabulary
    layer = 4 * d * h + 3 * d * 2 * d + 2 * d  # with two norms
    columns = new * (prompt + new / 2)
    wanted = new * 2 * (2 * layer + v * d) + 4 * 2 * h * columns
    assert work["decode"][1] == pytest.approx(rows * wanted)


def test_a_plan_has_the_attention_that_a_model_is_told():
    settings = settings_with(teacher__attention="flash")
    student, [(_, teacher)] = decoder_configs(settings)
    assert (student.attention, teacher.attention) == ("blocks", "flash")


def test_every_program_has_its_arguments_on_the_mesh():
    settings = settings_from(tiny.get_config())
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    with jax.set_mesh(mesh):
        run = calls(settings, mesh)
    assert set(run) == {
        "rollout", "annotate", "update", "statistics", "evaluate", "restore",
    }  # fmt: skip
    state = run["update"].args[0]
    # Student, two moments, and a few counters.
    student = run["restore"].args[0]
    assert bytes_held(state) == pytest.approx(3 * bytes_held(student), rel=1e-3)
    with jax.set_mesh(mesh):
        text = run["restore"].fn.lower(*run["restore"].args).as_text()
    assert "func.func public @main" in text
    assert all(
        leaf.sharding is not None
        for call in run.values()
        for leaf in jax.tree.leaves(call.args[:2])
        if leaf.ndim
    )


def test_of_a_student_with_adapters_only_these_are_in_the_state():
    config = tiny.get_config()
    config.student.lora_rank = 4
    config.teacher.quantize = "int8"
    settings = settings_from(config)
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    with jax.set_mesh(mesh):
        models = programs.abstract_models(settings, mesh)
        run = calls(settings, mesh)
    held = bytes_held(models.frozen)
    assert bytes_held(models.state) < held / 2
    adapters = bytes_held(models.student) - held
    assert bytes_held(models.state) == pytest.approx(3 * adapters, rel=1e-2)
    assert run["update"].args[-1] is not None
    plain = tiny.get_config()
    with jax.set_mesh(mesh):
        wide = programs.abstract_models(settings_from(plain), mesh)
    assert bytes_held(models.teacher) < 0.4 * bytes_held(wide.teacher)


def test_packed_rows_are_not_planned():
    config = tiny.get_config()
    config.objective.stage = "offline"
    config.offline.pack_length = 64
    settings = settings_from(config)
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    with pytest.raises(ValueError, match="pack_length=64"):
        calls(settings, mesh)


def fake_devices(count):
    return devices("TPU v5 lite", count, 1)


def abstract_mesh(devices, **sizes):
    if sizes["data"] == -1:
        sizes["data"] = 1
        sizes["data"] = len(devices) // math.prod(sizes.values())
    if math.prod(sizes.values()) != len(devices):
        raise ValueError("axes do not multiply to the devices")
    return jax.sharding.AbstractMesh(
        tuple(sizes[name] for name in sharding.MESH_AXES), sharding.MESH_AXES
    )


@pytest.fixture
def without_devices(monkeypatch):
    """Sizes instead of meshes: nothing here needs real devices."""
    monkeypatch.setattr(
        plan_search, "topology_devices", lambda name: fake_devices(8)
    )
    monkeypatch.setattr(sharding, "make_mesh", abstract_mesh)

    def models(settings, mesh, theirs):
        ways = mesh.shape["fsdp"] * mesh.shape["tensor"]
        if mesh.shape["tensor"] > 2:
            raise ValueError("heads do not divide")
        size = jax.ShapeDtypeStruct((6 * GIB // ways,), "int8")
        return types.SimpleNamespace(state=size, teacher=size, student=size)

    monkeypatch.setattr(plan_search, "abstract_models", models)


def test_candidates_fit_by_their_parameters_and_come_cheapest_first(
    without_devices,
):
    settings = settings_from(qwen3_8b_to_1p7b.get_config())
    found = list(plan_search.candidates(settings, "v5e:2x4"))
    costs = [estimate for estimate, _ in found]
    assert found and costs == sorted(costs)
    for _, one in found:
        assert one.mesh.fsdp * one.mesh.tensor > 1  # 18 GB on one chip
        assert one.mesh.tensor <= 2
        ways = one.mesh.data * one.mesh.fsdp * one.mesh.expert
        assert 32 // one.optimizer.accumulate % ways == 0
    # Of two that differ in recomputation only, the one that does less.
    plain = [(e, s.student.remat) for e, s in found
             if s.mesh == found[0][1].mesh and s.optimizer.accumulate == 1
             and s.objective.chunk_size is None]  # fmt: skip
    assert [r for _, r in plain] == ["none", "dots", "full"]


def test_a_search_keeps_the_teachers_mesh(without_devices, monkeypatch):
    settings = settings_from(qwen3_8b_apart.get_config())
    found = list(plan_search.candidates(settings, "v5e:2x4"))
    meshes = {one.mesh for _, one in found}
    assert len(meshes) > 2
    for mesh in meshes:
        assert mesh.data * mesh.fsdp * mesh.tensor * mesh.expert == 4
    assert {one.teacher_mesh for _, one in found} == {settings.teacher_mesh}
    # What the teacher's chips did not hold they do not hold beside others.
    one, two = (
        dataclasses.replace(settings, mesh=mesh)
        for mesh in sorted(meshes, key=str)[:2]
    )
    assert plan_search._no_smaller(one, two, "annotate")
    assert not plan_search._no_smaller(one, two, "rollout")


def test_a_teachers_time_is_of_its_own_devices():
    def seconds(**changes):
        config = qwen3_8b_apart.get_config()
        config.teacher_mesh.update(changes)
        return plan_search.estimate(settings_from(config), V5E, 4)

    base = seconds()
    assert seconds(devices=8, tensor=8) < base < seconds(parts=1)
    assert seconds(tensor=2, fsdp=2) > seconds(tensor=2, data=2)


def test_parameters_that_stay_where_they_are_make_a_cheaper_rollout():
    config = qwen3_8b_to_1p7b.get_config()

    def seconds(sharding, fsdp):
        config.rollout.sharding, config.mesh.fsdp = sharding, fsdp
        return plan_search.estimate(settings_from(config), V5E, 8)

    train, gathered, tensor = (
        seconds(name, 8) for name in ("train", "gathered", "tensor")
    )
    # At every token, once, never; and each chip reads its eighth of them.
    assert train > 2 * gathered and gathered > tensor
    assert seconds("train", 1) == seconds("tensor", 1)


def test_a_teacher_that_stays_where_it_is_makes_cheaper_branches():
    config = qwen3_8b_to_1p7b.get_config()

    def seconds(sharding, variant="topd"):
        config.objective.branch_sharding = sharding
        config.objective.variant = variant
        return plan_search.estimate(settings_from(config), V5E, 8)

    train, gathered, rows = map(seconds, ("train", "gathered", "rows"))
    assert train > gathered > rows
    assert seconds("train", "opd") == seconds("rows", "opd")


def test_the_search_stops_at_the_first_that_fits(without_devices, monkeypatch):
    settings = settings_from(qwen3_8b_to_1p7b.get_config())
    asked = []

    def fake(changed, topology, *, only=(), say=None):
        asked.append((changed, only))
        slices = changed.optimizer.accumulate
        need = 40 * GIB / slices if only == ("update",) else GIB
        return plan_of(made((only or ("all",))[0], temporaries=need))

    monkeypatch.setattr(plan_search, "make_plan", fake)
    wrong = plan_of(made(temporaries=40 * GIB))
    tried, found = plan_search.search(settings, "v5e:2x4", wrong, seconds=60)
    assert found is not None and found.fits
    assert tried[0].flags == "" and "update needs" in tried[0].verdict
    assert tried[-1].verdict == "fits"
    assert "--config.optimizer.accumulate=" in tried[-1].flags
    text = advice(tried, found)
    assert "change: --config" in text
    # Nothing is compiled that cannot need less than what has failed.
    updates = [c for c, only in asked if only == ("update",)]
    for i, one in enumerate(updates[:-1]):
        for later in updates[i + 1 :]:
            assert not plan_search._no_smaller(later, one, "update")


def test_a_search_without_time_says_so(without_devices, monkeypatch):
    settings = settings_from(qwen3_8b_to_1p7b.get_config())
    wrong = plan_of(made(temporaries=40 * GIB))
    tried, found = plan_search.search(settings, "v5e:2x4", wrong, seconds=-1)
    assert found is None and tried[-1].verdict == "out of time"
    assert "nothing that was tried fits" in advice(tried, found)


def test_flags_name_what_differs():
    old = settings_from(tiny.get_config())
    new = dataclasses.replace(
        old,
        mesh=dataclasses.replace(old.mesh, fsdp=4),
        student=dataclasses.replace(old.student, remat="full"),
    )
    assert plan_search.difference(old, new) == (
        "--config.mesh.fsdp=4 --config.student.remat=full"
    )


def test_an_unknown_topology_is_one_line(monkeypatch):
    from jax.experimental import topologies

    def refuse(**_):
        raise RuntimeError("no\nsuch layout")

    monkeypatch.setattr(topologies, "get_topology_desc", refuse)
    with pytest.raises(ValueError, match="v5e:9x9: no such layout; try"):
        programs.topology_devices("v5e:9x9")

"""The teacher on devices of its own: what it refuses, and that it is the same.

What needs several devices runs in a child process.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from children import on_eight_devices
from conftest import EOS, PAD, make_trajectories
from small_run import settings_with, small_config

from topd_jax.cli.doctor import fit
from topd_jax.data.prompts import EncodedPrompts, prompt_stream
from topd_jax.data.records import check_rows
from topd_jax.data.toy_world.models import student_config, teacher_config
from topd_jax.experiments import sweep
from topd_jax.models import parameter_table
from topd_jax.objectives.objective import Objective
from topd_jax.parallel import apart, sharding, teacher_mesh
from topd_jax.parallel.teacher_mesh import (
    TeacherMeshSettings,
    divide,
    make_meshes,
)
from topd_jax.planning.plan import step_seconds
from topd_jax.sampling import rollout
from topd_jax.sampling.sampler import row_noise
from topd_jax.training.config import MeshSettings, settings_from
from topd_jax.training.score import annotate
from topd_jax.types import Prompts


@pytest.mark.slow
def test_two_meshes_are_the_run_of_one(tmp_path):
    said = on_eight_devices("sharded_submesh.py", tmp_path, "runs")
    assert said.count("same run") == 2


@pytest.mark.slow
def test_a_checkpoint_goes_on_on_other_meshes(tmp_path):
    said = on_eight_devices("sharded_submesh.py", tmp_path, "resumed")
    assert said.count("same after a change of meshes") == 2


@pytest.mark.slow
def test_steps_with_both_models_and_with_teachers_are_those_of_one(tmp_path):
    said = on_eight_devices("sharded_submesh.py", tmp_path, "models")
    assert said.count("same step") == 2


def test_a_slice_is_read_while_the_next_is_written(tmp_path):
    said = on_eight_devices("sharded_submesh.py", tmp_path, "overlap")
    assert "read while the next is written" in said


def test_noise_depends_on_the_row_of_the_whole_batch():
    key = jax.random.key(3)
    whole = row_noise(key, 8, (3,))
    np.testing.assert_array_equal(whole[4:], row_noise(key, 4, (3,), 4))


def test_a_slice_is_written_as_in_the_whole_batch(student):
    prompts = Prompts(
        jnp.arange(32, dtype=jnp.int32).reshape(8, 4) + 3,
        jnp.ones((8, 4), bool),
    )
    write = functools.partial(
        rollout, student, key=jax.random.key(0), max_new_tokens=6, samples=2,
        eos_ids=(EOS,), pad_id=PAD,
    )  # fmt: skip
    whole = write(prompts)
    parts = [write(p, first_row=8 * i) for i, p in enumerate(halves(prompts))]
    for x, *y in zip(*map(jax.tree.leaves, (whole, *parts)), strict=True):
        np.testing.assert_allclose(x, np.concatenate(y), atol=1e-5)


def halves(tree):
    return apart.split(tree, 2)


@pytest.mark.parametrize("variant", ["opd+suppress_control", "trust_region"])
def test_what_the_whole_batch_decides_is_decided_on_it(
    student, teacher, variant
):
    objective = Objective(
        variant=variant, candidates=2, window=4, branch_temperature=1.0
    )
    key, rows = jax.random.key(1), make_trajectories(rows=8)
    read = jax.jit(
        functools.partial(
            annotate, student, teacher, objective=objective, eos_ids=(EOS,),
            pad_id=PAD,
        )
    )  # fmt: skip
    whole = read(rows, key)
    notes = [
        read(part, key, first_row=4 * i) for i, part in enumerate(halves(rows))
    ]
    _, joined = apart.make_join(objective)(halves(rows), notes, key)
    for x, y in zip(*map(jax.tree.leaves, (whole, joined)), strict=True):
        np.testing.assert_allclose(x, y, atol=1e-4)
    # Slices by themselves say something else.
    apart_of = jax.tree.map(lambda *x: jnp.concatenate(x), *notes)
    name = "lots" if variant == "trust_region" else "divergent"
    assert (getattr(apart_of, name) != getattr(whole, name)).any()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(devices=-1), r"devices=-1 must be at least 0"),
        (dict(parts=2), r"parts=2 .*set teacher_mesh.devices above 0"),
        (dict(devices=4, parts=3), r"batch_size=8 must be divisible by .*=3"),
        (dict(devices=4, stage="offline"), "has the teacher write"),
        (dict(devices=4, parts=2, variant="tip"), "variant=tip weighs a token"),
    ],
)
def test_what_two_meshes_cannot_do_is_refused(changes, message):
    config = small_config()
    for name, value in changes.items():
        part = config.teacher_mesh
        (part if name in part else config.objective)[name] = value
    with pytest.raises(ValueError, match=message):
        settings_from(config)


def test_slices_of_several_teachers_rows_are_refused():
    settings = settings_with()
    check = functools.partial(
        teacher_mesh.check, objective=settings.objective, data=settings.data,
        teachers={"a": settings.teacher, "b": settings.teacher},
    )  # fmt: skip
    check(TeacherMeshSettings(devices=4))
    with pytest.raises(ValueError, match=r"names 2 teachers.*parts=1"):
        check(TeacherMeshSettings(devices=4, parts=2))


def test_a_sweep_is_refused(tmp_path):
    settings = settings_with(teacher_mesh__devices=4)
    with pytest.raises(ValueError, match="a sweep runs on one mesh"):
        sweep.sweep(settings, tmp_path)


def test_meshes_must_fit_the_devices():
    devices = [jax.devices()[0]] * 8
    make = functools.partial(make_meshes, MeshSettings(), devices=devices)
    with pytest.raises(ValueError, match=r"devices=8 must leave .* of the 8"):
        make(TeacherMeshSettings(devices=8))
    with pytest.raises(
        ValueError, match=r"config.teacher_mesh: .*needs 6 .* there are 4"
    ):
        make(TeacherMeshSettings(devices=4, data=2, fsdp=3))
    with pytest.raises(ValueError, match=r"config.mesh: .*needs 8 .*are 4"):
        make_meshes(
            MeshSettings(data=8), TeacherMeshSettings(4), devices=devices
        )


@dataclasses.dataclass(frozen=True)
class Device:
    """What the choice of devices looks at."""

    process_index: int
    id: int
    platform: str = "cpu"


def test_the_last_processes_give_all_of_their_devices():
    devices = [Device(p, i) for p in (2, 0, 1) for i in range(4)]
    for own, first in ((4, 2), (8, 1)):
        ours, theirs = divide(devices, own)
        for part, those in ((ours, range(first)), (theirs, range(first, 3))):
            assert part == [Device(p, i) for p in those for i in range(4)]
    # Of unequal ones too.
    ours, theirs = divide([*devices, Device(3, 0)], 5)
    assert {d.process_index for d in theirs} == {2, 3}


def test_else_every_process_gives_its_last_devices():
    devices = [Device(p, i) for p in (1, 0) for i in range(4)]
    ours, theirs = divide(devices, 2)
    assert ours == [Device(p, i) for p in (0, 1) for i in (0, 1, 2)]
    assert theirs == [Device(p, 3) for p in (0, 1)]
    for own in (3, 5, 8, 9):
        with pytest.raises(
            ValueError, match=rf"={own} must be all .* 2 proc.* try 2, 4, 6, or"
        ):
            divide(devices, own)
    # A process with fewer devices than others decides what each gives.
    with pytest.raises(ValueError, match=r"=3 must be .* try 2, 4, or"):
        divide([*devices[:4], *devices[4:6]], 3)


def test_no_two_processes_may_share_rows_of_the_student():
    devices = [Device(p, i) for p in range(2) for i in range(4)]
    make = functools.partial(
        make_meshes, teacher=TeacherMeshSettings(2), devices=devices
    )
    make(MeshSettings(tensor=3))
    with pytest.raises(ValueError, match=r"processes \[0, 1\] would share"):
        make(MeshSettings(tensor=6))
    # Alone on its process, it may do as it likes.
    make(MeshSettings(tensor=4), teacher=TeacherMeshSettings(4))


def test_every_process_has_rows_of_every_slice():
    encoded = EncodedPrompts(
        records=[{"prompt": str(i)} for i in range(8)],
        ids=[np.asarray([i + 3]) for i in range(8)], pad_id=PAD, max_length=4,
        skipped=0,
    )  # fmt: skip
    whole, *own = (
        next(prompt_stream(encoded, batch_size=8, seed=0, **options)).index
        for options in (
            {}, *(dict(parts=2, process_index=i, process_count=2)
                  for i in range(2)),
        )
    )  # fmt: skip
    slices = [np.concatenate(p) for p in zip(*map(halves, own), strict=True)]
    np.testing.assert_array_equal(np.concatenate(slices), whole)
    with pytest.raises(ValueError, match=r"=8 must be .* 3 parts x .*\(6\)"):
        prompt_stream(encoded, batch_size=8, seed=0, parts=3, process_count=2)


def test_every_part_must_divide_over_both_meshes():
    sizes = [(4, 1, 1, 1, 1), (3, 1, 1, 1, 1)]
    ours, theirs = (
        jax.sharding.AbstractMesh(s, sharding.MESH_AXES) for s in sizes
    )
    settings = settings_with(
        teacher_mesh__devices=3, teacher_mesh__parts=2, data__batch_size=12
    )
    with pytest.raises(
        ValueError, match=r"batch_size=12 in 2 .*\(12\); try 24"
    ):
        check_rows(settings, ours, "data", theirs)
    right = dataclasses.replace(settings.data, batch_size=24)
    settings = dataclasses.replace(settings, data=right)
    check_rows(settings, ours, "data", theirs)


def test_a_step_takes_less_where_scoring_is_beside_writing():
    phases = dict(
        prefill=1.0, decode=5.0, scoring=2.0, branches=2.0, update=3.0
    )
    assert step_seconds(phases, 1) == 13.0
    # Written in 3 and 3, scored in 2 and 2: 3 + 3 + 2, and the update.
    assert step_seconds(phases, 2) == 11.0
    phases["branches"] = 10.0
    assert step_seconds(phases, 2) == 3.0 + 6.0 + 6.0 + 3.0


def test_memory_is_estimated_of_both_meshes():
    ours, theirs = (
        jax.sharding.AbstractMesh((n, 1, 1, 1, 1), sharding.MESH_AXES)
        for n in (4, 2)
    )
    settings = settings_with(teacher_mesh__devices=2)
    configs = {
        "student": student_config(settings.world),
        "teacher": teacher_config(settings.world),
    }
    one = fit.estimate(settings, configs, ours)
    student, teacher = fit.estimate_apart(settings, configs, ours, theirs)
    size = 4 * sum(
        math.prod(r.shape) for r in parameter_table(configs["teacher"]).values()
    )
    head = 4 * configs["teacher"].vocab_size * configs["teacher"].width
    assert student.kept == pytest.approx(one.kept - size + head)
    assert size < teacher.kept < size + 2 * head
    assert student.annotate < teacher.annotate
    assert (teacher.rollout, teacher.update) == (0, 0)
    # Of two slices one is written and one read at a time.
    parts = dataclasses.replace(settings.teacher_mesh, parts=2)
    two = dataclasses.replace(settings, teacher_mesh=parts)
    writer, reader = fit.estimate_apart(two, configs, ours, theirs)
    assert writer.rollout == pytest.approx(student.rollout / 2)
    assert reader.annotate < teacher.annotate
    # A second teacher is beside the first.
    others = {"a": settings.teacher, "b": settings.teacher}
    data = dataclasses.replace(
        settings.data, source="jsonl", path="x", teacher_field="who"
    )
    more = {f"teachers.{name}": configs["teacher"] for name in others}
    more = {"student": configs["student"]} | more
    several = dataclasses.replace(settings, teachers=others, data=data)
    first, second = fit.estimate_apart(several, more, ours, theirs)
    assert first.kept == pytest.approx(student.kept + head)
    assert second.kept == pytest.approx(teacher.kept + size)

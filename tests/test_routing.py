"""Several teachers: their shares of a batch, and settings of them."""

import json
import re
import types

import pytest

from topd_jax.configs import default
from topd_jax.data.routing import (
    check_teacher_rows,
    prompts_per_teacher,
    shares_of,
)
from topd_jax.data.settings import DataSettings
from topd_jax.training.config import settings_from


@pytest.mark.parametrize(
    ("counts", "size", "expected"),
    [
        ((50, 50), 8, (4, 4)),
        ((60, 40), 8, (5, 3)),  # 4.8 and 3.2
        ((1, 99), 8, (1, 7)),  # 0.08: at least one
        ((97, 1, 1, 1), 4, (1, 1, 1, 1)),
        ((49, 49, 1, 1), 10, (4, 4, 1, 1)),
        ((1, 1, 1), 4, (2, 1, 1)),  # a tie: the first name
    ],
)
def test_shares_by_largest_remainder(counts, size, expected):
    names = [f"t{i}" for i in range(len(counts))]
    shares = shares_of(dict(zip(names, counts, strict=True)), size)
    assert list(shares.items()) == list(zip(names, expected, strict=True))


def mesh_of(data=1, fsdp=1):
    shape = {"data": data, "fsdp": fsdp, "expert": 1}
    return types.SimpleNamespace(shape=shape)


def records(*names):
    return [{"prompt": "?", "teacher": name} for name in names]


def test_prompts_of_each_teacher():
    train = records("math", "code", "math", "math")

    def prompts(names=("code", "math"), train=train, **data):
        return prompts_per_teacher(
            DataSettings(batch_size=8, samples=2, **data), names, train, train,
            mesh=mesh_of(data=2), accumulate=2,
        )  # fmt: skip

    assert prompts(()) == {}
    assert prompts() == {"code": 2, "math": 6}
    assert prompts(prompts_per_teacher=(4, 4)) == {"code": 4, "math": 4}
    with pytest.raises(ValueError, match="no training record .* 'code'"):
        prompts(train=records("math"))
    with pytest.raises(ValueError, match="3 of the 8 prompts .* 6 rows"):
        prompts(prompts_per_teacher=(3, 5))


def test_rows_that_cannot_be_shared():
    prompts = {"code": 3, "math": 5}
    check_teacher_rows(prompts, samples=4, ways=2, accumulate=2)
    for ways, message in (
        (2, "teacher 'code' has 3 of the 8 prompts of a batch x "
         "data.samples=1: 3 rows, which must be divisible by the mesh's data "
         "x fsdp x expert (2) x optimizer.accumulate (1); try "
         "data.batch_size=8 with data.prompts_per_teacher=(4, 4)"),
        (8, "data.batch_size=16 with data.prompts_per_teacher=(8, 8)"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=re.escape(message)):
            check_teacher_rows(prompts, samples=1, ways=ways, accumulate=1)


def config_with(**data):
    config = default.get_config()
    for name in ("math", "code"):
        config.teachers[name] = config.teacher.copy_and_resolve_references()
    config.data.source, config.data.teacher_field = "jsonl", "teacher"
    config.data.update(data)
    return config


def test_teachers_come_in_the_order_of_their_names():
    settings = settings_from(config_with())
    assert list(settings.teachers) == ["code", "math"]
    again = json.loads(json.dumps(settings.to_dict()))
    assert again == settings.to_dict()
    assert settings_from(again) == settings
    config = config_with()
    config.teachers.math.dtype = "bfloat16"
    assert settings_from(config).fingerprint() != settings.fingerprint()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"teacher_field": ""}, "names 2 teachers and data.teacher_field=''"),
        ({"source": "world"}, "data.source='world' has no field that names"),
        ({"batch_size": 1}, "batch_size=1 must be at least 2"),
        ({"prompts_per_teacher": (3, 4)}, "prompts_per_teacher=(3, 4) must be "
         "2 numbers (for code, math) whose sum is data.batch_size=32"),
    ],
)  # fmt: skip
def test_what_does_not_go_together_is_refused(data, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        settings_from(config_with(**data))


def test_what_only_the_unused_teacher_has_is_refused():
    config = config_with()
    for model in (config.teacher, *config.teachers.values()):
        model.dtype = "bfloat16"
    config.teachers.math.source = "elsewhere"
    settings_from(config)  # all read the one, and "world" is the default
    config.teacher.source = config.teachers.math.source
    with pytest.raises(ValueError, match=re.escape(
        "teacher.source='elsewhere' must be 'world' (the default): "
        "config.teachers takes the place of config.teacher; set "
        "teachers.code.source"
    )):  # fmt: skip
        settings_from(config)


def test_keys_and_names_of_teachers_are_checked():
    for teachers, message in (
        ({"math": {"sorce": "x"}}, "config.teachers.math.sorce; the nearest "
         "is config.teachers.math.source"),
        ({"a/b": {"source": "x"}}, "the name 'a/b' must be of letters"),
        ({"math": 3}, "config.teachers.math=3 must be a"),
    ):  # fmt: skip
        config = config_with()
        config.teachers = teachers
        with pytest.raises(ValueError, match=re.escape(message)):
            settings_from(config)

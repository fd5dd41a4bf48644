"""Batches in which every teacher has its own number of prompts."""

import json
import re

import numpy as np
import pytest

from topd_jax.cli import main
from topd_jax.configs import default
from topd_jax.data import prompts
from topd_jax.data.routing import require_even_rows, shares_of
from topd_jax.training.checkpointing import require_same_run
from topd_jax.training.config import settings_from

SHARES = {"code": 3, "math": 5}


def encoded(code=7, math=20):
    """Prompts of increasing lengths; the teachers alternate at first."""
    names = ["code", "math"] * min(code, math)
    names += ["code"] * (code - math) + ["math"] * (math - code)
    return prompts.EncodedPrompts(
        tuple({"teacher": n, "prompt": str(i)} for i, n in enumerate(names)),
        tuple(np.full(1 + i % 9, i, np.int32) for i in range(len(names))),
        pad_id=0,
        max_length=16,
        skipped=0,
    )


def stream(data, seed=1, **options):
    return prompts.prompt_stream(
        data, batch_size=8, seed=seed, shares=SHARES, buckets=(4, 8, 16),
        **options,
    )  # fmt: skip


def take(iterator, count):
    return [next(iterator) for _ in range(count)]


def assert_same(ours, theirs):
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(a.index, b.index)
        np.testing.assert_array_equal(a.prompts.tokens, b.prompts.tokens)


@pytest.mark.parametrize(
    ("counts", "size", "expected"),
    [
        ((50, 50), 8, (4, 4)),
        ((75, 25), 8, (6, 2)),
        ((60, 40), 8, (5, 3)),  # 4.8 and 3.2
        ((1, 99), 8, (1, 7)),  # 0.08: at least one
        ((97, 1, 1, 1), 4, (1, 1, 1, 1)),
        ((49, 49, 1, 1), 10, (4, 4, 1, 1)),
        ((1, 1, 1), 4, (2, 1, 1)),  # a tie: the first name
    ],
)
def test_shares_by_largest_remainder(counts, size, expected):
    names = [f"t{i}" for i in range(len(counts))]
    found = shares_of(dict(zip(names, counts, strict=True)), size)
    assert tuple(found.values()) == expected
    assert list(found) == names


def test_every_batch_holds_the_same_number_of_each():
    data = encoded()
    seen = {"code": [], "math": []}
    for batch in take(stream(data), 28):
        names = [data.records[i]["teacher"] for i in batch.index]
        assert names == ["code"] * 3 + ["math"] * 5
        for name, i in zip(names, batch.index, strict=True):
            seen[name].append(int(i))
    # Each teacher's prompts once an epoch, in an order that changes.
    for name, count in (("code", 7), ("math", 20)):
        epochs = np.reshape(seen[name], (-1, count))
        assert (np.sort(epochs) == np.sort(epochs[0])).all()
        assert (epochs[0] != epochs[1]).any()


def test_an_order_is_of_its_teacher_alone():
    one = take(stream(encoded(7, 20)), 6)
    more = take(stream(encoded(7, 25)), 6)
    for a, b in zip(one, more, strict=True):
        np.testing.assert_array_equal(a.index[:3], b.index[:3])
    other = take(stream(encoded(7, 20), seed=2), 6)
    for different in (more, other):
        both = zip(one, different, strict=True)
        assert any((a.index != b.index).any() for a, b in both)


def test_a_resumed_stream_goes_on_identically():
    data = encoded()
    whole = take(stream(data), 12)
    started = stream(data)
    assert_same(take(started, 7), whole[:7])
    resumed = stream(data)
    resumed.set_state(json.loads(json.dumps(started.get_state())))
    assert_same(take(resumed, 5), whole[7:])


@pytest.mark.parametrize("count", [1, 2, 4])
def test_processes_share_the_same_global_batch(count):
    data = encoded()
    whole = take(stream(data), 6)
    parts = [
        take(stream(data, process_index=i, process_count=count), 6)
        for i in range(count)
    ]
    for step, batch in enumerate(whole):
        shares = [part[step] for part in parts]
        np.testing.assert_array_equal(
            np.concatenate([s.index for s in shares]), batch.index
        )
        np.testing.assert_array_equal(
            np.concatenate([s.prompts.tokens for s in shares]),
            batch.prompts.tokens,
        )


def test_a_teacher_without_prompts_is_named():
    data = encoded().take([1, 3])
    with pytest.raises(ValueError, match="no prompt of the teacher 'code'"):
        stream(data)


@pytest.mark.parametrize(
    ("samples", "ways", "accumulate", "message"),
    [
        (1, 2, 1, "teacher 'code' has 3 of the 8 prompts of a batch x "
         "data.samples=1: 3 rows, which must be divisible by the mesh's data "
         "x fsdp x expert (2) x optimizer.accumulate (1); try "
         "data.batch_size=8 with data.teacher_prompts=(4, 4)"),
        (2, 2, 2, "6 rows, which must be divisible by the mesh's data x fsdp "
         "x expert (2) x optimizer.accumulate (2); try data.batch_size=8 "
         "with data.teacher_prompts=(4, 4)"),
        (1, 8, 1, "data.batch_size=16 with data.teacher_prompts=(8, 8)"),
    ],
)  # fmt: skip
def test_rows_that_cannot_be_shared(samples, ways, accumulate, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        require_even_rows(
            SHARES, samples=samples, ways=ways, accumulate=accumulate
        )
    require_even_rows(SHARES, samples=4, ways=2, accumulate=2)


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
    assert json.loads(json.dumps(settings.to_dict())) == settings.to_dict()
    assert settings_from(settings.to_dict()) == settings


def test_a_teachers_settings_make_another_run():
    settings = settings_from(config_with())
    config = config_with()
    config.teachers.math.dtype = "bfloat16"
    other = settings_from(config)
    assert other.fingerprint() != settings.fingerprint()
    found = {"settings": settings.to_dict(), "teacher": {}}
    # A setting that is younger than the checkpoint.
    del found["settings"]["teachers"]["math"]["unroll"]
    require_same_run(found, settings, {}, "here")
    with pytest.raises(
        ValueError, match="teachers.math.dtype: 'float32' there, 'bfloat16'"
    ):
        require_same_run(found, other, {}, "here")
    del config.teachers.math
    with pytest.raises(
        ValueError, match="teachers.math.source: 'world' there, None here"
    ):
        require_same_run(found, settings_from(config), {}, "here")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"teacher_field": ""}, "names 2 teachers and data.teacher_field=''"),
        ({"source": "world"}, "data.source='world' has no field that names"),
        ({"batch_size": 1}, "batch_size=1 must be at least 2"),
        ({"teacher_prompts": (3, 4)}, "teacher_prompts=(3, 4) must be 2 "
         "numbers above 0 (for code, math) whose sum is data.batch_size=32"),
        ({"teacher_prompts": (32, 0)}, "teacher_prompts=(32, 0) must be"),
        ({"teacher_prompts": (32,)}, "teacher_prompts=(32,) must be"),
    ],
)  # fmt: skip
def test_what_does_not_go_together_is_refused(data, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        settings_from(config_with(**data))


def test_keys_and_names_of_teachers_are_checked(tmp_path, capsys):
    config = config_with()
    config.teachers.math = {"sorce": "x"}
    with pytest.raises(
        ValueError, match=r"config\.teachers\.math\.sorce; the nearest is "
        r"config\.teachers\.math\.source",
    ):  # fmt: skip
        settings_from(config)
    config.teachers = {"a/b": {"source": "x"}, "c": {}}
    with pytest.raises(ValueError, match="the name 'a/b' must be of letters"):
        settings_from(config)
    config.teachers = {"math": 3}
    with pytest.raises(ValueError, match=r"config\.teachers\.math=3 must be a"):
        settings_from(config)
    with pytest.raises(SystemExit):
        main.run(
            ["train", "--config=tiny", f"--workdir={tmp_path}",
             "--config.teachers.math.source=x"]
        )  # fmt: skip
    assert "config.teachers is empty" in capsys.readouterr().err

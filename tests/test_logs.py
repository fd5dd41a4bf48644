"""What a run writes down of its steps."""

import time

import jax.numpy as jnp
import pytest

from topd_jax.training.logging import Logs, read_jsonl


def test_seconds_are_those_of_the_step_that_they_stand_at(
    tmp_path, monkeypatch
):
    logs = Logs(tmp_path, step=-1, tensorboard=False)
    metrics = {"num_tokens": (jnp.float32(6.0), jnp.float32(1.0))}
    times = {"seconds_statistics": 0.5}
    clock = iter((13.0, 14.0, 37.0))  # when the metrics of each are known
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    assert logs.later(1, metrics, {}, 10.0) is None
    assert logs.later(2, metrics, {}, 10.5)["seconds"] == 3.0  # 10 to 13
    assert logs.flush()["seconds"] == 1.0  # dispatched early: 13 to 14
    logs.later(3, metrics, times, 34.0)  # an evaluation lies between
    logs.close()
    rows = read_jsonl(tmp_path / "metrics.jsonl")
    assert [r["seconds"] for r in rows] == [3.0, 1.0, 2.5]
    assert [r["rate_tokens"] for r in rows] == pytest.approx([2.0, 6.0, 2.4])

"""What a run writes down of its steps, and what is cut back on a resume."""

import errno
import time
from pathlib import Path

import jax.numpy as jnp
import pytest

from topd_jax.training.config import GuardSettings
from topd_jax.training.logging import Logs, cut_log, read_jsonl
from topd_jax.training.watch import Watch

METRICS = {"num_tokens": (jnp.float32(6.0), jnp.float32(1.0))}


def watch():
    return Watch(GuardSettings(), max_skipped=10)


def test_seconds_are_those_of_the_step_that_they_stand_at(
    tmp_path, monkeypatch
):
    logs = Logs(tmp_path, step=-1, tensorboard=False, watch=watch())
    times = {"seconds_statistics": 0.5}
    clock = iter((13.0, 14.0, 37.0))  # when the metrics of each are known
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    assert logs.later(1, METRICS, {}, 10.0) is None
    assert logs.later(2, METRICS, {}, 10.5)["seconds"] == 3.0  # 10 to 13
    assert logs.flush()["seconds"] == 1.0  # dispatched early: 13 to 14
    logs.later(3, METRICS, times, 34.0)  # an evaluation lies between
    logs.close()
    rows = read_jsonl(tmp_path / "metrics.jsonl")
    assert [r["seconds"] for r in rows] == [3.0, 1.0, 2.5]
    assert [r["rate_tokens"] for r in rows] == pytest.approx([2.0, 6.0, 2.4])


def test_the_metrics_of_every_step_are_watched(tmp_path):
    logs = Logs(tmp_path, step=-1, tensorboard=False, watch=watch())
    for step, skipped in enumerate([1, 0, 1, 1, 0, 1, 0, 0], start=1):
        metrics = METRICS | {"skipped": (jnp.float32(skipped), jnp.ones(()))}
        logs.later(step, metrics, {}, 0.0)
    logs.close()
    alarms = read_jsonl(tmp_path / "alarms.jsonl")
    assert [(r["step"], r["alarm"]) for r in alarms] == [
        (step, "non_finite") for step in (1, 3, 4, 6)
    ]


def test_a_full_disk_leaves_the_log_whole(tmp_path, monkeypatch):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n')

    def full(self: Path, data: bytes) -> None:
        with self.open("wb") as file:
            file.write(data[:3])
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", full)
        with pytest.raises(OSError, match="No space left"):
            cut_log(path, 1)
    assert read_jsonl(path) == [{"step": 1}, {"step": 2}]
    cut_log(path, 1)
    assert read_jsonl(path) == [{"step": 1}]
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


GARBAGE = {
    b"\x00\x93\xff\x07": "is not JSON",
    '{"step": 2, "text": "é"}'.encode()[:-3]: "is not JSON",
    b'{"step": 2, "lo': "is not JSON",
    b"nonsense": "is not JSON",
    b"[" * 100_000: "is not JSON",
    b"[1, 2]": "is not a JSON object",
    b"3": "is not a JSON object",
}


def test_resuming_drops_garbage_and_says_so(tmp_path, caplog):
    path = tmp_path / "metrics.jsonl"
    cut_log(path, 3)
    assert not path.exists()
    no_step = b'{"loss": 2.0}', b'{"step": "2"}'
    garbage = [*GARBAGE, *no_step]
    rows = [b'{"step": 1}', *garbage, b"", b'{"step": 2}', b'{"step": 3}']
    path.write_bytes(b"\n".join(rows))
    cut_log(path, 2)
    assert path.read_bytes() == b'{"step": 1}\n{"step": 2}\n'
    (told,) = caplog.messages
    assert told == f"{path}: dropped {len(garbage)} damaged line(s)"
    cut_log(path, -1)
    assert path.read_bytes() == b""
    assert len(caplog.messages) == 1


def test_readers_name_the_line_that_is_garbage(tmp_path):
    """But for a last one that is half written, where that may be."""
    path = tmp_path / "record.jsonl"
    for line, said in GARBAGE.items():
        path.write_bytes(b'{"step": 1}\n\n' + line + b'\n{"step": 2}\n')
        message = rf"record\.jsonl line 3 {said}.*rem"
        with pytest.raises(ValueError, match=message):
            read_jsonl(path)
    path.write_bytes('{"a": 1}\n{"a": "é'.encode()[:-1])
    assert read_jsonl(path, torn=True) == [{"a": 1}]
    with pytest.raises(ValueError, match="record.jsonl line 2 is not JSON"):
        read_jsonl(path)
    assert read_jsonl(tmp_path / "none.jsonl") == []

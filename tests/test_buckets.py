"""A run in a bucket: an emulator, real clients, and faults between them."""

import gc
import itertools
import json
import os
import time

import jax
import numpy as np
import pytest
from bucket_server import LOST, serving
from children import run_topd
from small_run import (
    assert_same_run,
    refusal_of,
    without_times,
)
from test_checkpointing import record, state
from test_damage import save
from test_processes import begin, finish, run_alone, steps_of
from test_sweep_report import draw, line

from topd_jax.data import solutions, sources
from topd_jax.experiments import sweep
from topd_jax.experiments.records import append_row
from topd_jax.models import load, save_model
from topd_jax.parallel import buckets, lock
from topd_jax.training import loop
from topd_jax.training.checkpointing import Checkpoints
from topd_jax.training.logging import cut_log, read_jsonl
from topd_jax.training.watch import Alarm, Watch

_numbers = itertools.count()


@pytest.fixture(scope="module")
def service(tmp_path_factory):
    with serving() as service, pytest.MonkeyPatch.context() as patch:
        for name, value in service.environment.items():
            patch.setenv(name, value)
        cache = tmp_path_factory.mktemp("cache")
        patch.setenv("XDG_CACHE_HOME", str(cache))
        yield service


@pytest.fixture
def bucket(service):
    """The path of an empty bucket."""
    service.fault = lambda method, path: 0
    yield buckets.as_path(service.create(f"bucket-{next(_numbers)}"))
    service.fault = lambda method, path: 0


def now_and_then(every):
    """Two kinds of overload, each of so many requests."""
    requests = itertools.count(1)

    def fault(method, path):
        number = next(requests) % every
        return {0: 503, every // 2: 429}.get(number, 0)

    return fault


@pytest.mark.parametrize("copied", [False, True])
def test_parts_of_a_log_are_cut_at_a_step(bucket, tmp_path, copied):
    """In a bucket, or in a copy of one on a disk."""
    path = (tmp_path if copied else bucket) / "metrics.jsonl"
    if copied:
        path.mkdir()
    assert read_jsonl(path) == []
    log = buckets.LogParts(path)
    for step in (1, 2, 2, 3, 4):
        log.write(json.dumps({"step": step}) + "\n")
        if step != 1:
            log.upload()
    assert len(buckets.files(path)) == 4
    for _ in range(2):  # a second time nothing changes
        cut_log(path, 2)
        assert [row["step"] for row in read_jsonl(path)] == [1, 2, 2]
        assert buckets.files(path) == ["000001", "000002"]
    log = buckets.LogParts(path)
    log.write('{"step": 3}\n')
    log.close()
    assert [row["step"] for row in read_jsonl(path)] == [1, 2, 2, 3]


def test_a_path_may_begin_at_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert buckets.as_path("~/runs") == tmp_path / "runs"


def test_a_sweep_reports_there(bucket, settings, capsys):
    record = bucket / "sweep" / "record.jsonl"
    row = line("opd", 0, draw(0, 0.5), fingerprint="x")
    append_row(record, row)
    runs = {("opd", "x"): sweep._Run("opd", "", settings)}
    files = sweep._report(record, runs, record.parent)
    assert files["table_file"] == f"{bucket}/sweep/report/table.md"
    assert "| opd | 1 |" in capsys.readouterr().out


def test_a_bucket_has_one_holder(bucket, monkeypatch):
    for name, value in (("_PATIENCE", 1.0), ("_POLL", 0.1), ("_BEAT", 0.2)):
        monkeypatch.setattr(lock, name, value)
    run, path = bucket / "run", bucket / "run" / lock.NAME
    with lock.held(run):
        ours = json.loads(path.read_text())
        assert ours["pid"] == os.getpid()
        monkeypatch.setattr(lock, "_machine", lambda: ["other", "", ""])
        with pytest.raises(ValueError, match="in use by process"):
            lock._acquire(path, wait=False)
        # One that goes on although another has taken it.
        path.write_text(json.dumps(ours | {"token": "another"}))
        lock._held[path].beaten = -10
        with pytest.raises(ValueError, match="was taken over by process"):
            lock.confirm()
    assert json.loads(path.read_text())["token"] == "another"
    with lock.held(run):  # which does not beat
        assert json.loads(path.read_text())["token"] != "another"
    assert not path.exists()
    one, two = (buckets.Blob(path, create=True) for _ in range(2))
    assert one.read() == two.read() == b""
    # Of two that create it, or replace it, one does.
    assert one.write(b"one") and not two.write(b"two")
    assert two.read() == b"one" and two.write(b"two")
    assert not one.write(b"one again")


def test_a_damaged_checkpoint_in_a_bucket_is_moved_aside(bucket, caplog):
    folder = bucket / "run" / "checkpoints"
    save(folder, 4)
    # As a process leaves it that is killed while it saves.
    (folder / "4" / "commit_success.txt").unlink()
    checkpoints = Checkpoints(folder, 3)
    assert checkpoints.newest_intact() is None
    checkpoints.save(4, state(4), jax.random.key(4), record())
    assert checkpoints.newest_intact() == 4
    names = [n for n in buckets.files(folder / "4") if n.startswith("state/")]
    victim = max(names, key=lambda n: (folder / "4" / n).stat().length)
    data = bytearray((folder / "4" / victim).read_bytes())
    data[len(data) // 2] ^= 0x20
    (folder / "4" / victim).write_bytes(data)
    assert checkpoints.newest_intact(required=False) is None
    assert f"{victim} differs from its checksum" in caplog.text
    assert checkpoints.steps() == []
    assert (folder / "damaged-4" / victim).exists()
    checkpoints.close()


def test_data_and_models_are_read_from_a_bucket(bucket, trained):
    rows = [
        {"question": "1+1?", "answer": "2"},
        {"question": "é", "answer": ""},
    ]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (bucket / "data.jsonl").write_text(text)
    records = sources.read_source("jsonl", f"{bucket}/data.jsonl")
    assert [r["prompt"] for r in records] == ["1+1?", "é"]
    line = refusal_of(lambda: sources.read_source("jsonl", f"{bucket}/no"))
    assert f"no file at {bucket}/no" in line
    files = solutions.open_set(bucket / "set", {"shards": 1})
    row = dict.fromkeys(solutions.Solution.__annotations__)
    ids = np.arange(3)
    files.write(0, [row | {"prompt_tokens": ids, "completion_tokens": ids}])
    files, _ = solutions.find_set(f"{bucket}/set")
    assert next(iter(files.read(0)))["prompt_tokens"].tolist() == [0, 1, 2]
    model, _ = load(str(trained))
    with buckets.uploaded(bucket / "model") as folder:
        save_model(model, folder / "x")
    again, _ = load(f"{bucket}/model/x")
    assert jax.tree.all(jax.tree.map(np.array_equal, model, again))
    line = refusal_of(lambda: load(f"{bucket}/none"))
    assert f"no model at {bucket}/none" in line


def alarming(plain):
    """In the place of a watch's look: it raises an alarm at step 5."""

    def look(watch, step, row):
        if step == 5:
            watch.fresh.append(Alarm(step, "odd", "is odd", row))
        return plain(watch, step, row)

    return look


def test_a_run_in_a_bucket_ends_as_one_on_a_disk(
    trained, service, bucket, topd, refused, small_arguments, monkeypatch
):
    """With overload; and the bucket vanishes, before and on its way."""
    workdir = bucket / "a" / "run"
    run = [*small_arguments, f"--workdir={workdir}"]
    train = ["train", *run, "--config.log.tensorboard=True"]
    train += ["--config.checkpoint.every=4"]
    gone = "allow this machine's account to use it"
    for status, out in ((404, "check that bucket and path exist"), (403, gone)):
        service.fault = lambda method, path, status=status: status
        line = refused(*train)
        assert str(bucket) in line and out in line and str(status) in line
    service.fault = now_and_then(800)
    one_step = loop.Run._one_step

    def vanishing(run, step):
        if step == 6:
            run.checkpoints.wait()
            service.fault = lambda method, path: 403
        return one_step(run, step)

    with monkeypatch.context() as patch:
        patch.setattr(loop.Run, "_one_step", vanishing)
        line = refused(*train, bars=True)
    assert str(bucket) in line and gone in line
    gc.collect()  # tensorboardX uploads once more as it goes, and is refused
    service.fault, service.faults = now_and_then(400), 0
    # Uploaded with the last checkpoint.
    assert steps_of(workdir) == [1, 2, 3, 4]
    # Of before a roll-back: older, whatever its step.
    for name in ("9-even", "9-odd"):
        (workdir / "dumps" / name / "dump.json").write_text("{}")
    with monkeypatch.context() as patch:
        patch.setattr(Watch, "look", alarming(Watch.look))
        topd(*train, "--config.guard.dumps=1")
    assert service.faults > 1  # of both kinds
    service.fault = lambda method, path: 0
    assert_same_run(trained, workdir)
    assert {"settings.json", "tokenizer", "tensorboard"} <= {
        name.partition("/")[0] for name in buckets.files(workdir)
    }
    (dump,) = (workdir / "dumps").glob("*")
    assert dump.name == "5-odd"  # the newest one stays
    assert (dump / "checkpoints" / "4" / "SHA256SUMS").exists()
    found = json.loads(topd("replay", dump))
    assert found["same"] and "began" not in found
    topd("export", *run, f"--output={bucket}/out")
    one, two = (load(str(model))[0] for model in (trained, bucket / "out"))
    assert jax.tree.all(jax.tree.map(np.array_equal, one, two))
    assert json.loads(topd("report", f"--workdir={workdir}"))["runs"]
    assert (workdir / "report.html").exists()


def test_a_copy_that_breaks_off_leaves_nothing(
    bucket, service, tmp_path, monkeypatch
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for name in "ab":
        (bucket / "model" / "part" / name).write_text(name)
    service.fault = lambda method, path: 403 * ("part%2Fb" in path)
    with pytest.raises(OSError, match="Forbidden"):
        buckets.copied(bucket / "model")
    assert buckets.files(tmp_path) == []
    service.fault = lambda method, path: 0
    for _ in range(2):
        copy = buckets.copied(bucket / "model")
        assert copy.name == "model"
        assert buckets.files(copy) == ["part/a", "part/b"]


def lost_for(seconds):
    """No connection from the first part of checkpoint 4 on."""
    until = []

    def fault(method, path):
        if "checkpoints%2F4%2Fstate" in path and not until:
            until.append(time.monotonic() + seconds)
        return LOST if until and time.monotonic() < until[0] else 0

    return fault


@pytest.mark.slow
def test_a_connection_is_waited_for_and_may_come_back(
    trained, settings, service, bucket, small_arguments, tmp_path
):
    service.fault = lost_for(1e9)
    train = ["train", *small_arguments, f"--workdir={bucket}/run"]
    code, _, err = run_topd(*train, cwd=tmp_path)
    assert code == 1 and "Traceback" not in err
    line = err.splitlines()[-1]
    assert line.startswith(f"topd: {bucket}: ")
    assert line.endswith("check that it can be reached, and rerun the command")
    service.fault, service.faults = lost_for(8), 0
    loop.train(settings, bucket / "run")
    assert service.faults > 4
    assert_same_run(trained, bucket / "run")


@pytest.mark.slow
def test_two_processes_share_a_bucket(bucket, service, tmp_path):
    """The world too is made in the bucket."""
    service.fault = now_and_then(200)
    alone = run_alone(tmp_path / "world", tmp_path / "alone", 2)
    run = bucket / "run"
    for _, err, code in finish(begin(run / "world", run, 2, devices=1)):
        assert code == 0, err
    service.fault = lambda method, path: 0
    assert steps_of(run) == [1, 2, 3, 4, 5, 6]
    for name in ("metrics", "evals", "completions", "problems"):
        there, here = (without_times(x / f"{name}.jsonl") for x in (alone, run))
        assert there == here and there
    one, two = (load(str(x))[0] for x in (alone, run))
    assert jax.tree.all(jax.tree.map(np.array_equal, one, two))

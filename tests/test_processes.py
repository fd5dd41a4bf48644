"""Several processes as one program: real ones, on this machine."""

import json
import os
import re
import signal
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from children import finish, run_script, simulated, start_several
from small_run import assert_same_run, settings_with

from topd_jax.cli import several
from topd_jax.cli.commands import COMMANDS
from topd_jax.parallel import hosts
from topd_jax.training.logging import read_jsonl

TESTS = Path(__file__).parent
SLOTS = ["--config.rollout.slots=4"]


def begin(world, workdir, count, *, devices, more=(), scripts=()):
    """Starts ``topd train`` as ``count`` processes of some devices each."""
    line = [
        "-m", "topd_jax.cli", "train",
        f"--config={TESTS / 'small_run.py'}",
        f"--config.world.cache={world}",
        f"--workdir={workdir}",
        "--config.mesh.fsdp=2",
        *more,
    ]  # fmt: skip
    return start_several(line, count, devices=devices, scripts=scripts)


def steps_of(workdir):
    return [m["step"] for m in read_jsonl(workdir / "metrics.jsonl")]


def await_file(path, children):
    while not (path.exists() and path.stat().st_size):
        assert children[0].poll() is None, children[0].communicate()[1]
        time.sleep(0.1)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return tmp_path_factory.mktemp("processes") / "world"


def run_alone(world, workdir, devices, more=()):
    children = begin(world, workdir, 1, devices=devices, more=more)
    ((_, err, code),) = finish(children)
    assert code == 0, err
    return workdir


@pytest.fixture(scope="module")
def alone(world, tmp_path_factory):
    return run_alone(world, tmp_path_factory.mktemp("alone"), 2, SLOTS)


@pytest.mark.slow
def test_a_killed_process_stops_the_others_and_the_job_goes_on(
    alone, world, tmp_path
):
    """As one program, also where its newest checkpoint is damaged then."""
    more = [*SLOTS, "--config.train.heartbeat=10"]
    children = begin(world, tmp_path, 2, devices=1, more=more)
    await_file(tmp_path / "checkpoints" / "2", children)
    children[1].send_signal(signal.SIGKILL)
    (_, err, code), _ = finish(children)
    assert code != 0
    # JAX calls a process a task.
    named = r"unhealthy \(stopped sending heartbeats\):\n1\n"
    assert re.search(named, err), err
    more = [*SLOTS, "--config.train.preflight=True"]
    for damaged in (False, True):
        if damaged:
            files = (tmp_path / "checkpoints" / "6" / "state").rglob("d/*")
            max(files, key=lambda p: p.stat().st_size).write_bytes(b"")
        done = finish(begin(world, tmp_path, 2, devices=1, more=more))
        for _, err, code in done:
            assert code == 0, err
            assert ("6 is damaged: state/" in err) <= damaged
        # The first alone prints the evaluation.
        assert ["reverse_kl" in out for out, _, _ in done] == [True, False]
        assert steps_of(tmp_path) == [1, 2, 3, 4, 5, 6]
        assert_same_run(alone, tmp_path)
    names = {p.name for p in (tmp_path / "checkpoints").iterdir()}
    assert names == {"4", "6", "damaged-6"}


def said_of_stops(err):
    said = ("topd: stop", "topd: SIG")
    return [x for x in err.splitlines() if x.startswith(said)]


@pytest.mark.slow
def test_a_signal_to_one_saves_and_stops_all(alone, world, tmp_path):
    """After the same step, and within an evaluation; the bits stay."""
    for phase, name in (("step", "SIGINT"), ("asked", "SIGTERM")):
        scripts = [("small_stop.py", phase, name)]
        done = finish(
            begin(world, tmp_path, 2, devices=1, more=SLOTS, scripts=scripts)
        )
        stopped = (
            f"topd: stopped by {name} and saved after step 4; rerun the "
            "command to resume"
        )
        waits = f"topd: {name}: stopping after this step; again: at once"
        for (_, err, code), said in zip(
            done, [[stopped], [waits, stopped]], strict=True
        ):
            assert code == 128 + signal.Signals[name], err
            assert said_of_stops(err) == said
            assert "Traceback" not in err
        assert steps_of(tmp_path) == [1, 2, 3, 4]
        rows = read_jsonl(tmp_path / "evals.jsonl")
        assert [row["step"] for row in rows] == [0]
    for _, err, code in finish(
        begin(world, tmp_path, 2, devices=1, more=SLOTS)
    ):
        assert code == 0, err
    assert_same_run(alone, tmp_path)


@pytest.mark.slow
def test_a_second_signal_stops_one_of_several_at_once(world, tmp_path):
    scripts = [("small_stop.py", "twice", "SIGTERM")]
    children = begin(world, tmp_path, 2, devices=1, scripts=scripts)
    ((_, err, code),) = finish(children[1:])
    children[0].kill()  # it would wait for the heartbeat
    finish(children[:1])
    assert code == 128 + signal.SIGTERM, err
    assert said_of_stops(err)[1:] == [
        "topd: stopped by SIGTERM; rerun the command to resume"
    ]


@pytest.mark.slow
def test_processes_roll_back_as_one_does(world, tmp_path):
    """With the same bits, alarms and dumps, said once; replay as one.

    Each has half of every parameter, and all rows.
    """
    runs = [tmp_path / "one", tmp_path / "two"]
    more = [
        "--config.train.max_skipped=1", "--config.train.steps=8",
        "--config.mesh.fsdp=1", "--config.mesh.tensor=2",
    ]  # fmt: skip
    told = []
    for workdir, count in zip(runs, (1, 2), strict=True):
        scripts = [("small_broken.py",)] * count
        done = finish(
            begin(
                world, workdir, count, devices=2 // count, more=more,
                scripts=scripts,
            )
        )  # fmt: skip
        for _, err, code in done:
            assert code == 0, err
        told += [
            [x.replace(str(workdir), "") for x in err.splitlines()
             if x.startswith(("topd: alarm", "topd: rolled back"))]
            for _, err, _ in done
        ]  # fmt: skip
    assert told[0] == told[1] and len(told[0]) >= 2 and told[2] == []
    assert told[0][-1].startswith("topd: rolled back to step 4, from the 2 ")
    assert_same_run(*runs)
    alarms, dumps = (
        [read(run) for run in runs]
        for read in (
            lambda run: read_jsonl(run / "alarms.jsonl"),
            lambda run: sorted(p.name for p in (run / "dumps").iterdir()),
        )
    )
    assert alarms[0] == alarms[1] and alarms[0][0]["alarm"] == "rollback"
    assert dumps[0] == dumps[1] and "5-non_finite" in dumps[0]
    replay = "-m", "topd_jax.cli", "replay", runs[1] / "dumps" / "5-non_finite"
    found = json.loads(run_script(*replay, XLA_FLAGS=simulated(2)))["metrics"]
    # What was pretended alone differs.
    assert [n for n, (a, b) in found.items() if a != b] == ["skipped"]
    with pytest.raises(
        AssertionError, match=r"on 2 device\(s\) and here are 1"
    ):
        run_script(*replay, XLA_FLAGS=simulated(1))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "--processes=2"], "--coordinator, --process missing"),
        (["train", "--coordinator=localhost:1", "--processes=2",
          "--process=2"], "--process=2 must be in 0..1"),
        (["report", "--distributed"],
         "unrecognized arguments: --config=tiny --distributed"),
    ],
)  # fmt: skip
def test_flags_that_do_not_go_together(arguments, message, tmp_path, refused):
    command, *flags = arguments
    workdir = f"--workdir={tmp_path}"
    assert message in refused(command, "--config=tiny", workdir, *flags)
    assert list(tmp_path.iterdir()) == []


def test_another_version_or_config_is_refused_by_name(monkeypatch, tmp_path):
    """All that processes compare; the texts of others may be longer."""
    told = []
    monkeypatch.setattr(hosts, "start", lambda *_, **__: None)
    monkeypatch.setattr(hosts, "require_same", told.append)
    values = dict(
        coordinator="x:1", processes=2, process=0, distributed=False,
        which="start",
    )  # fmt: skip
    for content in ("one", "another"):
        (tmp_path / "types.py").write_text(content)
        monkeypatch.setattr(several, "_PACKAGE", tmp_path)
        left = several.join(
            "eval", COMMANDS["eval"], dict(values), settings_with()
        )
        assert left == {"which": "start"}
    monkeypatch.undo()
    mine, other = told[0], told[1] | {"config.eval.samples": 3000}
    assert mine["command"] == "eval" and mine["--which"] == "start"
    text = np.frombuffer(json.dumps(other).encode(), np.uint8)

    def gathered(x):
        if not x.ndim:
            return np.array([x, text.size])
        return np.stack([x, np.pad(text, (0, x.size - text.size))])

    monkeypatch.setattr(hosts.multihost_utils, "process_allgather", gathered)
    with pytest.raises(ValueError) as refused:
        hosts.require_same(mine)
    said = str(refused.value)
    assert "process 1 runs something else than the first (" in said
    assert "config.eval.samples: 1 in the first, 3000 in process 1" in said
    assert "files of topd_jax: '" in said
    assert said.count(" in process 1") == 2


def test_one_process_is_first_and_waits_for_nobody():
    assert hosts.is_first()
    assert hosts.from_first(lambda: 4) == 4
    hosts.require_same({"command": "train"})
    assert not hosts.told_to_stop()
    tree = {"a": jax.numpy.arange(3), "b": 4}
    tree = hosts.on_host(tree)
    assert isinstance(tree["a"], np.ndarray)
    assert tree["b"] == 4


@pytest.mark.parametrize(
    ("error", "waits"),
    [
        (jax.errors.JaxRuntimeError("UNKNOWN: Gloo all-reduce failed"), 50),
        (ValueError("UNKNOWN: Gloo all-reduce failed"), 50),
        (jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: no memory"), 2),
        (ValueError("ours"), 2),  # the others may have the same to say
    ],
)
def test_who_lost_another_stays_until_it_is_named(
    monkeypatch, capsys, error, waits
):
    done = []
    monkeypatch.setattr(os, "_exit", lambda code: done.append(("exit", code)))
    monkeypatch.setattr(time, "sleep", lambda s: done.append(("sleep", s)))
    monkeypatch.setattr(hosts, "_heartbeat_seconds", 30)
    hosts.leave(error, 1)
    assert done == [("sleep", waits), ("exit", 1)]
    assert ("was another lost?" in capsys.readouterr().err) == (waits > 2)

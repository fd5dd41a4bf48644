"""Several processes as one program: real ones, on this machine."""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from children import simulated
from small_run import small_config

from topd_jax.cli import main
from topd_jax.parallel import hosts
from topd_jax.training.checkpointing import Checkpoints
from topd_jax.training.config import settings_from
from topd_jax.training.logging import read_jsonl
from topd_jax.training.loop import initial_state
from topd_jax.training.phases import make_optimizer
from topd_jax.training.setup import load_pair

TESTS = Path(__file__).parent
CHILD = "import sys; from topd_jax.cli.main import run; run(sys.argv[1:])"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


def begin(world, workdir, count, *, devices, more=()):
    """Starts ``topd train`` as ``count`` processes of some devices each."""
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": simulated(devices),
    }
    line = [
        sys.executable, "-c", CHILD, "train",
        f"--config={TESTS / 'small_run.py'}",
        f"--config.world.cache={world}",
        f"--workdir={workdir}",
        "--config.mesh.fsdp=2",
        *more,
    ]  # fmt: skip
    address = f"localhost:{free_port()}"
    lines = [line]
    if count > 1:
        several = [f"--coordinator={address}", f"--processes={count}"]
        lines = [[*line, *several, f"--process={i}"] for i in range(count)]
    return [
        subprocess.Popen(
            x, env=environment, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )
        for x in lines
    ]  # fmt: skip


def finish(children):
    return [(*c.communicate(timeout=600), c.returncode) for c in children]


def parameters(workdir, world):
    """The trained student, read back on this process's one device."""
    config = small_config()
    config.world.cache = str(world)
    settings = settings_from(config)
    pair = load_pair(settings, workdir)
    state = initial_state(pair, make_optimizer(settings.optimizer, 6))
    found = Checkpoints(workdir / "checkpoints", 2)
    state, _ = found.restore(found.latest(), state)
    return jax.device_get(jax.tree.leaves(state.student))


def assert_resumes(workdir, found, world, count, **options):
    """Without its last checkpoint a run goes on from the one before."""
    cut = workdir.with_name("cut")
    shutil.copytree(workdir, cut)
    shutil.rmtree(cut / "checkpoints" / "6")
    for _, err, code in finish(begin(world, cut, count, **options)):
        assert code == 0, err
    for a, b in zip(found, parameters(cut, world), strict=True):
        np.testing.assert_array_equal(a, b)


def await_step(step, workdir, children):
    saved = workdir / "checkpoints" / str(step)
    while not saved.exists():
        assert children[0].poll() is None, children[0].communicate()[1]
        time.sleep(0.1)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return tmp_path_factory.mktemp("processes") / "world"


@pytest.fixture(scope="module")
def alone(world, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("alone")
    ((_, err, code),) = finish(begin(world, workdir, 1, devices=4))
    assert code == 0, err
    return workdir


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 4])
def test_several_processes_are_one_program(alone, world, tmp_path, count):
    done = finish(
        begin(
            world, tmp_path, count, devices=4 // count,
            more=["--config.train.preflight=True"],
        )
    )  # fmt: skip
    for _, err, code in done:
        assert code == 0, err
    # The first alone prints the evaluation.
    told = ["reverse_kl" in out for out, _, _ in done]
    assert told == [True] + [False] * (count - 1)
    ours, theirs = (read_jsonl(w / "metrics.jsonl") for w in (tmp_path, alone))
    assert [m["step"] for m in ours] == [1, 2, 3, 4, 5, 6]
    for a, b in zip(ours, theirs, strict=True):
        assert a["num_tokens"] == b["num_tokens"]
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)
    got = read_jsonl(tmp_path / "evals.jsonl")
    want = read_jsonl(alone / "evals.jsonl")
    for a, b in zip(got, want, strict=True):
        assert a["reverse_kl"] == pytest.approx(b["reverse_kl"], rel=1e-4)
    for a, b in zip(
        parameters(tmp_path, world), parameters(alone, world), strict=True
    ):
        np.testing.assert_allclose(a, b, atol=1e-5)


def run_as(count, script, *more):
    """What each of some processes printed that ran a script together."""
    address = f"localhost:{free_port()}"
    children = [
        subprocess.Popen(
            [sys.executable, TESTS / script, address, str(i), *map(str, more)],
            env=os.environ | {"JAX_PLATFORMS": "cpu"}, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )
        for i in range(count)
    ]  # fmt: skip
    done = finish(children)
    for _, err, code in done:
        assert code == 0, err
    return [out for out, _, _ in done]


def test_arrays_move_between_meshes_of_several_processes():
    for out in run_as(2, "moved_arrays.py"):
        assert "all arrived" in out


@pytest.mark.parametrize(
    ("count", "each", "theirs"),
    [(2, 2, 2), pytest.param(4, 1, 1, marks=pytest.mark.slow)],
)
def test_arrays_are_sent_to_processes_that_have_none(count, each, theirs):
    for out in run_as(count, "sent_arrays.py", count, each, theirs):
        assert "all arrived" in out


@pytest.mark.slow
def test_a_teacher_on_devices_of_every_process(alone, world, tmp_path):
    # The embedding is gathered for it from both hosts, at every step.
    whole = tmp_path / "whole"
    more = [
        "--config.teacher_mesh.devices=2", "--config.teacher_mesh.parts=2",
        "--config.mesh.fsdp=4",
    ]  # fmt: skip
    children = begin(world, whole, 2, devices=3, more=more)
    for _, err, code in finish(children):
        assert code == 0, err
    found = parameters(whole, world)
    for a, b in zip(found, parameters(alone, world), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
    assert_resumes(whole, found, world, 2, devices=3, more=more)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("count", "devices", "more"),
    [
        # One process each, the batch in two slices.
        (2, 2, ["--config.teacher_mesh.devices=2",
                "--config.teacher_mesh.parts=2"]),
        # Two each; both models read every token of the batch.
        (4, 1, ["--config.teacher_mesh.devices=2",
                "--config.teacher_mesh.fsdp=2",
                "--config.train.preflight=True"]),
    ],
)  # fmt: skip
def test_a_teacher_on_processes_of_its_own(
    alone, world, tmp_path, count, devices, more
):
    whole = tmp_path / "whole"
    children = begin(world, whole, count, devices=devices, more=more)
    for _, err, code in finish(children):
        assert code == 0, err
    found = parameters(whole, world)
    for a, b in zip(found, parameters(alone, world), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
    for name in ("metrics", "evals", "completions"):
        ours, theirs = (read_jsonl(w / f"{name}.jsonl") for w in (whole, alone))
        assert [r["step"] for r in ours] == [r["step"] for r in theirs]
    if count == 2:
        assert_resumes(whole, found, world, count, devices=devices, more=more)


@pytest.mark.slow
def test_a_killed_process_stops_the_others_and_the_job_resumes(
    alone, world, tmp_path
):
    children = begin(
        world, tmp_path, 2, devices=4,
        more=[
            "--config.train.heartbeat=10", "--config.teacher_mesh.devices=4",
        ],
    )  # fmt: skip
    await_step(2, tmp_path, children)
    children[1].send_signal(signal.SIGKILL)
    (_, err, code), _ = finish(children)
    assert code != 0
    # JAX calls a process a task.
    named = r"unhealthy \(stopped sending heartbeats\):\n1\n"
    assert re.search(named, err), err
    # It had the teacher, which goes on beside the student.
    for _, err, code in finish(begin(world, tmp_path, 2, devices=2)):
        assert code == 0, err
    assert [m["step"] for m in read_jsonl(tmp_path / "metrics.jsonl")] == [
        1, 2, 3, 4, 5, 6
    ]  # fmt: skip
    whole = read_jsonl(alone / "evals.jsonl")[-1]
    again = read_jsonl(tmp_path / "evals.jsonl")[-1]
    assert again["reverse_kl"] == pytest.approx(whole["reverse_kl"], rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    "more",
    [
        pytest.param([], id="beside"),
        # The one that is told has the teacher, and saves nothing itself.
        pytest.param(
            ["--config.mesh.fsdp=1", "--config.teacher_mesh.devices=1"],
            id="apart",
        ),
    ],
)
def test_sigterm_to_one_saves_and_stops_all(world, tmp_path, more):
    children = begin(
        world, tmp_path, 2, devices=1,
        more=["--config.train.steps=4000", "--config.checkpoint.every=4000",
              *more],
    )  # fmt: skip
    metrics = tmp_path / "metrics.jsonl"
    while not (metrics.exists() and metrics.stat().st_size):
        assert children[0].poll() is None, children[0].communicate()[1]
        time.sleep(0.1)
    children[1].send_signal(signal.SIGTERM)
    (_, err, code), (_, _, other) = finish(children)
    assert code == other == 128 + signal.SIGTERM, err
    steps = [m["step"] for m in read_jsonl(metrics)]
    assert steps == list(range(1, len(steps) + 1))
    assert f"saved after step {steps[-1]}; the same command" in err
    assert Checkpoints(tmp_path / "checkpoints", 2).latest() == steps[-1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "--processes=2"], "--coordinator, --process missing"),
        (["train", "--coordinator=localhost:1", "--processes=2",
          "--process=2"], "--process=2 must be in 0..1"),
        (["eval", "--distributed"], "topd eval runs as one process"),
        (["train", "--workdir=gs://bucket/run"], "must be a directory; mount"),
    ],
)  # fmt: skip
def test_flags_that_do_not_go_together(arguments, message, tmp_path, capsys):
    given = [f"--workdir={tmp_path}", *arguments[1:]]
    with pytest.raises(SystemExit) as exit_:
        main.run([arguments[0], "--config=tiny", *given])
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_one_process_is_first_and_waits_for_nobody(tmp_path):
    assert hosts.is_first()
    hosts.meet("here")
    assert not hosts.told_to_stop(1)
    hosts.wait_for([tmp_path])
    tree = {"a": jax.numpy.arange(3), "b": 4}
    found = hosts.on_host(tree)
    assert isinstance(found["a"], np.ndarray)
    assert found["b"] == 4


@pytest.mark.parametrize(
    ("error", "waits"),
    [
        (jax.errors.JaxRuntimeError("UNKNOWN: Gloo all-reduce failed"), True),
        (jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: no memory"), False),
        (ValueError("ours"), False),
    ],
)
def test_who_lost_another_stays_until_it_is_named(
    monkeypatch, capsys, error, waits
):
    done = []
    monkeypatch.setattr(os, "_exit", lambda code: done.append(("exit", code)))
    monkeypatch.setattr(time, "sleep", lambda s: done.append(("sleep", s)))
    monkeypatch.setattr(hosts, "_heartbeat_seconds", 30)
    hosts.leave(error)
    assert done == [("sleep", 50)] * waits + [("exit", 2)]
    assert ("was another lost?" in capsys.readouterr().err) == waits

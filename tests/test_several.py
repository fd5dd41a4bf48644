"""Every command as several processes: what one process of that mesh does."""

import os
import re
import signal
import time
from pathlib import Path

import pytest
from children import HERE, finish, start_several

from topd_jax.parallel import lock

SMALL = HERE / "small_run.py"


def topd(name, workdir, world, *more):
    return [
        "-m", "topd_jax.cli", name, f"--config={SMALL}",
        f"--config.world.cache={world}", f"--workdir={workdir}", *more,
    ]  # fmt: skip


def contents(root: Path) -> dict[str, bytes]:
    """The files that commands wrote, without times and places."""
    files = [
        *root.glob("solutions/solutions/*"), *root.glob("exported/*"),
        *root.glob("run/*-*/*.json"), *root.glob("run/eval-*"),
        *root.glob("run/inspect-*"),
    ]  # fmt: skip
    return {
        str(p.relative_to(root)): p.read_bytes().replace(
            str(root).encode(), b"ROOT"
        )
        for p in files
    }


def returned(text: str, root: Path) -> list[str]:
    """What the commands returned, without times and places."""
    text = re.sub(r'"(seconds|rate)\w*": [\d.e-]+', "0:0", text)
    text = text.replace(str(root), "ROOT")
    return [line for line in text.splitlines() if line.startswith('{"')]


@pytest.mark.slow
def test_every_command_as_two_processes(world_cache, tmp_path):
    texts, files = [], []
    for count in (1, 2):
        root = tmp_path / str(count)
        done = finish(
            start_several(
                [
                    HERE / "small_commands.py", root, f"--config={SMALL}",
                    f"--config.world.cache={world_cache}",
                    "--config.mesh.fsdp=2", "--config.train.steps=2",
                    "--config.eval.every=0", "--config.offline.shard_size=8",
                    "--config.sweep.seeds=(0,)",
                ],
                count, devices=2 // count,
            )
        )  # fmt: skip
        for out, err, code in done:
            assert code == 0, err
            texts.append(returned(out, root))
        files.append(contents(root))
    assert len(texts[0]) == 10
    # Each process has files of its own in a checkpoint.
    for *_, refused in texts:
        assert "is damaged: state/" in refused
    assert texts[1] == texts[2]
    assert texts[1][:-1] == texts[0][:-1]
    assert files[1].keys() == files[0].keys()
    assert len(files[0]) > 10
    for name, data in files[0].items():
        assert files[1][name] == data, name


@pytest.mark.slow
def test_two_processes_write_solutions_and_resume(world_cache, tmp_path):
    more = ["--config.offline.shard_size=8", "--config.train.heartbeat=10"]
    sets = []
    for count in (1, 2):
        line = topd("generate", tmp_path / str(count), world_cache, *more)
        children = start_several(line, count, devices=2 // count)
        folder = tmp_path / str(count) / "solutions"
        if count > 1:
            while not list(folder.glob("*.jsonl")):
                assert children[0].poll() is None, children[0].communicate()[1]
                time.sleep(0.01)
            children[1].send_signal(signal.SIGTERM)
            done = finish(children)
            assert done[1][2] == 128 + signal.SIGTERM, done[1][1]
            assert "rerun the command to resume" in done[1][1]
            assert all(code for *_, code in done)
            # The first names the process that went.
            assert re.search(r"heartbeats\):\n1\n", done[0][1]), done[0][1]
            children = start_several(line, count)
        for _, err, code in finish(children):
            assert code == 0, err
        sets.append({p.name: p.read_bytes() for p in folder.iterdir()})
    assert sets[0] == sets[1] and len(sets[0]) == 9


@pytest.mark.slow
def test_all_say_who_has_the_directory_and_end(world_cache, tmp_path):
    with lock.held(tmp_path / "run"):
        line = topd("generate", tmp_path / "run", world_cache)
        for _, err, code in finish(start_several(line, 2)):
            assert code == 2, err
            (told,) = [x for x in err.splitlines() if x.startswith("topd: ")]
            assert f"run is in use by process {os.getpid()} on " in told
            assert told.endswith("; stop that process first, or use another "
                                 "--workdir")  # fmt: skip

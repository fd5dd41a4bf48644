"""The command line as a user types it: what works, and what is refused."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from children import simulated

from topd_jax.cli import main
from topd_jax.training.config import settings_from

TESTS = Path(__file__).parent


# What is typed wrong, before anything runs.


@pytest.mark.parametrize("arguments", [[], ["--help"], ["train", "-h"]])
def test_help_is_shown(topd, arguments):
    text = topd(*arguments)
    for name in ("train", "eval", "sample", "export", "sweep", "--workdir"):
        assert name in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["trian"], "no command 'trian'; one of train, eval, compare, inspect"),
        (["train"], "--config is missing; try --config tiny"),
        (["train", "--config"], "--config is missing"),
        (["train", "--config="], "--config is missing"),
        (["train", "--config", "tiny"], "--workdir is missing; try"),
        (["train", "--config", "tinny", "--workdir", "x"],
         "--config tinny does not exist; give a path, or one of default, "),
        (["train", "--config", "runs/tiny.py", "--workdir", "x"],
         "--config runs/tiny.py does not exist"),
        (["train", "--config", "tiny", "--workdir", "x", "stray"],
         "unexpected arguments: stray"),
        (["train", "--config", "tiny", "--workdir", "x", "--steps=3"],
         "Unknown command line flag 'steps'; topd --help lists the flags"),
        (["eval", "--config", "tiny", "--workdir", "x", "--which=newest"],
         "--which=newest: value should be one of <latest|best|start>"),
        (["sample", "--config", "tiny", "--workdir", "x",
          "--temperature=hot"], "--temperature=hot: could not convert"),
        (["export", "--config", "tiny", "--workdir", "x"],
         "--output is missing: a directory to export to"),
    ],
)  # fmt: skip
def test_a_line_that_says_too_little_or_too_much(refused, arguments, message):
    assert message in refused(*arguments)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("--config.optimizer.learning_rte=1",
         "unknown config key config.optimizer.learning_rte; the nearest is "
         "config.optimizer.learning_rate (all: accumulate, beta1,"),
        ("-config.optimizer.learning_rte=1",
         "the nearest is config.optimizer.learning_rate"),
        ("--noconfig.log.tensorbord",
         "the nearest is config.log.tensorboard"),
        ("--config.optimiser.clip=1", "the nearest is config.optimizer "),
        ("--config.train.steps.n=1", "config.train.steps has no keys; it is 6"),
        ("--config.train.steps=many", "--config.train.steps=many: invalid"),
        ("--config.train.steps=2.5", "--config.train.steps=2.5: invalid"),
        ("--config.train=3", "--config.train=3: "),
        ("--config.log.tensorboard=maybe", "--config.log.tensorboard=maybe"),
        ("--config.optimizer.clip=low", "--config.optimizer.clip=low: could"),
        ("--config.optimizer.clip=nan", "config.optimizer.clip=nan must be"),
        ("--config.sweep.seeds=0,b", "seeds='b' must be of type int, not str"),
        ("--config.train.steps=0", "train.steps=0 must be at least 1"),
        ("--config.objective.variant=tpod",
         "objective.variant='tpod' must be one of opd, "),
        ("--config.objective.window=17",
         "window=17 must not exceed rollout.max_new_tokens=16"),
    ],
)  # fmt: skip
def test_an_override_that_means_nothing(refused, command, override, message):
    assert message in refused(*command("train", override))


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("c.optimizer.learning_rte = 1.0",
         "unknown config key config.optimizer.learning_rte; the nearest is "
         "config.optimizer.learning_rate"),
        ("c.train.stops += 1", "AttributeError: 'stops' Did you mean \"step"),
        ("c.train.steps = 'many'", "TypeError: Could not override field"),
        ("del c.train", "config.train is missing"),
        ("c.steps", "AttributeError"),
        ("import nothing_of_this_name", "ModuleNotFoundError: No module named"),
        ("return 3", "must define get_config() that returns a ConfigDict"),
        ("c c", "SyntaxError: invalid syntax (mine.py, line 5)"),
    ],
)  # fmt: skip
def test_a_config_file_that_is_wrong(refused, tmp_path, body, message):
    path = tmp_path / "mine.py"
    path.write_text(
        "from topd_jax.configs import tiny\n\n"
        f"def get_config():\n    c = tiny.get_config()\n    {body}\n"
        "    return c\n"
    )
    line = refused("train", "--config", path, "--workdir", tmp_path / "run")
    assert message in line
    assert not (tmp_path / "run").exists()


def test_a_file_without_get_config(refused, tmp_path):
    (tmp_path / "mine.py").write_text("x = 1\n")
    line = refused("train", "--config", tmp_path / "mine.py", "--workdir", "x")
    assert "must define get_config()" in line


def test_shipped_configs_are_found_by_name_and_by_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("tiny", "configs/tiny.py", "tiny.py"):
        assert Path(main.config_path(name)).name == "tiny.py"
    (tmp_path / "tiny").write_text("")
    assert main.config_path("tiny") == "tiny"  # a file goes before


def test_overrides_reach_the_settings(small_arguments):
    def settings(*more):
        parsed = main._parse([*more, *small_arguments, "--workdir", "x"])
        return settings_from(parsed.config)

    found = settings(  # before --config, too
        "--config.train.steps", "9",
        "--config.objective.fraction=0.5",
        "--noconfig.log.tensorboard",
        "--config.student.keep_layers=0,2,5",
        "--config.sweep.variants=opd,topd:teacher",
        "--config.sweep.seeds=3",
        "--config.data.path=a=b, c",
    )  # fmt: skip
    assert found.train.steps == 9
    assert found.objective.fraction == 0.5
    assert found.log.tensorboard is False
    assert found.student.keep_layers == (0, 2, 5)
    assert found.sweep.variants == ("opd", "topd:teacher")
    assert found.sweep.seeds == (3,)
    assert found.data.path == "a=b, c"
    found = settings("--config.sweep.variants=")  # start and teacher only
    assert found.sweep.variants == ()
    found = settings("--config.sweep.seeds=(1,2)", "--config.seed=7")
    assert found.sweep.seeds == (1, 2)
    assert found.seed == 7


def test_a_mistake_of_ours_keeps_its_traceback(command, monkeypatch):
    def broken(*_):
        raise KeyError("ours")

    monkeypatch.setattr("topd_jax.cli.commands.train", broken)
    with pytest.raises(KeyError, match="ours"):
        main.run(command("train"))


def in_a_child(*arguments, devices=1):
    env = dict(os.environ, XLA_FLAGS=simulated(devices))
    return subprocess.run(
        [sys.executable, "-m", "topd_jax.cli.main", *map(str, arguments)],
        env=env, capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip


def test_a_batch_that_the_mesh_does_not_divide(command, tmp_path):
    done = in_a_child(
        *command(
            "train", "--config.mesh.fsdp=8", "--config.data.batch_size=12"
        ),
        devices=8,
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == (
        "topd: data.batch_size=12 must be divisible by the mesh's data x fsdp "
        "x expert (8); try 16\n"
    )
    assert not (tmp_path / "run").exists()


# What does not fit together; the whole list is in test_pair.py.


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["--config.mesh.fsdp=3"], "needs 3 devices and there are 1; set"),
        (["--config.data.source=jsonl", "--config.data.path=no/such.jsonl"],
         "no file at no/such.jsonl; give data.path the path of a JSONL file"),
        (["--config.data.max_prompt_length=5"],
         "tokens; the limit is 5: raise data.max_prompt_length, or set"),
        (["--config.student.source=no/such.gguf"], "no/such.gguf"),
        (["--config.student.keep_layers=4"], "0..0; for instance"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_one_line(
    trained, refused, command, overrides, message
):
    assert message in refused(*command("train", *overrides))


def test_a_bad_line_of_a_file_is_named(refused, command, tmp_path):
    path = tmp_path / "questions.jsonl"
    path.write_text('{"question": "a", "answer": "#### 1"}\n{"question": \n')
    line = refused(
        *command("train", "--config.data.source=jsonl"),
        f"--config.data.path={path}",
    )
    assert f"{path} line 2 is not JSON" in line
    assert "repair or remove the line" in line
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["eval", "sample", "export"])
@pytest.mark.parametrize(
    ("which", "folder"), [("latest", "checkpoints"), ("best", "best")]
)
def test_without_a_checkpoint_nothing_is_made(
    refused, small_arguments, tmp_path, name, which, folder
):
    run = tmp_path / "run"
    (run / folder / "4.orbax-checkpoint-tmp").mkdir(parents=True)
    line = refused(
        name, *small_arguments, f"--workdir={run}", f"--which={which}",
        f"--output={tmp_path / 'out'}",
    )  # fmt: skip
    assert f"no checkpoint in {run / folder}; train first, or say" in line
    assert not (tmp_path / "out").exists()
    assert not (run / "world").exists()


@pytest.mark.parametrize("name", ["train", "eval", "sample"])
def test_a_checkpoint_of_another_config(
    refused, trained, small_arguments, name
):
    line = refused(
        name, *small_arguments, f"--workdir={trained}",
        "--config.optimizer.learning_rate=0.5",
        "--config.objective.window=3",
    )  # fmt: skip
    assert "optimizer.learning_rate: 0.001 there, 0.5 here" in line
    assert "objective.window: 4 there, 3 here" in line
    assert "use another --workdir" in line


def test_a_work_directory_that_is_a_file(refused, small_arguments, tmp_path):
    (tmp_path / "file").write_text("mine")
    line = refused("train", *small_arguments, f"--workdir={tmp_path / 'file'}")
    assert str(tmp_path / "file") in line
    assert (tmp_path / "file").read_text() == "mine"

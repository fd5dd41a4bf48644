"""The command line as a user types it: what works, and what is refused."""

import errno
import inspect
import os
import shlex
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from topd_jax.cli import commands, main
from topd_jax.cli.config_file import config_path, load_settings
from topd_jax.parallel import buckets, hosts

# Help.


def test_help_imports_nothing_heavy():
    """A child: this process has imported JAX."""
    code = (
        "import sys; from topd_jax.cli.main import run\n"
        "for line in sys.argv[1:]:\n"
        "    try: run(line.split())\n"
        "    except SystemExit as left: print('exit', left.code)\n"
        "print('heavy', {'jax', 'absl', 'numpy'} & set(sys.modules))"
    )
    lines = ["--help", "train --help", "sample -h", "train --steps=3"]
    said = subprocess.run(
        [sys.executable, "-c", code, *lines],
        capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    assert "heavy set()" in said.stdout
    assert said.stdout.count("exit 0") == 2 and "exit 2" in said.stdout
    assert said.stderr.startswith("topd: the following arguments are required")
    usage = said.stdout.partition("usage: topd train")[0]
    assert all(f"\n  {name} " in usage for name in commands.COMMANDS)


@pytest.mark.parametrize("name", commands.COMMANDS)
def test_help_of_a_command_has_its_own_flags_and_an_example(name, capsys):
    command = commands.COMMANDS[name]
    with pytest.raises(SystemExit) as exit_:
        main.run([name, "--help"])
    text = capsys.readouterr().out
    assert exit_.value.code == 0
    for other in commands.COMMANDS.values():
        for flag, _ in other.flags:
            mine = flag in [f for f, _ in command.flags]
            assert (f"\n  {flag} " in text or f"\n  {flag}\n" in text) == mine
    (example,) = [
        line for line in text.splitlines() if line.startswith(f"  topd {name} ")
    ]
    words = shlex.split(example)[2:]
    values, _ = commands.parse(name, words)
    joining = {flag.strip("-") for flag, _ in commands.SEVERAL}
    wanted = {"settings" if n == "config" else n for n in {*values} - joining}
    parameters = inspect.signature(command.load()).parameters
    # What has a default may be for Python alone.
    required = {n for n, p in parameters.items() if p.default is p.empty}
    assert required <= wanted <= parameters.keys()


# What is typed wrong, before anything runs.


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("trian", "no command 'trian'; one of doctor, train, generate, solve"),
        ("train", "arguments are required: --config, --workdir; topd train -"),
        ("train --config tinny --workdir x",
         "--config tinny does not exist; give a path, or one of default, "),
        ("train --config runs/tiny.py --workdir x",
         "--config runs/tiny.py does not exist"),
        ("train --config tiny --workdir x --count=3",
         "unrecognized arguments: --count=3; topd train --help has an"),
        ("settings zzz", "no setting has 'zzz' in its name; topd settings"),
        ("report --workdir x --config.seed=3",
         "unrecognized arguments: --config.seed=3; topd report --help has an"),
        ("train --config tiny --workdir ftps://bucket/run",
         "cannot open ftps://bucket/run: a bucket begins with one of gs://"),
        ("probe --config tiny --workdir x --count=0",
         "--count: '0' must be a whole number, at least 1"),
    ],
)  # fmt: skip
def test_a_line_that_says_too_little_or_too_much(refused, line, message):
    assert message in refused(*line.split())


@pytest.mark.parametrize("text", ["help", "-3+4?", "--help me"])
def test_a_prompt_may_be_any_text(text):
    line = ["--config=tiny", "--workdir=x", f"--prompt={text}"]
    assert commands.parse("sample", line)[0]["prompt"] == [text]
    if not text.startswith("-"):
        line[2:] = ["--prompt", text]
        assert commands.parse("sample", line)[0]["prompt"] == [text]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("--config.optimizer.learning_rte=1",
         "unknown config key config.optimizer.learning_rte; the nearest is "
         "config.optimizer.learning_rate; topd settings optimizer. prints all"),
        ("--noconfig.log.tensorboard", "recognized arguments: --noconfig.log"),
        ("-config.optimiser.clip=1", "is config.optimizer; topd settings pri"),
        ("--config.train.steps.n=1", "config.train.steps has no keys; it is 6"),
        ("--config.train.steps=many",
         "steps=many must be of type int; topd settings train.steps explains"),
        ("--config.train.steps", "--config.train.steps needs a value: "),
        ("--config.log.tensorboard", "needs a value: --config.log.tensorboard"),
        ("--config.train=3",
         "config.train is a section; set one of its keys: config.train."),
        ("--config.data.thinking=maybe", "=maybe must be of type bool"),
        ("--config.optimizer.clip=low", "clip=low must be of type float"),
        ("--config.sweep.seeds=0,b",
         "seeds='b' must be of type int, not str; topd settings sweep.seeds "),
        ("stray", "unrecognized arguments: stray"),
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
        ("return 3", "must define get_config() that returns a ConfigDict"),
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


def test_shipped_configs_are_found_by_name_and_by_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("tiny", "configs/tiny.py", "tiny.py"):
        assert Path(config_path(name)).name == "tiny.py"
    (tmp_path / "tiny").write_text("")
    assert config_path("tiny") == "tiny"  # a file goes before
    monkeypatch.setenv("HOME", str(tmp_path))
    assert config_path("~/tiny") == str(tmp_path / "tiny")


def test_overrides_reach_the_settings():
    def settings(*more):
        line = [*more, "--config=tiny", "--workdir=x"]
        values, overrides = commands.parse("train", line)
        return load_settings(values["config"], overrides)

    changed = settings(
        "--config.train.steps=9",
        "--config.optimizer.clip=2",
        "--config.log.tensorboard=false",
        "--config.student.keep_layers=0,2,5",
        "--config.sweep.variants=opd,topd(window=2, candidates=3);seed=1",
        "--config.sweep.seeds=3",
        "--config.mesh.data=-1",
        "--config.data.path=a=b, c",
    )  # fmt: skip
    assert changed.train.steps == 9
    assert changed.optimizer.clip == 2.0
    assert changed.log.tensorboard is False
    assert changed.student.keep_layers == (0, 2, 5)
    assert changed.sweep.variants == (
        "opd", "topd(window=2, candidates=3);seed=1"
    )  # fmt: skip
    assert changed.sweep.seeds == (3,)
    assert changed.mesh.data == -1
    assert changed.data.path == "a=b, c"
    changed = settings(
        "--config.data.thinking=False", "--config.data.thinking=None"
    )
    assert changed.data.thinking is None
    with pytest.raises(ValueError, match="tensorboard=None must be of type bo"):
        settings("--config.log.tensorboard=None")
    changed = settings("--config.sweep.seeds=(1,2)")
    assert changed.sweep.seeds == (1, 2)
    tasks = ("reasoning_gym:a(size=9, signs=('+', '-'), n=(1,2))", "b.jsonl")
    for comma in (",", ", "):
        changed = settings(f"--config.eval.benchmarks={comma.join(tasks)}")
        assert changed.eval.benchmarks == tasks
    # start and teacher only
    assert settings("--config.sweep.variants=").sweep.variants == ()


# Errors: a refusal is one line, a mistake of the program a traceback.


@pytest.mark.parametrize(
    ("function", "kind"),
    [
        (lambda **_: jax.vmap(jnp.add)(jnp.ones(3), jnp.ones(4)), ValueError),
        # JAX hides its own frames: the last one left is this package's call.
        (jax.vmap(lambda a, b: a), ValueError),
        (lambda **_: int("three"), ValueError),
        (lambda **_: {}["three"], KeyError),
        (lambda **_: os.kill(2**22, 0), OSError),
    ],
)
def test_a_mistake_of_the_program_keeps_its_traceback(
    monkeypatch, function, kind
):
    values = {"a": jnp.ones(3), "b": jnp.ones(4)}
    monkeypatch.setattr(main, "parse", lambda *_: (values, []))
    monkeypatch.setattr(commands.Command, "load", lambda _: function)
    with pytest.raises(kind):
        main.run(["report", "--workdir=x"])


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (KeyError("a mistake"), 1),
        (OSError("gs://b: 503 UNAVAILABLE"), 1),
        (OSError("gs://b: 403 Forbidden"), 2),
        (OSError(errno.ENOENT, "is not there", "file"), 2),
    ],
)
def test_the_code_of_one_of_several_says_whether_a_restart_may_help(
    monkeypatch, error, code
):
    """tpu.sh keep gives up after 2, and joins even one process to itself."""

    def failing(**_):
        raise error

    left = []
    monkeypatch.setattr(commands.Command, "load", lambda _: failing)
    monkeypatch.setattr(buckets, "_used", {"gs://b"})
    monkeypatch.setattr(main, "_process", lambda: 0)
    monkeypatch.setattr(hosts, "leave", lambda _, code: left.append(code))
    with pytest.raises(SystemExit) as exit_:
        main.run(["report", "--workdir=x"])
    assert [exit_.value.code] == left == [code]


@pytest.mark.parametrize(
    ("number", "way_out"),
    [
        (errno.ENOSPC, "make room"),
        (errno.EFBIG, "raise the limit on the size of a file (ulimit -f)"),
        (errno.EIO, "check the disk"),
    ],
)
def test_storage_that_fails_is_one_line(refused, monkeypatch, number, way_out):
    def failing(**_):
        raise RuntimeError("a library's") from OSError(
            number, os.strerror(number), "/disk/file"
        )

    monkeypatch.setattr(commands.Command, "load", lambda _: failing)
    assert refused("report", "--workdir=x") == (
        f"topd: a library's; {way_out} and rerun the command"
    )


def test_a_refusal_is_one_line_or_a_traceback_on_request(
    refused, monkeypatch, tmp_path
):
    line = refused("report", "--workdir", tmp_path / "none")
    assert line.startswith(f"topd: no run at {tmp_path / 'none'}")
    monkeypatch.setenv("TOPD_TRACEBACK", "1")
    with pytest.raises(ValueError, match="no run at"):
        main.run(["report", f"--workdir={tmp_path / 'none'}"])


@pytest.mark.parametrize(
    ("name", "which", "folder"),
    [("eval", "latest", "checkpoints"), ("sample", "best", "best"),
     ("correct", "best", "best"), ("export", "latest", "checkpoints")],
)  # fmt: skip
def test_without_a_checkpoint_nothing_is_made(
    refused, small_arguments, tmp_path, name, which, folder
):
    run = tmp_path / "run"
    (run / folder / "4.orbax-checkpoint-tmp").mkdir(parents=True)
    output = [f"--output={tmp_path / 'out'}"] if name == "export" else []
    line = refused(
        name, *small_arguments, f"--workdir={run}", f"--which={which}", *output
    )
    assert f"no checkpoint in {run / folder}; train first, or say" in line
    assert not (tmp_path / "out").exists()
    assert not (run / "world").exists()


def test_settings_are_explained(topd):
    (line,) = topd("settings", "train.chunk_size").splitlines()
    assert line.startswith("config.train.chunk_size = None (least 1): tokens ")
    everything = topd("settings")
    assert "\nconfig.optimizer: AdamW" in everything and line in everything


def test_a_work_directory_that_is_a_file(refused, small_arguments, tmp_path):
    (tmp_path / "file").write_text("mine")
    line = refused("train", *small_arguments, f"--workdir={tmp_path / 'file'}")
    assert str(tmp_path / "file") in line
    assert (tmp_path / "file").read_text() == "mine"

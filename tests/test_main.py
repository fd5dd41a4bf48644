"""The command line as a user types it: what works, and what is refused."""

import errno
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from small_files import LLAMA, assert_same, make, write_gguf
from small_run import small_config

from topd_jax import logs, main
from topd_jax import train as training
from topd_jax.commands import load_student
from topd_jax.logs import read_jsonl
from topd_jax.models import load
from topd_jax.pair import load_pair
from topd_jax.settings import settings_from

TESTS = Path(__file__).parent


@pytest.fixture
def topd(capsys):
    """Runs the command line; returns what it printed on stdout."""

    def run(*arguments: object) -> str:
        capsys.readouterr()
        main.run([str(a) for a in arguments])
        return capsys.readouterr().out

    return run


@pytest.fixture
def refused(capsys):
    """Runs what must be refused; returns the one line on stderr."""

    def run(*arguments: object, bars: bool = False) -> str:
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit_:
            main.run([str(a) for a in arguments])
        assert exit_.value.code == 2
        out, err = capsys.readouterr()
        assert "Traceback" not in err
        assert out == ""
        lines = err.splitlines()
        if not bars:  # those of a run that had begun come before
            assert len(lines) == 1, err
        assert lines[-1].startswith("topd: ")
        return lines[-1]

    return run


@pytest.fixture
def command(small_arguments, tmp_path):
    """(name, *more) -> a whole command line in an empty work directory."""

    def make_line(name: str, *more: str) -> list[str]:
        return [name, *small_arguments, f"--workdir={tmp_path / 'run'}", *more]

    return make_line


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

    monkeypatch.setattr("topd_jax.commands.train", broken)
    with pytest.raises(KeyError, match="ours"):
        main.run(command("train"))


def in_a_child(*arguments, devices=1):
    env = dict(
        os.environ,
        XLA_FLAGS=f"--xla_force_host_platform_device_count={devices}",
    )
    return subprocess.run(
        [sys.executable, "-m", "topd_jax.main", *map(str, arguments)],
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


# The happy path.


def without_times(path):
    return [
        {k: v for k, v in r.items() if not k.startswith(("seconds", "rate"))}
        for r in read_jsonl(path)
    ]


def test_the_same_command_again_does_nothing(
    topd, trained, small_arguments, monkeypatch
):
    def forbidden(self):
        raise AssertionError("a finished run was trained again")

    monkeypatch.setattr(training.Run, "_one_step", forbidden)
    before = {p.name: p.read_text() for p in trained.iterdir() if p.is_file()}
    row = json.loads(topd("train", *small_arguments, f"--workdir={trained}"))
    assert row == read_jsonl(trained / "evals.jsonl")[-1]
    assert row["final"] is True and row["step"] == 6
    for name, text in before.items():
        assert (trained / name).read_text() == text


def test_eval_of_the_latest_is_the_runs_own(topd, trained, small_arguments):
    row = json.loads(topd("eval", *small_arguments, f"--workdir={trained}"))
    final = read_jsonl(trained / "evals.jsonl")[-1]
    summary = row["benchmarks"]["test"]
    assert summary["runs"] == [final["exact_match"]]
    for name in ("reverse_kl", "length_mean", "teacher_nll", "problems"):
        assert summary[name] == final[name], name
    written = json.loads((trained / "eval-latest.json").read_text())
    assert written["step"] == row["step"] == final["step"]
    assert written["benchmarks"]["test"]["summary"] == summary
    start = json.loads(topd(
        "eval", *small_arguments, f"--workdir={trained}", "--which=start"
    ))  # fmt: skip
    assert start["step"] == 0
    assert start["benchmarks"]["test"]["reverse_kl"] != summary["reverse_kl"]
    best = json.loads(topd(
        "eval", *small_arguments, f"--workdir={trained}", "--which=best"
    ))  # fmt: skip
    assert best["step"] in (0, 4)


def test_eval_may_read_otherwise_than_it_was_trained(
    topd, trained, small_arguments
):
    row = json.loads(topd(
        "eval", *small_arguments, f"--workdir={trained}",
        "--config.eval.temperature=0", "--config.eval.final_problems=5",
        "--config.rollout.max_new_tokens=8",
    ))  # fmt: skip
    summary = row["benchmarks"]["test"]
    assert row["temperature"] == 0 and summary["problems"] == 5
    assert summary["length_mean"] <= 8


def test_sample_completes_prompts(topd, trained, small_arguments, refused):
    line = ["sample", *small_arguments, f"--workdir={trained}"]
    found = json.loads(topd(*line))
    assert len(found) == 3
    assert all(set(f) == {"prompt", "completion"} for f in found)
    greedy = [*line, "--temperature=0", "--prompt=3+4*5?", "--prompt=2+2?"]
    found = json.loads(topd(*greedy))
    assert [f["prompt"] for f in found] == ["3+4*5?", "2+2?"]
    assert found == json.loads(topd(*greedy, "--config.rollout.top_k=1"))
    assert found[0]["completion"]
    message = refused(*line, "--prompt=" + "+".join(["12"] * 9))
    assert "(--prompt) has " in message and "the limit is 16" in message
    message = refused(*line, "--temperature=-1")
    assert "temperature=-1.0 must be 0 (greedy) or a positive" in message


@pytest.fixture(scope="module")
def exported(trained, small_arguments, tmp_path_factory):
    output = tmp_path_factory.mktemp("exported") / "model"
    main.run([
        "export", *small_arguments, f"--workdir={trained}",
        f"--output={output}",
    ])  # fmt: skip
    return output


def test_an_export_is_the_student(
    exported, trained, world_cache, topd, small_arguments, tmp_path
):
    config = small_config()
    config.world.cache = str(world_cache)
    settings = settings_from(config)
    pair = load_pair(settings, tmp_path)
    student, step = load_student(settings, trained, pair, "latest")
    assert step == 6
    model, tokenizer = load(exported)
    for ours, theirs in zip(
        jax.tree.leaves(student), jax.tree.leaves(model), strict=True
    ):
        np.testing.assert_array_equal(ours, theirs)
    generation = json.loads((exported / "generation_config.json").read_text())
    assert generation["eos_token_id"] == pair.tokenizer.eos_ids[0]
    text = pair.test.records[0]["prompt"]
    assert tokenizer.encode(text, add_special_tokens=False) == (
        pair.tokenizer.encode(text)
    )
    # It serves as the start of another run, its template and ids included.
    row = json.loads(topd(
        "eval", *small_arguments, "--which=start", f"--workdir={tmp_path}",
        f"--config.student.source={exported}",
    ))  # fmt: skip
    final = read_jsonl(trained / "evals.jsonl")[-1]
    assert row["benchmarks"]["test"]["reverse_kl"] == final["reverse_kl"]
    assert row["benchmarks"]["test"]["runs"] == [final["exact_match"]]


def test_an_export_takes_no_place_that_is_taken(
    exported, trained, refused, small_arguments, tmp_path
):
    line = ["export", *small_arguments, f"--workdir={trained}"]
    before = sorted(p.name for p in exported.iterdir())
    message = refused(*line, f"--output={exported}")
    assert "is not empty; choose another directory, or empty it" in message
    assert sorted(p.name for p in exported.iterdir()) == before
    (tmp_path / "file").write_text("mine")
    assert "is not empty" in refused(*line, f"--output={tmp_path / 'file'}")
    assert (tmp_path / "file").read_text() == "mine"


@pytest.fixture(scope="module")
def questions(tmp_path_factory):
    """A run on questions as GSM8K is published, a GGUF pair, OPD."""
    folder = tmp_path_factory.mktemp("questions")
    gguf = write_gguf(folder / "model.gguf", make(LLAMA))
    rows = [
        {
            "question": f"tom has {i} and gets 4",
            "answer": f"{i}+4\n#### {i + 4}",
        }
        for i in range(12)
    ]
    path = folder / "train.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return [
        f"--config={TESTS / 'small_run.py'}",
        f"--config.student.source={gguf}",
        f"--config.teacher.source={gguf}",
        "--config.student.keep_layers=0,2",
        "--config.data.source=jsonl",
        f"--config.data.path={path}",
        "--config.data.held_out=3",
        "--config.data.batch_size=4",
        "--config.data.max_prompt_length=32",
        "--config.objective.variant=opd",
        "--config.train.steps=2",
        "--config.eval.batch_size=4",
        f"--workdir={folder / 'run'}",
    ]


def test_questions_are_trained_on_graded_and_exported(
    questions, topd, tmp_path
):
    row = json.loads(topd("train", *questions))
    assert row["problems"] == 3
    assert row["exact_match"] is not None and row["reverse_kl"] > 0
    (found,) = json.loads(topd("sample", *questions, "--prompt", "tom has 3"))
    assert found["prompt"] == "tom has 3"
    topd("export", *questions, f"--output={tmp_path / 'out'}")
    model, tokenizer = load(tmp_path / "out")
    assert model.config.layers == 2
    assert tokenizer.chat_template is not None
    assert tokenizer.eos_token_id == 0
    # The work directory itself serves as a source, without what it came from.
    student, own = load(questions[-1].removeprefix("--workdir="))
    assert_same(student, model)
    assert own("tom has 3").input_ids == tokenizer("tom has 3").input_ids
    assert own.chat_template == tokenizer.chat_template
    again = [a for a in questions if "student" not in a and "workdir" not in a]
    start = json.loads(topd(
        "eval", *again, "--which=start", f"--workdir={tmp_path}",
        f"--config.student.source={tmp_path / 'out'}",
    ))  # fmt: skip
    assert start["benchmarks"]["test"]["reverse_kl"] == row["reverse_kl"]
    assert start["benchmarks"]["test"]["length_mean"] == row["length_mean"]


# A full disk.


def full(*_, **__):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/disk/file")


def full_as_orbax_says_it(*_, **__):
    raise ValueError(
        'RESOURCE_EXHAUSTED: Error writing local file "/disk/4/state": Failed '
        "to write 11967\nbytes: No space left on device [os_error_code='28']"
    )


@pytest.mark.parametrize(
    ("where", "method", "at", "what"),
    [
        (logs.Logs, "write", 7, full),  # in the middle of training
        (ocp.CheckpointManager, "save", 3, full_as_orbax_says_it),
    ],
)
def test_a_full_disk_stops_the_run_and_loses_nothing(
    refused, topd, command, tmp_path, trained, monkeypatch, where, method,
    at, what,
):  # fmt: skip
    plain, calls = getattr(where, method), []

    def filling(*args, **kwargs):
        if "problems" not in args:  # many lines at once, by evaluations
            calls.append(None)
        return (what if len(calls) >= at else plain)(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(where, method, filling)
        line = refused(*command("train"), bars=True)
    assert "No space left on device" in line
    assert line.endswith(
        "make room and start the same command again: it goes on from the last "
        "checkpoint"
    )
    run = tmp_path / "run"
    assert any(p.name == "2" for p in (run / "checkpoints").iterdir())
    assert not any(p.name == "6" for p in (run / "checkpoints").iterdir())
    topd(*command("train"))
    for name in ("metrics", "evals", "completions"):
        assert without_times(run / f"{name}.jsonl") == without_times(
            trained / f"{name}.jsonl"
        )


def test_an_export_to_a_full_disk_leaves_nothing(
    refused, trained, small_arguments, tmp_path, monkeypatch
):
    monkeypatch.setattr("topd_jax.models.export.save_file", full)
    line = refused(
        "export", *small_arguments, f"--workdir={trained}",
        f"--output={tmp_path / 'out'}",
    )  # fmt: skip
    assert re.search("could not write .*out .*No space left", line)
    assert list(tmp_path.iterdir()) == []

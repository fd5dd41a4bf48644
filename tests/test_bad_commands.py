"""Commands that cannot be done: one line, exit code 2, and nothing written."""

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from small_files import LLAMA, make
from small_hub import hub_directory

from topd_jax.models import save_model


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A place with good and bad files, in which no test leaves a trace."""
    root = tmp_path_factory.mktemp("place")
    with contextlib.chdir(root):
        rows = [json.dumps({"question": f"{i}+1?"}) + "\n" for i in range(9)]
        Path("good.jsonl").write_text("".join(rows))
        Path("latin.jsonl").write_bytes('{"question": "Où?"}'.encode("latin-1"))
        Path("deep.jsonl").write_text('{"question": ' + "[" * 100_000)
        hub_directory(Path("chat"))
        for name in ("torn", "wordless"):
            hub_directory(Path(name))
        save_model(make(LLAMA), "mute")
        weights = "model.safetensors"
        Path("torn", weights).write_bytes(
            Path("torn", weights).read_bytes()[:999]
        )
        Path("wordless/chat_template.jinja").write_text("{{ nothing.at.all }}")
        Path("list").mkdir()
        Path("list/config.json").write_text("[]")
        Path("set").mkdir()
        Path("set/set.json").write_text('{"shards": 2}')
    return root


@pytest.fixture
def place(files, monkeypatch):
    """The place, where commands are started."""
    monkeypatch.chdir(files)
    return files


JSONL = "--config.data.source=jsonl --config.data.path="
MODELS = (
    f"{JSONL}good.jsonl --config.data.held_out=2 --config.student.source=chat "
    "--config.teacher.source="
)
COMMANDS = [
    (f"train {JSONL}latin.jsonl", "latin.jsonl line 1 is not UTF-8 ("),
    (f"generate {JSONL}deep.jsonl", "deep.jsonl line 1 is not JSON (maximum"),
    (f"sweep {JSONL}absent.jsonl", "no file at absent.jsonl; give data.path"),
    ("eval --which=start --config.eval.benchmarks=deep.jsonl",
     "eval.benchmarks: deep.jsonl line 1 is not JSON"),
    (f"train {MODELS}torn", "torn/model.safetensors cannot be read"),
    (f"train {MODELS}wordless --config.student.source=wordless",
     "chat template fails: UndefinedError"),
    (f"train {MODELS}mute --config.student.source=mute",
     "no tokenizer in student.source or teacher.source; put its files"),
    (f"sample --which=start --prompt=a {MODELS}torn", "cut short?"),
    (f"export --which=start --output=out {MODELS}list", "JSON object"),
    ("train --config.train.stage=offline --config.offline.path=set",
     "offline.path=set has 0 of 2 shards; rerun topd generate"),
    (f"train --config.train.steps={'9' * 9999}", "99 must be of type int"),
    (f"train --config.objective=topd({'(' * 999}", "cannot be read; write"),
    ("export --adapter=3", "ignored explicit argument"),
    ("sample --config.rollout.temperature=nan", "=nan must be a finite number"),
    ("probe --count=²", "--count: "),
]  # fmt: skip


@pytest.mark.parametrize(("line", "message"), COMMANDS)
def test_a_command_that_cannot_be_done_writes_nothing(
    place, refused, small_arguments, line, message
):
    def files():
        return {p: p.stat().st_size for p in place.rglob("*")}

    before = files()
    name, *more = line.split(" ")
    if name != "doctor":
        more.append("--workdir=run")
    said = refused(name, *small_arguments, *more)
    assert message in said
    assert files() == before


def test_a_process_ends_with_one_line_or_with_a_traceback(place):
    """The same from a shell: a user's mistake, and one of the program."""

    def ended(*arguments: str) -> tuple[int, str]:
        done = subprocess.run(
            [sys.executable, *arguments],
            env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
            capture_output=True, text=True,
        )  # fmt: skip
        assert done.stdout == ""
        return done.returncode, done.stderr

    line = ["report", "--workdir=x"]
    code, said = ended("-m", "topd_jax.cli", *line, "y")
    assert code == 2
    assert said == (
        "topd: unrecognized arguments: y; topd report --help has an example\n"
    )
    code, said = ended(
        "-c",
        "from topd_jax.cli import commands, main\n"
        "commands.Command.load = lambda _: {}['key']\nmain.run()",
        *line,
    )
    assert code == 1 and said.startswith("Traceback") and "KeyError" in said

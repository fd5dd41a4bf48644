"""Commands that cannot be done: one line, exit code 2, and nothing written."""

import contextlib
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from children import run_topd
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
        Path("wide.jsonl").write_bytes("".join(rows).encode("utf-16"))
        Path("deep.jsonl").write_text('{"question": ' + "[" * 100_000)
        Path("list.jsonl").write_text('{"question": "a", "answer": [1]}')
        Path("empty.jsonl").write_text("")
        hub_directory(Path("chat"))
        for name in ("torn", "pickled", "wordless"):
            hub_directory(Path(name))
        save_model(make(LLAMA), "mute")
        weights = "model.safetensors"
        Path("torn", weights).write_bytes(
            Path("torn", weights).read_bytes()[:999]
        )
        Path("pickled", weights).rename("pickled/pytorch_model.bin")
        Path("wordless/chat_template.jinja").write_text("{{ nothing.at.all }}")
        Path("list").mkdir()
        Path("list/config.json").write_text("[]")
        Path("set").mkdir()
        Path("set/set.json").write_text('{"shards": 10000000000}')
        Path("mine.py").write_text("def get_config():\n    return 1 / 0\n")
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
OFFLINE = "--config.train.stage=offline --config.offline.path="
COMMANDS = [
    (f"train {JSONL}latin.jsonl", "latin.jsonl line 1 is not UTF-8 ("),
    (f"train {JSONL}wide.jsonl", "looks like utf-16: b"),
    (f"train {JSONL}deep.jsonl", "deep.jsonl line 1 is not JSON (maximum"),
    (f"train {JSONL}list.jsonl", "the answer [1] in the field"),
    (f"train {JSONL}empty.jsonl", "empty.jsonl holds no records"),
    (f"train {JSONL}absent.jsonl", "no file at absent.jsonl; give data.path"),
    (f"generate {JSONL}deep.jsonl", "line 1 is not JSON"),
    (f"sweep {JSONL}latin.jsonl", "line 1 is not UTF-8"),
    (f"eval --which=start {JSONL}wide.jsonl", "looks like utf-16"),
    ("eval --which=start --config.eval.benchmarks=deep.jsonl",
     "eval.benchmarks: deep.jsonl line 1 is not JSON"),
    (f"train {MODELS}torn", "torn/model.safetensors cannot be read"),
    (f"train {MODELS}pickled", "convert pytorch_model.bin to safetensors"),
    (f"train {MODELS}list", "list/config.json must hold a JSON object, not []"),
    (f"train {MODELS}absent", "no model at absent"),
    (f"train {MODELS}wordless --config.student.source=wordless",
     "chat template fails: UndefinedError"),
    (f"train {MODELS}mute --config.student.source=mute",
     "no tokenizer in student.source or teacher.source; put its files"),
    (f"sample --which=start --prompt=a {MODELS}torn", "cut short?"),
    (f"export --which=start --output=out {MODELS}list", "JSON object"),
    (f"train {OFFLINE}set", "set.json has shards=10000000000; it must be"),
    (f"train {OFFLINE}absent", "absent has no solutions (no set.json)"),
    ("train --config.train.steps=²", "steps=² must be of type int; topd set"),
    (f"train --config.train.steps={10**30}", "must be at least 1 and at most"),
    (f"train --config.train.steps={'9' * 9999}", "99 must be of type int"),
    ("train --config.optimizer.clip=nan", "clip=nan must be a finite number"),
    ("train --config.objective=math:pi", "it must be a function"),
    (f"train --config.objective=topd({'(' * 999}", "cannot be read; write"),
    ("train --config=mine.py", "does not run: ZeroDivisionError: division by"),
    ("doctor --json=3", "ignored explicit argument"),
    ("sample --temperature=nan --which=start", "=nan must be a finite number"),
    ("probe --count=²", "--count: "),
]  # fmt: skip


def whole(
    line: str, small_arguments: list[str], workdir: str = "run"
) -> list[str]:
    """The arguments of a command line."""
    name, *more = line.split(" ")
    if name != "doctor":
        more.append(f"--workdir={workdir}")
    return [name, *small_arguments, *more]


def files_in(place: Path) -> dict[Path, int]:
    return {p: p.stat().st_size for p in place.rglob("*")}


@pytest.mark.parametrize(("line", "message"), COMMANDS)
def test_a_command_that_cannot_be_done_writes_nothing(
    place, refused, small_arguments, line, message
):
    before = files_in(place)
    said = refused(*whole(line, small_arguments))
    assert message in said and len(said) < 3000
    assert files_in(place) == before


@pytest.mark.slow
def test_the_same_of_twenty_commands_in_a_shell(place, small_arguments):
    before = files_in(place)
    chosen = [case for i, case in enumerate(COMMANDS) if i % 3]
    assert len(chosen) == 20
    with ThreadPoolExecutor(2) as pool:
        ended = pool.map(
            lambda i: run_topd(
                *whole(chosen[i][0], small_arguments, f"run{i}"), cwd=place
            ),
            range(20),
        )
        for (line, message), (code, out, said) in zip(
            chosen, ended, strict=True
        ):
            assert (code, out) == (2, ""), (line, said)
            assert said.startswith("topd: ") and said.count("\n") == 1, said
            assert message in said
    assert files_in(place) == before


def test_a_process_ends_with_one_line_or_with_a_traceback(place):
    """The same from a shell: a user's mistake, and one of the program."""

    def ended(*arguments: str) -> tuple[int, str]:
        done = subprocess.run(
            [sys.executable, *arguments, "settings", "no such setting"],
            env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
            capture_output=True, text=True,
        )  # fmt: skip
        assert done.stdout == ""
        return done.returncode, done.stderr

    code, said = ended("-m", "topd_jax.cli")
    assert code == 2 and said.startswith("topd: no setting has 'no such")
    assert said.count("\n") == 1
    code, said = ended(
        "-c",
        "from topd_jax.cli import main, settings\n"
        "settings.explain = lambda name: {}[name]\nmain.run()",
    )
    assert code == 1 and said.startswith("Traceback") and "KeyError" in said

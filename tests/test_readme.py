"""What the READMEs show runs as it stands there."""

import re
import shlex
import shutil
import subprocess
from pathlib import Path

import numpy as np
import small_hub

from topd_jax.cli import config_file, main
from topd_jax.cli.commands import COMMANDS, parse

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
READMES = [p for p in ROOT.rglob("README.md") if ".venv" not in p.parts]
SMALL = Path(__file__).parent / "small_run.py"


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, re.S)


def commands(text: str) -> list[list[str]]:
    """Command lines of all shell blocks, their comments left out."""
    found = []
    for block in blocks(text, "bash"):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if words:
                found.append(words)
    return found


def test_the_readme_is_short():
    assert README.count("\n") <= 200


def test_the_first_snippet_trains(capsys):
    (snippet,) = blocks(README, "python")
    names: dict = {}
    exec(snippet, names)
    lines = capsys.readouterr().out.split("\n")[:3]
    losses = [float(line.split()[1]) for line in lines]
    assert np.isfinite(losses).all() and losses[2] < losses[0]
    assert names["state"].step == 3


def run_topd(words: list[str], cache: Path, monkeypatch) -> None:
    """Run a command as it is written, on small models.

    The small run stands for a shipped config, for its world is trained once.
    """
    path = config_file.config_path
    monkeypatch.setattr(
        config_file, "config_path",
        lambda name: path(name) if name == "pair" else str(SMALL),
    )  # fmt: skip
    more = []
    if "--config" in words:
        more = [f"--config.world.cache={cache}"]
    if "pair" in words:  # as it is shipped, with fewer and shorter rows
        more += [f"--config.{name}" for name in (
            "data.held_out=3", "data.batch_size=2", "data.samples=1",
            "data.max_prompt_length=120", "rollout.max_new_tokens=20",
            "train.steps=1", "train.preflight=False", "eval.every=0",
            "eval.final_problems=3", "eval.batch_size=3",
            "student.dtype=float32", "teacher.dtype=float32",
        )]  # fmt: skip
    main.run([*words[1:], *more])


def test_the_commands_run(world_cache, trained, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(trained, "runs/tiny")  # the first command finds it done
    for name in ("TEACHER", "STUDENT"):
        small_hub.hub_directory(tmp_path / name)
    small_hub.questions(tmp_path / "questions.jsonl")
    ran = set()
    for words in commands(README):
        if words[:2] == ["topd", "plan"]:  # compiles for minutes
            parse("plan", words[2:])
        elif words[0] == "topd":
            run_topd(words, world_cache, monkeypatch)
            assert capsys.readouterr().out.strip()
        elif words[:2] == ["bash", "launch/tpu.sh"]:
            done = subprocess.run(
                words, cwd=ROOT, capture_output=True, text=True, check=True
            )
            assert "gcloud" in done.stdout
        else:  # installs, or runs the tests
            assert words[:2] in (["pip", "install"], ["bash", "launch/test.sh"])
        ran.add(words[1])
    assert {"train", "sample", "report", "plan", "launch/tpu.sh"} <= ran
    assert (tmp_path / "runs/tiny/report.html").exists()


def test_commands_of_every_readme_exist():
    for path in READMES:
        for words in commands(path.read_text()):
            if words[0] == "topd" and words[1] not in ("COMMAND", "..."):
                assert words[1] in COMMANDS, (path, words)


def test_every_link_of_the_readme_leads_somewhere():
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        if "://" not in target:
            assert (ROOT / target).exists(), target

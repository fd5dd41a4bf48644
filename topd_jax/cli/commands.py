"""The commands of ``topd``: what each is for, its flags, its function.

A table and an argument parser, nothing else: ``topd COMMAND --help`` imports
neither JAX nor the command.
"""

import argparse
import dataclasses
import importlib
import pathlib
import textwrap
from collections.abc import Callable
from typing import Any, NoReturn

from topd_jax.parallel import buckets

# A name with two dashes, and what argparse is told of it. The name is a
# parameter of the command's function.
Flag = tuple[str, dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class Command:
    """One command.

    Attributes:
      summary: what it does, one line.
      function: "module:function" below topd_jax; it takes every flag by name,
        and in the place of --config the ``settings``.
      flags: all that it takes.
      example: what a user may type after "topd COMMAND".
      details: more to know, after the flags; "" for nothing.
      resumes: whether it goes on where it was stopped when it is run again.
      in_steps: whether several processes stop after the same step of it.
    """

    summary: str
    function: str
    flags: tuple[Flag, ...]
    example: str
    details: str = ""
    resumes: bool = False
    in_steps: bool = False

    def load(self) -> Callable[..., Any]:
        """Import the function that does it."""
        module, _, name = self.function.partition(":")
        return getattr(importlib.import_module(f"topd_jax.{module}"), name)


def _at_least(least: int) -> Callable[[str], int]:
    def number(text: str) -> int:
        if not text.lstrip("-").isdigit() or int(text) < least:
            raise argparse.ArgumentTypeError(
                f"{text!r} must be a whole number, at least {least}"
            )
        return int(text)

    return number


def _share(text: str) -> float:
    try:
        share = float(text)
    except ValueError:
        share = -1.0
    if not 0 <= share <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} must be from 0 to 1")
    return share


def _path(text: str) -> pathlib.Path:
    try:
        return buckets.as_path(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _directory(text: str) -> pathlib.Path:
    return buckets.absolute(_path(text))


def _flag(name: str, **options: Any) -> Flag:
    return f"--{name}", options


CONFIG = _flag(
    "config", metavar="FILE", required=True,
    help="config file, or the name of a shipped one; --config.SECTION.KEY="
    "VALUE changes a setting",
)  # fmt: skip
WORKDIR = _flag(
    "workdir", metavar="DIR", type=_directory, required=True,
    help="directory of the run, on a disk or in a bucket (gs://...)",
)  # fmt: skip
WHICH = _flag(
    "which", choices=("latest", "best", "start"), default="latest",
    help="checkpoint of the student (latest)",
)  # fmt: skip
COUNT = _flag(
    "count", metavar="N", type=_at_least(1), default=32,
    help="test prompts that the student completes for it (32)",
)  # fmt: skip
# One of several processes that run the same command.
SEVERAL = (
    _flag(
        "distributed", action="store_true",
        help="one of several processes that JAX finds by itself "
        "(Cloud TPU, SLURM)",
    ),
    _flag(
        "coordinator", metavar="HOST:PORT",
        help="of the first of several processes",
    ),
    _flag(
        "processes", metavar="N", type=_at_least(1),
        help="how many processes run this command",
    ),
    _flag(
        "process", metavar="I", type=_at_least(0),
        help="which of them this one is, from 0",
    ),
)  # fmt: skip
RUN = (CONFIG, WORKDIR, *SEVERAL)
STUDENT = (*RUN, WHICH)
_EXAMPLE = "--config tiny --workdir runs/tiny"
_AGAIN = _flag(
    "b", metavar="DIR", type=_directory, action="append", default=[],
    help="another run beside it; again for more",
)  # fmt: skip

COMMANDS = {
    "doctor": Command(
        "check that the parts of a run fit together",
        "cli.doctor.examine:doctor",
        (
            CONFIG,
            _flag(
                "workdir", metavar="DIR", type=_directory, default=None,
                help="directory of the run, where models of a tiny world of "
                "your own are trained",
            ),
            *SEVERAL,
        ),
        "--config tiny",
        "Exit code 2 where something does not fit.",
    ),
    "train": Command(
        "train a student; rerun the command to resume",
        "cli.train:train",
        RUN,
        f"{_EXAMPLE} --config.train.steps=100",
        "SIGTERM or SIGINT (Ctrl-C) saves after the current step and stops; a "
        "second one stops at once. Several processes run the same command, and "
        "all stop if one is told to.",
        resumes=True, in_steps=True,
    ),
    "generate": Command(
        "let the teacher write solutions for stage 1",
        "training.generation:generate",
        (
            *RUN,
            _flag(
                "count", metavar="N", type=_at_least(1),
                help="training prompts to write on, from the first (all)",
            ),
        ),
        "--config tiny --workdir runs/solutions --count 2000",
        "config.offline.path names the solutions for topd train. Rerun the "
        "command to resume.",
        resumes=True,
    ),
    "solve": Command(
        "write solutions of reasoning-gym tasks by rule, for stage 1",
        "experiments.worked:solve",
        (
            CONFIG, WORKDIR,
            _flag(
                "habit", metavar="SHARE", type=_share, default=0.0,
                help="of problems that are solved with a wrong habit (0)",
            ),
        ),
        "--config reasoning_stage1 --workdir runs/reasoning/right",
        "config.data.path is chain_sum or leg_counting, with options. "
        "config.offline.path names the solutions for topd train.",
    ),
    "eval": Command(
        "evaluate a student on test problems or benchmarks",
        "cli.evaluate:evaluate", STUDENT, _EXAMPLE,
        "config.eval.benchmarks and config.eval.samples say on what, and how "
        "often a problem is answered. Rerun the command to resume after the "
        "last benchmark that was finished.",
        resumes=True,
    ),
    "compare": Command(
        "compare evaluated runs on the same problems, paired",
        "evaluation.benchmarking:compare_runs",
        (
            _flag(
                "a", metavar="DIR", type=_directory, action="append",
                required=True, help="an evaluated run; again for more seeds",
            ),
            _flag(
                "b", metavar="DIR", type=_directory, action="append",
                required=True, help="the run to compare with it",
            ),
            WHICH,
        ),
        "--a runs/opd --b runs/topd",
    ),
    "report": Command(
        "write an HTML page of a run, finished or not",
        "experiments.run_page:report",
        (
            WORKDIR, _AGAIN,
            _flag(
                "output", metavar="FILE", type=_path,
                help="where to write it (DIR/report.html)",
            ),
        ),
        "--workdir runs/one --b runs/two",
    ),
    "replay": Command(
        "repeat a step that raised an alarm, and say where it went wrong",
        "cli.replay:replay",
        (
            (
                "dump",
                dict(
                    type=_directory,
                    help="directory that a run names in its alarm",
                ),
            ),
        ),
        "runs/tiny/dumps/120-non_finite",
        "The run and its directory are left alone.",
    ),
    "inspect": Command(
        "write an HTML page of trajectories and what the detector sees",
        "cli.inspection:inspect", (*STUDENT, COUNT), _EXAMPLE,
    ),
    "probe": Command(
        "measure whether high loss means that futures part",
        "experiments.probe:probe", (*STUDENT, COUNT),
        f"{_EXAMPLE} --which start --count 200",
    ),
    "correct": Command(
        "measure whether updates on one window mend its divergence",
        "experiments.local_correction:correct",
        (
            *STUDENT,
            _flag(
                "count", metavar="N", type=_at_least(1), default=32,
                help="divergent points, at most one a test prompt (32)",
            ),
            _flag(
                "updates", metavar="N", type=_at_least(0), default=5,
                help="of each correction (5)",
            ),
        ),
        f"{_EXAMPLE} --which start --count 400",
    ),
    "sample": Command(
        "complete prompts with a student",
        "cli.sample:sample",
        (
            *STUDENT,
            _flag(
                "prompt", metavar="TEXT", action="append",
                help="text to complete, again for more (three test prompts)",
            ),
        ),
        f"{_EXAMPLE} --prompt '6*3+19-4?' --config.rollout.temperature=0",
    ),
    "export": Command(
        "write a student to a Hugging Face directory",
        "cli.export:export",
        (
            *STUDENT,
            _flag(
                "output", metavar="DIR", type=_path, required=True,
                help="a new or empty directory",
            ),
            _flag(
                "adapter", action="store_true",
                help="of a LoRA student the adapters alone, for PEFT",
            ),
        ),
        f"{_EXAMPLE} --output student",
    ),
    "settings": Command(
        "print every setting with its default, bounds and meaning",
        "cli.settings:explain",
        (
            (
                "name",
                dict(
                    nargs="?", default="",
                    help="part of a name: only settings that have it",
                ),
            ),
        ),
        "learning_rate",
    ),
    "sweep": Command(
        "train every objective on every seed of config.sweep, then report",
        "experiments.sweep:sweep", RUN, _EXAMPLE, resumes=True,
        in_steps=True,
    ),
    "plan": Command(
        "compute memory and time on a TPU topology, without the TPU",
        "planning.command:plan",
        (
            CONFIG,
            _flag(
                "topology", metavar="KIND:SHAPE", required=True,
                help="TPU kind and shape, as v5e:2x4",
            ),
            _flag(
                "output", metavar="FILE", type=_path, help="also write JSON"
            ),
        ),
        "--config qwen3_8b_to_1p7b --topology v5e:2x4",
        "Needs libtpu.",
    ),
}  # fmt: skip


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """Raise what argparse would print, as the ValueError of this tool."""
        raise ValueError(f"{message}; {self.prog} --help has an example")


def usage() -> str:
    """Return what ``topd --help`` prints."""
    lines = [f"  {n:9} {c.summary}" for n, c in COMMANDS.items()]
    return "\n".join([
        "usage: topd COMMAND --config FILE --workdir DIR "
        "[--config.SECTION.KEY=VALUE ...]",
        "", *lines, "",
        "topd COMMAND --help lists the flags of a command, with an example.",
        "FILE is a path, or the name of a shipped config: tiny, paper, ...",
        "TOPD_TRACEBACK=1 shows where an error comes from.",
    ])  # fmt: skip


def parse(name: str, arguments: list[str]) -> tuple[dict[str, Any], list[str]]:
    """Read the flags of a command.

    Args:
      name: of the command.
      arguments: after it.

    Returns:
      (parameter -> value, what else was typed: overrides of the config).

    Raises:
      ValueError: for a flag that the command must have, a value out of bounds,
        or what a command without a config does not know.
      SystemExit: after printing the help that was asked for.
    """
    command = COMMANDS[name]
    parser = _Parser(
        prog=f"topd {name}",
        description=f"{command.summary[0].upper()}{command.summary[1:]}.",
        epilog=f"{textwrap.fill(command.details, 79)}\n\nexample:\n"
        f"  topd {name} {command.example}".lstrip(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    for flag, options in command.flags:
        parser.add_argument(flag, **options)
    if CONFIG not in command.flags:
        return vars(parser.parse_args(arguments)), []
    values, rest = parser.parse_known_args(arguments)
    for word in rest:
        if not word.lstrip("-").startswith("config."):
            parser.error(f"unrecognized arguments: {word}")
    return vars(values), rest

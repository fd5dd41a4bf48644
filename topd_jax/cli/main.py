"""The command line: ``topd COMMAND --config FILE [--config.key=value ...]``.

``doctor`` looks whether a run's parts fit; ``train`` a student; ``generate``
what its first stage reads; ``eval``, ``inspect``, ``probe``, ``correct`` or
``sample`` from what was trained; ``compare`` two of them; ``export`` one to a
Hugging Face directory; ``sweep`` over variants and seeds. Bad input is one
clear line and exit code 2.
"""

import errno
import json
import os
import pathlib
import re
import runpy
import sys
import tempfile
import traceback
from collections.abc import Sequence
from typing import Any

from absl import flags
from ml_collections import ConfigDict, config_flags

from topd_jax.training.config import settings_from
from topd_jax.training.sections import unknown_key

# Trajectories that inspect, probe and correct take without --count.
LOOK_AT = 32

USAGE = """\
topd COMMAND --config FILE --workdir DIR [--config.section.key=value ...]

  doctor   do the parts of a run fit? one line a check, seconds (--json)
  train    train the student; the same command again resumes
  generate let the teacher write solutions, once for each training prompt (or
           for --count of them), for stage 1: config.offline.path
  eval     evaluate a trained student on the test problems, or on
           config.eval.benchmarks, config.eval.samples times a problem
  compare  two evaluated runs, paired: --a DIR --b DIR (again for more seeds)
  inspect  one HTML page of its trajectories, --count of them, and of what
           the detector saw in them
  report   one HTML page of a run, finished or not: curves, evaluations,
           answers over time, settings; --b DIR lays another over it (again
           for more), --output FILE; needs no --config
  probe    does a high loss mean that the futures part? on --count prompts
  correct  do --updates (5) on one window mend its divergence? before, OPD and
           TOPD on --count divergent points, at --learning_rate (the run's)
  quantize what a smaller teacher costs: bytes, and reverse KL on --count
           completions
  sample   let it write: --prompt TEXT [--prompt TEXT ...]
  export   write it to a Hugging Face directory: --output DIR; of a LoRA
           student, with --adapter, its adapters alone as PEFT loads them
  sweep    every variant on every seed of config.sweep, then the report
  plan     memory and time on a TPU topology, without a TPU (needs libtpu):
           --topology v5e:2x4; --output FILE for JSON; where it does not fit,
           --search SECONDS (900) for what does; --explain N tells the
           operations that move and send the most bytes
  growth   how a step's cost grows with its sizes, beside the formulas; on a
           TPU topology with --topology v5e:2x2 (try --config growth)

FILE is a path, or a shipped config: default, tiny, smollm2_gsm8k, paper,
paper_stage1, paper_v5e (_v5p, _v6e, _tpu7x), qwen3_8b_to_1p7b, qwen3_8b_apart.
All that read a run take --which latest (default), best or start.
train runs as several processes, the same command in each, with --distributed
(Cloud TPU, SLURM) or --coordinator HOST:PORT --processes N --process I; SIGTERM
to any lets all save after the step and stop.
TOPD_TRACEBACK=1 shows where an error came from.
"""


def _flag_values(
    config: ConfigDict, arguments: Sequence[str]
) -> flags.FlagValues:
    """Flags of their own, so that :func:`run` may be called again."""
    values = flags.FlagValues()
    config_flags.DEFINE_config_dict(
        "config", config, flag_values=values, sys_argv=["topd", *arguments]
    )
    for name, about in (
        ("workdir", "directory of the run"),
        ("output", "directory to export to, or file of a plan or report"),
        ("coordinator", "HOST:PORT of the first of several processes"),
        ("topology", "TPU kind and shape to plan for, v5e:2x4"),
    ):
        flags.DEFINE_string(name, None, about, flag_values=values)
    flags.DEFINE_enum(
        "which", "latest", ["latest", "best", "start"], "which student",
        flag_values=values,
    )  # fmt: skip
    for name, about in (
        ("prompt", "text to complete"),
        ("a", "directory of an evaluated run"),
        ("b", "directory of a run to compare with it"),
    ):
        flags.DEFINE_multi_string(name, [], about, flag_values=values)
    for name, about in (
        ("distributed", "several processes that JAX finds by itself"),
        ("adapter", "export the adapters alone, as PEFT loads them"),
        ("json", "doctor's findings as JSON"),
    ):
        flags.DEFINE_bool(name, False, about, flag_values=values)
    for name, default, about in (
        ("count", None, "trajectories to look at, or prompts to write on"),
        ("processes", None, "how many run this command"),
        ("process", None, "which of them this is, from 0"),
        ("updates", 5, "of a local correction, on one window"),
        ("search", 900, "seconds to look for a plan that fits; 0: none"),
        ("explain", 0, "operations to tell that a plan's bytes come from"),
    ):
        least = 1 if name in ("count", "processes", "heartbeat") else 0
        flags.DEFINE_integer(
            name, default, about, lower_bound=least, flag_values=values
        )
    for name, about in (("temperature", "of the sampler; 0 is greedy"),
                        ("learning_rate", "of a correction")):  # fmt: skip
        flags.DEFINE_float(name, None, about, flag_values=values)
    return values


def config_path(name: str) -> str:
    """Finds a config: a path, or the name of one that is shipped.

    Args:
      name: path of a Python file, or "tiny" for ``configs/tiny.py``.

    Returns:
      An existing path.

    Raises:
      ValueError: naming what is shipped.
    """
    if pathlib.Path(name).is_file():
        return name
    from topd_jax import configs

    folder = pathlib.Path(configs.__file__).parent
    shipped = sorted(
        p.stem for p in folder.glob("*.py") if p.stem != "__init__"
    )
    stem = pathlib.Path(name).stem
    if stem in shipped and pathlib.Path(name).parent.name in ("", "configs"):
        return str(folder / f"{stem}.py")
    raise ValueError(
        f"--config {name} does not exist; give a path, or one of "
        f"{', '.join(shipped)}"
    )


def read_config(path: str) -> ConfigDict:
    """Runs a config file.

    Args:
      path: of a Python file with ``get_config()``.

    Returns:
      What ``get_config()`` gives.

    Raises:
      ValueError: with the file's own error, or for a file that gives none.
    """
    try:
        make = runpy.run_path(path).get("get_config")
        config = make() if make else None
    except Exception as error:  # whatever the user's file raises
        raise ValueError(
            f"--config {path} does not run: {type(error).__name__}: "
            f"{_inner_text(error)}; configs/default.py has every key and its "
            "type"
        ) from error
    if not isinstance(config, ConfigDict):
        raise ValueError(
            f"--config {path} must define get_config() that returns a "
            "ConfigDict; start from configs/tiny.py"
        )
    return config


def _inner_text(error: BaseException) -> str:
    # A ConfigDict wraps a KeyError, whose text is a repr.
    while error.args and isinstance(error.args[0], BaseException):
        error = error.args[0]
    return error.args[0] if isinstance(error, KeyError) else str(error)


def _checked_override(argument: str, config: ConfigDict) -> str:
    """Refuses ``--config.x.y`` where there is no such key."""
    found = re.match(r"--?(no)?config\.([^=]*)", argument)
    if not found:
        return argument
    place, path = config, "config"
    for key in found[2].split("."):
        if not isinstance(place, ConfigDict):
            raise ValueError(f"{path} has no keys; it is {place!r}")
        if key not in place:
            raise ValueError(unknown_key(f"{path}.{key}", list(place), path))
        place, path = place[key], f"{path}.{key}"
    name, _, value = argument.partition("=")
    if isinstance(place, tuple) and re.fullmatch(r"[\w+:,./=~-]*", value):
        # "opd,topd:teacher" without quotes, and "" for none.
        items = [v for v in value.split(",") if v]
        numbers = all(re.fullmatch(r"-?\d+", v) for v in items)
        return f"{name}={tuple(map(int, items) if numbers else items)!r}"
    return argument


def _parse(arguments: list[str], command: str = "") -> flags.FlagValues:
    """Reads the flags; every mistake becomes a ValueError."""
    given, others, rest = None, [], iter(arguments)
    for argument in rest:  # "--config X" and "--config=X" alike
        name, equals, value = argument.partition("=")
        if name in ("--config", "-config"):
            given = value if equals else next(rest, None)
        else:
            others.append(argument)
    if not given and command not in ("compare", "report"):
        raise ValueError("--config is missing; try --config tiny")
    config = read_config(config_path(given)) if given else ConfigDict()
    others = [_checked_override(argument, config) for argument in others]
    try:
        values = _flag_values(config, others)
        strays = values(["topd", *others])[1:]
    except (flags.Error, TypeError) as error:
        raise ValueError(f"{error}; topd --help lists the flags") from error
    if strays:
        raise ValueError(f"unexpected arguments: {' '.join(strays)}")
    if not values.workdir and command == "doctor":
        values.workdir = _workdir_to_look_at(values.config)
    if not values.workdir and command not in ("compare", "plan"):
        raise ValueError("--workdir is missing; try --workdir runs/tiny")
    return values


def _plan(values: flags.FlagValues) -> str:
    from topd_jax.planning import command

    if values.topology is None:
        raise ValueError("--topology is missing; try --topology v5e:2x4")
    return command.plan(
        settings_from(values.config),
        values.topology,
        output=values.output,
        search_seconds=values.search,
        explain=values.explain,
    )


def _workdir_to_look_at(config: ConfigDict) -> str | None:
    """Any, where no run of this config would write a model first."""
    models = [config.get(name, {}) for name in ("student", "teacher")]
    world = any(m.get("source") == "world" for m in models)
    if world and not config.get("world", {}).get("cache"):
        return None
    return tempfile.gettempdir()


def _command(name: str, values: flags.FlagValues) -> Any:
    if name == "plan":
        return _plan(values)
    # Here, not above: orbax and others take seconds to import.
    from topd_jax.cli import commands

    if name == "compare":
        return commands.compare(values.a, values.b, values.which)
    if name == "report":
        return commands.report(values.workdir, values.b, values.output)
    settings = settings_from(values.config)
    if "://" in values.workdir:
        raise ValueError(
            f"--workdir={values.workdir} must be a directory; mount the bucket "
            "(gcsfuse) and give the place where it is mounted"
        )
    workdir = pathlib.Path(values.workdir).absolute()
    _join(name, values, settings.train.heartbeat)
    run = (settings, workdir)
    if name == "doctor":
        return commands.doctor(*run)
    if name == "train":
        return commands.train(*run)
    if name == "eval":
        return commands.evaluate(*run, values.which)
    look = (*run, values.which, values.count or LOOK_AT)
    if name in ("inspect", "probe", "quantize"):
        return getattr(commands, name)(*look)
    if name == "correct":
        from topd_jax.experiments import local_correction

        return local_correction.correct(
            *look, values.updates, values.learning_rate
        )
    if name == "growth":
        from topd_jax.planning import growth

        return growth.growth(*run, values.topology)
    if name == "generate":
        return commands.generate(*run, values.count)
    if name == "sample":
        return commands.sample(
            *run, values.which, values.prompt, values.temperature
        )
    if name == "export":
        if values.output is None:
            raise ValueError("--output is missing: a directory to export to")
        output = pathlib.Path(values.output)
        return commands.export(*run, values.which, output, values.adapter)
    return commands.sweep(*run)


def _join(command: str, values: flags.FlagValues, heartbeat: int) -> None:
    """Makes this process one of several, where the flags say so."""
    given = (values.coordinator, values.processes, values.process)
    if not values.distributed and given == (None, None, None):
        return
    if command != "train":
        raise ValueError(
            f"topd {command} runs as one process; leave --distributed, "
            "--coordinator, --processes and --process out"
        )
    from topd_jax.parallel import hosts

    hosts.start(*given, heartbeat_seconds=heartbeat)


def run(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line; exits with 2 after bad input.

    Args:
      arguments: without the program's name; None takes ``sys.argv``.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    names = (
        "train", "eval", "compare", "inspect", "report", "probe", "correct",
        "quantize", "sample", "export", "sweep", "doctor", "generate", "plan",
        "growth",
    )  # fmt: skip
    if not arguments or {"-h", "--help", "help"} & set(arguments):
        print(USAGE)
        return
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    try:
        name = arguments[0]
        if name not in names:
            raise ValueError(f"no command {name!r}; one of {', '.join(names)}")
        values = _parse(arguments[1:], name)
        result = _command(name, values)
        if name == "doctor":
            from topd_jax.cli.doctor import findings

            raise SystemExit(findings.show(result, as_json=values.json))
        if isinstance(result, str):
            print(result)
        elif not _process():
            print(json.dumps(result, indent=1))
    except Exception as error:
        line = _one_line(error)
        if line is None or os.environ.get("TOPD_TRACEBACK"):
            if _process() is None:
                raise  # where it came from is the point
            traceback.print_exc()
        else:
            print(f"topd: {line}", file=sys.stderr, flush=True)
        if _process() is not None:
            from topd_jax.parallel import hosts

            hosts.leave(error)
        raise SystemExit(2) from error


def _process() -> int | None:
    """Which of several processes this is; None where it is alone."""
    jax = sys.modules.get("jax")
    if jax is None or not jax.distributed.is_initialized():
        return None
    return jax.process_index()


def _one_line(error: Exception) -> str | None:
    """What the user is told, on one line; None for what is our mistake."""
    text = " ".join(str(error).split())
    chain: list[BaseException] = [error]
    while chain[-1].__cause__ or chain[-1].__context__:
        chain.append(chain[-1].__cause__ or chain[-1].__context__)
    # Libraries that write files wrap the system's error in one of their own.
    if any(
        getattr(e, "errno", None) == errno.ENOSPC
        or os.strerror(errno.ENOSPC) in str(e)
        for e in chain
    ):
        return (
            f"{text}; make room and start the same command again: it goes on "
            "from the last checkpoint"
        )
    if isinstance(error, ValueError | FloatingPointError | OSError):
        return text
    return None


if __name__ == "__main__":
    run()

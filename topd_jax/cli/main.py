"""The command line: ``topd COMMAND --config FILE [--config.key=value ...]``.

Bad input is one clear line and exit code 2; a mistake of the program shows its
traceback, with exit code 1. Nothing heavy is imported before a command runs.
"""

import errno
import json
import os
import sys
import traceback
from collections.abc import Sequence
from typing import Any

from topd_jax.cli.commands import COMMANDS, parse, usage
from topd_jax.cli.refusals import is_refusal
from topd_jax.parallel import buckets, stopping

# What the system says of storage -> the way out.
_STORAGE = {
    errno.ENOSPC: "make room",
    errno.EDQUOT: "make room, or raise the quota",
    errno.EFBIG: "raise the limit on the size of a file (ulimit -f)",
    errno.EROFS: "mount it for writing",
    errno.EACCES: "allow access to it",
    errno.EIO: "check the disk",
}


def main() -> None:
    """Run the command line of this process, which signals stop at any time."""
    stopping.watch(_one_line)
    try:
        run()
    except SystemExit as stop:
        # Threads that write there would ask again for many minutes.
        if buckets.explain(_chain(stop)):
            os._exit(stop.code)
        raise


def run(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; exit with 2 after bad input.

    Args:
      arguments: without the program's name; None takes ``sys.argv``.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(usage())
        return
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    try:
        result = _call(*arguments)
        if isinstance(result, str):
            print(result)
        elif not _process():
            print(json.dumps(result, indent=1))
    except Exception as error:
        _fail(error)


def _call(name: str, *arguments: str) -> Any:
    if name not in COMMANDS:
        raise ValueError(f"no command {name!r}; one of {', '.join(COMMANDS)}")
    values, overrides = parse(name, list(arguments))
    command = COMMANDS[name]
    stopping.set_resumes(command.resumes)
    if "config" in values:
        # Here, not above: the settings import JAX, which takes seconds.
        from topd_jax.cli.config_file import load_settings
        from topd_jax.parallel.compilation import keep_compiled

        settings = load_settings(values.pop("config"), overrides)
        keep_compiled(settings.train.compilation_cache)
        if "distributed" in values:
            from topd_jax.cli.several import join

            values = join(name, command, values, settings)
        values["settings"] = settings
    return command.load()(**values)


def _fail(error: Exception) -> None:
    """Say what went wrong, and leave.

    With 2 for what another start would meet again, as a bad config: what
    restarts jobs gives up then. Else with 1.
    """
    line = _one_line(error)
    code = 1 if line is None or buckets.AWAY in line else 2
    if line is None or os.environ.get("TOPD_TRACEBACK"):
        if _process() is None:
            raise error  # where it came from is the point
        traceback.print_exc()
    else:
        print(f"topd: {line}", file=sys.stderr, flush=True)
    if _process() is not None:
        from topd_jax.parallel import hosts

        hosts.leave(error, code)
    raise SystemExit(code) from error


def _process() -> int | None:
    """Return which of several processes this is; None where it is alone."""
    jax = sys.modules.get("jax")
    if jax is None or not jax.distributed.is_initialized():
        return None
    return jax.process_index()


def _chain(error: BaseException) -> list[BaseException]:
    """Return an error and its causes."""
    chain = [error]
    while chain[-1].__cause__ or chain[-1].__context__:
        chain.append(chain[-1].__cause__ or chain[-1].__context__)
    return chain


def _one_line(error: Exception) -> str | None:
    """Return what to tell the user; None for what a traceback must show."""
    text = " ".join(str(error).split())
    chain = _chain(error)
    foreign = isinstance(error, OSError) or not is_refusal(error)
    if foreign and (line := buckets.explain(chain)):
        return f"{line}, and rerun the command"
    for number, way_out in _STORAGE.items():
        # Libraries that write files wrap the system's error in their own.
        if any(
            getattr(e, "errno", None) == number or os.strerror(number) in str(e)
            for e in chain
        ):
            more = " to resume" if stopping.resumes() else ""
            return f"{text}; {way_out} and rerun the command{more}"
    return text if is_refusal(error) else None


if __name__ == "__main__":
    main()

"""Stop a command at SIGINT (Ctrl-C) or SIGTERM, whatever it does just then.

Python runs its handlers in the main thread, between two lines of Python: after
a compilation of minutes, and then by an exception that may end the interpreter
under threads of XLA. Here a thread hears of signals at once, and ends the
process by ``os._exit``. That is safe at any moment, since every file is
written whole or not at all.
"""

import contextlib
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

_SIGNALS = (signal.SIGINT, signal.SIGTERM)

# Held while a signal is answered, and while the answer is changed.
_lock = threading.Lock()
# What the first signal does; None leaves.
_answer: Callable[[int], None] | None = None
# Says in one line why an answer failed; None where a traceback must.
_explain: Callable[[Exception], str | None] = str
# The signal that a loop of steps is asked to stop by; 0 for none.
_asked = 0
# Whether the command resumes when it is run again.
_resumes = False
# Whether this is one of several processes, which stop after the same step.
_several = False


def watch(explain: Callable[[Exception], str | None]) -> None:
    """Stop this process by signals; call it once, in the main thread.

    The first signal does what :func:`answered_by` says, the second leaves at
    once. A signal that the parent process ignores stays ignored.

    Args:
      explain: says in one line why an answer failed; None where its traceback
        must be shown.
    """
    global _explain
    _explain = explain
    heard, told = os.pipe()
    os.set_blocking(told, False)
    for number in _SIGNALS:
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, lambda *_: None)
    signal.set_wakeup_fd(told, warn_on_full_buffer=False)
    _start(_listen, heard)


def set_resumes(resumes: bool) -> None:
    """Set whether the line about a stop says that the command resumes."""
    global _resumes
    _resumes = resumes


def resumes() -> bool:
    """Return whether the command resumes when it is run again."""
    return _resumes


def stop_together() -> None:
    """Let the first signal wait from now on: several processes stop as one."""
    global _several, _answer
    _several, _answer = True, _wait


def asked() -> int:
    """Return the signal that asks this process to stop; 0 for none."""
    return _asked


@contextlib.contextmanager
def answered_by(answer: Callable[[int], None]) -> Iterator[None]:
    """Answer the first signal with a function while the block runs.

    If the function ends the process, the block's end waits for it. One of
    several processes answers with none: see :func:`stop_together`.

    Args:
      answer: given the signal's number, called in another thread; at once
        where a signal waits already.
    """
    global _answer
    if _several:
        yield
        return
    with _lock:
        before, _answer = _answer, answer
        if _asked:
            answer(_asked)
    try:
        yield
    finally:
        with _lock:
            _answer = before


@contextlib.contextmanager
def after_the_step() -> Iterator[None]:
    """Let the first signal wait while the block runs: see :func:`asked`.

    If the block ends without having asked, the process leaves then.
    """
    with answered_by(_wait):
        yield
    if _asked:
        leave(_asked)


def leave(number: int, done: str = "") -> NoReturn:
    """End the process, with the exit code of one that a signal ended.

    Args:
      number: of the signal.
      done: what was saved before, for the line that says so.

    Raises:
      SystemExit: in the main thread, so that several processes part in order.
    """
    in_main = threading.current_thread() is threading.main_thread()
    if in_main:  # else it would be printed once more
        for bar in _bars():
            bar.close()
    name = signal.Signals(number).name
    more = "; rerun the command to resume" if _resumes or done else ""
    _say(f"stopped by {name}{done}{more}")
    if in_main:
        raise SystemExit(128 + number)
    os._exit(128 + number)


def _listen(pipe: int) -> None:
    """Read signals, a byte each; answer one, and leave by the next."""
    answering = False
    while True:
        (number,) = os.read(pipe, 1)
        if number not in _SIGNALS:
            continue
        if answering:
            leave(number)
        answering = True
        _start(_respond, number)


def _respond(number: int) -> None:
    try:
        with _lock:
            (_answer or leave)(number)
    except Exception as error:
        if line := _explain(error):
            _say(line)
            os._exit(2)
        traceback.print_exc()
        os._exit(1)


def _wait(number: int) -> None:
    global _asked
    if not _asked:
        name = signal.Signals(number).name
        _say(f"{name}: stopping after this step; again: at once")
    _asked = number


def _say(text: str) -> None:
    """Write one line, below a progress bar; no lock may be waited for."""
    start = "\n" if _bars() else ""
    with contextlib.suppress(OSError):  # nobody reads any longer
        os.write(2, f"{start}topd: {text}\n".encode())


def _bars() -> list[Any]:
    """Return the progress bars that are on the screen."""
    tqdm = sys.modules.get("tqdm")
    return list(getattr(tqdm.tqdm, "_instances", ())) if tqdm else []


def _start(function: Callable[[int], None], argument: int) -> None:
    threading.Thread(target=function, args=(argument,), daemon=True).start()

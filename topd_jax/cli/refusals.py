"""Tell what refuses the user's input from a mistake of the program."""

import dis
import pathlib

_PACKAGE = pathlib.Path(__file__).parents[1]


def is_refusal(error: Exception) -> bool:
    """Return whether an error refuses what the user gave.

    A file of the user's that the system refuses does; else a ``raise`` of this
    package must have made the error. A library's error of the same type ends
    in a frame of the library; or, as JAX hides its own, in one of this package
    that calls and does not raise.

    Args:
      error: caught.
    """
    if isinstance(error, OSError) and error.filename is not None:
        return True
    if not isinstance(error, ValueError | FloatingPointError | OSError):
        return False
    last = error.__traceback__
    while last.tb_next:
        last = last.tb_next
    code = last.tb_frame.f_code
    raises = code.co_code[last.tb_lasti] == dis.opmap["RAISE_VARARGS"]
    return raises and _PACKAGE in pathlib.Path(code.co_filename).parents

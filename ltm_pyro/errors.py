"""The errors that a command reports as one line, and checks of numbers that every room needs."""

from __future__ import annotations

import numbers
import os
import sys
from types import TracebackType


class InputError(ValueError):
    """What the user gave cannot be used; the message says what is wrong and what to do, in one line.

    The commands print it on standard error and exit with status 2, without a traceback.
    """


class RunError(Exception):
    """A command cannot continue although its input is valid; the message says why, in one line.

    The commands print it on standard error and exit with status 1, without a traceback.
    """


class WriteError(RunError):
    """A file of a run could not be written; the message says which and why.

    It is not an OSError, so that training can tell a full disk from a closed output.
    """


def require_whole(name: str, value: object, least: int) -> None:
    """Check that an argument is a whole number, and not too small.

    Args:
        name: what the message calls it.
        least: the smallest value that it may have.

    Raises:
        ValueError: if it is not.
    """
    # A truth value is a number to Python, and never one to a user.
    if not isinstance(value, numbers.Integral) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name} must be a whole number of at least {least}, not {value!r}")


def require_number(name: str, value: object) -> None:
    """Check that an argument is a number.

    Raises:
        ValueError: if it is not.
    """
    if not isinstance(value, numbers.Real) or isinstance(value, bool):
        raise ValueError(f"{name} must be a number, not {value!r}")


def end_in_one_line_when_interrupted() -> None:
    """Let Ctrl-C end a command with a line and status 130 also while its modules are imported, which takes seconds.

    Without effect where the package is imported by another program: a command is started as `python -m ltm_pyro…`,
    while Python looks up what that is, or as `ltm`. From its own code on, :func:`ltm_pyro.cli.run` sees to it.
    """
    if sys.argv[:1] != ["-m"] and os.path.basename(next(iter(sys.argv), "")) != "ltm":
        return
    before = sys.excepthook

    def hook(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
        if not issubclass(kind, KeyboardInterrupt):
            before(kind, error, traceback)
            return
        if sys.stderr is not None:
            print("interrupted", file=sys.stderr, flush=True)
        os._exit(130)  # Python itself would end by the signal

    sys.excepthook = hook

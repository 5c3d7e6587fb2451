"""What the commands share: arguments from a dataclass, and errors as one line with exit status 2."""

from __future__ import annotations

import contextlib
import io
import itertools
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn, TypeVar

import tyro

from ltm_pyro.errors import InputError

Config = TypeVar("Config")


def parse(default: Config, args: Sequence[str], command: str) -> Config:
    """A config like `default`, changed by the command's arguments. The docstrings of its fields are the `--help`.

    Raises:
        InputError: if the arguments cannot be understood.
        SystemExit: with status 0, after `--help`.
    """
    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors):
            return tyro.cli(
                type(default),
                prog=f"python -m ltm_pyro.{command}",
                args=args,
                default=default,
                config=(tyro.conf.FlagCreatePairsOff,),
            )
    except SystemExit as exit:
        if not exit.code:
            raise
        # tyro draws a box of several lines; what is wrong stands above the first rule inside it.
        lines = [line.strip("│ ") for line in errors.getvalue().splitlines()[1:-1]]
        message = " ".join(itertools.takewhile(lambda line: not line.startswith("──"), lines))
        raise InputError(f"{message} (--help lists the options)") from None


def run(main: Callable[[Sequence[str]], int], args: Sequence[str]) -> NoReturn:
    """Run a command and exit with its status: what it returns, 2 after an :class:`InputError`, 130 after Ctrl-C."""
    try:
        status = main(args)
    except InputError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        status = 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        status = 130
    sys.exit(status)

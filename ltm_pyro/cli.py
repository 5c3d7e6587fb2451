"""What the commands share: arguments from a dataclass, the device, and errors as one line with exit status 2."""

from __future__ import annotations

import contextlib
import inspect
import io
import itertools
import os
import re
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import pyro
import torch
import tyro

from ltm_pyro.errors import InputError, RunError

__version__ = "0.1.0"
"""The version of this package, for which pyproject.toml looks here."""

LEAST_COLUMNS = 40
"""The width for which help is laid out in a narrower terminal, which breaks its lines."""

Config = TypeVar("Config")


def parse(default: Config, args: Sequence[str], command: str) -> Config:
    """A config like `default`, changed by the command's arguments. The docstrings of its fields are the `--help`.

    Raises:
        InputError: if the arguments cannot be understood.
        SystemExit: with status 0, after `--help`.
    """
    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors), _terminal_of_some_width():
            return tyro.cli(
                type(default),
                prog=f"python -m ltm_pyro.{command}",
                args=args,
                default=default,
                config=(tyro.conf.FlagCreatePairsOff,),
            )
    except ValueError as error:  # raised by a dataclass's own checks, where its options have no prefix
        raise InputError(f"{error} (--help lists the options)") from None
    except SystemExit as exit:
        if not exit.code:
            raise
        # tyro prints a title, what is wrong, a rule, and hints, in a box if the terminal can draw
        # one, and otherwise with one more rule.
        text = re.sub(r"\x1b\[[0-9;]*m", "", errors.getvalue())  # the colours of a terminal
        lines = [line.strip("│ ") for line in text.splitlines() if line.strip()][1:]
        lines = lines[1:] if _is_rule(lines[0]) else lines
        message = " ".join(itertools.takewhile(lambda line: not _is_rule(line), lines))
        raise InputError(f"{message} (--help lists the options)") from None


@contextlib.contextmanager
def _terminal_of_some_width() -> Iterator[None]:
    """Within its block, a terminal has `LEAST_COLUMNS` at least: in a few, tyro lays out its help without an end."""
    before = os.environ.get("COLUMNS")
    if shutil.get_terminal_size().columns < LEAST_COLUMNS:
        os.environ["COLUMNS"] = str(LEAST_COLUMNS)
    try:
        yield
    finally:
        if before is not None:
            os.environ["COLUMNS"] = before
        else:
            os.environ.pop("COLUMNS", None)


def _is_rule(line: str) -> bool:
    return re.match("[─-]{3}", line) is not None


def choices(text: str, registry: Mapping[str, object]) -> Any:
    """The help of an option that takes names from a registry: a text, then a line for each name.

    What a name stands for is the first sentence of its entry's docstring, or the entry's `summary` if it has one.
    """
    lines = [f"{name}: {getattr(entry, 'summary', None) or _first_sentence(entry)}" for name, entry in registry.items()]
    return tyro.conf.arg(help="\n".join([text, *lines]))


def _first_sentence(entry: object) -> str:
    paragraph = (inspect.getdoc(entry) or "").partition("\n\n")[0]
    return " ".join(paragraph.split()).partition(". ")[0].rstrip(".")


def require_at_least(config: object, **least: int) -> None:
    """Check that options are no smaller than they may be; an option that is None was not given.

    Args:
        least: the smallest value of each field, by its name.

    Raises:
        InputError: if one is smaller.
    """
    for name, smallest in least.items():
        value = getattr(config, name)
        if value is not None and value < smallest:
            raise InputError(f"--{name.replace('_', '-')} must be at least {smallest}, not {value}")


def require_seed(seed: int) -> None:
    """Check that NumPy's and torch's generators both take a seed.

    Raises:
        InputError: if they do not.
    """
    if not 0 <= seed < 2**32:
        raise InputError(f"--seed must be at least 0 and below 2^32, not {seed}")


def require_file_path(option: str, path: str | None) -> None:
    """Check that an option's file could be written: it is not a folder, and its folder exists. None: not given.

    Raises:
        InputError: if it could not.
    """
    if path is not None and (not Path(path).absolute().parent.is_dir() or Path(path).is_dir()):
        raise InputError(f"{option} {path}: its folder does not exist")


@contextlib.contextmanager
def numerics_of_commands() -> Iterator[None]:
    """Turn off Pyro's validation and its warnings of values that are not finite: such steps are skipped and counted."""
    with pyro.validation_enabled(False), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Encountered NaN")
        yield


def pick_device(name: str) -> torch.device:
    """The device of that name; auto is cuda where there is one.

    Raises:
        InputError: if it is cuda and there is none.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: there is no CUDA device here; use --device cpu")
    return torch.device("cuda" if name == "auto" and torch.cuda.is_available() else name.replace("auto", "cpu"))


def _print_version() -> int:
    print(f"ltm_pyro {__version__}")
    return 0


def open_standard_streams() -> None:
    """Give a process whose standard streams were closed when it began (`>&-`) ones that lead nowhere.

    Python has None in their place, on which nothing can be printed. And the next file that is opened, which may be one
    of the run, would take the number of the closed one, to which libraries print.
    """
    for number in range(3):  # from below: a file that is opened takes the lowest number that is free
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    for number, (name, mode) in enumerate({"stdin": "r", "stdout": "w", "stderr": "w"}.items()):
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(number, mode, closefd=False))


def run(main: Callable[[Sequence[str]], int], args: Sequence[str]) -> NoReturn:
    """Run a command and exit with its status: what it returns, 2 after an :class:`InputError`, 130 after Ctrl-C,
    1 after a :class:`RunError` or where something could not be written. With `--version`, say the version instead."""
    open_standard_streams()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a generated character that a terminal lacks is not an error
    try:
        status = main(args) if "--version" not in args else _print_version()
        sys.stdout.flush()
    except InputError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        status = 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        status = 130
    except BrokenPipeError:  # whatever read our output has ended, as `head` does
        status = 1
    except (OSError, RunError) as error:
        print(f"error: {error}", file=sys.stderr)
        status = 1
    try:
        sys.stdout.flush()
    except OSError:  # Python would try again at its end, and complain
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(status)

"""What the commands share: arguments from a dataclass, the device, and errors as one line with exit status 2."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import io
import itertools
import os
import re
import shlex
import shutil
import sys
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal, NoReturn, TypeVar, cast, get_args, get_origin, get_type_hints

import pyro
import torch
import tyro

from ltm_pyro.errors import InputError, RunError
from ltm_pyro.files.output import Output

__version__ = "0.1.0"
"""The version of this package, for which pyproject.toml looks here."""

LEAST_COLUMNS = 40
"""The width for which help is laid out in a narrower terminal, which breaks its lines."""

Config = TypeVar("Config")


def parse(default: Config, args: Sequence[str], command: str, common: Collection[str] | None = None) -> Config:
    """A config like `default`, changed by the command's arguments. The docstrings of its fields are the `--help`.

    Args:
        common: the fields that `--help` explains; `--help-all` explains the others too. None: `--help` explains all.

    Raises:
        InputError: if the arguments cannot be understood.
        SystemExit: with status 0, after `--help`.
    """
    # Tyro has only the option that changes a flag. The other asks for what is so already, as when processes that resume
    # a run are started with the options that began it.
    flags = {name.replace("_", "-"): value for name, value in vars(default).items() if isinstance(value, bool)}
    unchanged = {
        f"--{name}" if is_set else f"--no-{name}"
        for name, is_set in flags.items()
        if not {f"--{name}", f"--no-{name}"} <= set(args)  # these contradict each other, which tyro refuses
    }
    args = [arg for arg in args if arg not in unchanged]
    errors, help_text = io.StringIO(), _HelpText()
    all_options = default
    if common is not None and "--help-all" in args:
        args = [*(arg for arg in args if arg not in ("-h", "--help", "--help-all")), "--help"]
    elif common is not None and {"-h", "--help"} & set(args):
        default = _with_others_hidden(default, common)
    try:
        with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(help_text), _terminal_of_some_width():
            return tyro.cli(
                type(default),
                prog=f"python -m ltm_pyro.{command}",
                args=args,
                default=default,
                config=(tyro.conf.FlagCreatePairsOff,),
            )
    except ValueError as error:  # raised by a dataclass's own checks, where its options have no prefix
        sections = [section for section in vars(default).values() if dataclasses.is_dataclass(section)]
        names = [*vars(default), *(name for section in sections for name in vars(section))]
        raise InputError(f"{with_flags(str(error), '', names)} (--help lists the options)") from None
    except SystemExit as exit:
        if not exit.code:
            print(_plain(help_text.getvalue()), end="")
            if default is not all_options:
                print("These are the common options. --help-all lists all of them.")
            raise
        # tyro prints a title, what is wrong, a rule, and hints, in a box if the terminal can draw
        # one, and otherwise with one more rule.
        text = re.sub(r"\x1b\[[0-9;]*m", "", errors.getvalue())  # the colours of a terminal
        lines = [line.strip("│ ") for line in text.splitlines() if line.strip()][1:]
        lines = lines[1:] if _is_rule(lines[0]) else lines
        message = " ".join(itertools.takewhile(lambda line: not _is_rule(line), lines))
        raise InputError(f"{_readable(message, default, args)} (--help lists the options)") from None


class _HelpText(io.StringIO):
    """Takes a help text, with the encoding of standard output: by it is decided what the frames are drawn with."""

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return getattr(sys.__stdout__, "encoding", None) or "utf-8"


def _plain(text: str) -> str:
    """A help text without `None`, which stands for an option that is not given, in lines of the same width."""
    text = re.sub(r"\{None\}\|(\S+)", lambda shown: shown[1] + " " * len("{None}|"), text)
    text = re.sub(r"\{None,(.*?)( *│?)$", r"{\1     \2", text, flags=re.MULTILINE)
    # The words may stand in two lines of a box.
    text = re.sub(r"\(default: (None|'')?\)", lambda shown: " " * len(shown[0]), text)
    return re.sub(
        r"\(default:( *│\n│ *)(None|'')?\)", lambda shown: " " * 9 + shown[1] + " " * (len(shown[2] or "") + 1), text
    )


def _with_others_hidden(default: Config, shown: Collection[str]) -> Config:
    """The same config, of a class whose help explains these fields alone."""
    hints = get_type_hints(type(default), include_extras=True)
    fields = [
        (name, Annotated[hints[name], tyro.conf.Suppress], dataclasses.field(default=None))
        for name in vars(default)
        if name not in shown
    ]
    options = dataclasses.make_dataclass(type(default).__name__, fields, bases=(type(default),), frozen=True)
    options.__doc__ = type(default).__doc__
    return cast(Config, options(**vars(default)))


def _readable(message: str, default: object, args: Sequence[str]) -> str:
    """tyro's message about the arguments, with options in the place of fields, and choices in their order."""
    if section := re.match(r"Error parsing ([^-:][^:]*): ", message):
        settings = getattr(default, section[1].replace("-", "_"), None) or default
        return with_flags(message[section.end() :], f"{section[1]}.", vars(settings))
    if missing := re.match(r"Missing value for argument '(--[\w.-]+)'", message):
        following = [value for option, value in itertools.pairwise(args) if option == missing[1]]
        if following and following[0].startswith("-"):
            given = f"{missing[1]}={shlex.quote(following[0])}"
            return f"{message} A value that begins with a dash is given as {given}"
    if choices := re.search(r"Expected one of \((.*)\)", message):
        names = {name.strip("'") for name in choices[1].split(", ")} - {"None"}
        order = next((order for order in _orders(type(default)) if set(order) == names), tuple(sorted(names)))
        return message[: choices.start()] + f"Expected one of {', '.join(order)}"
    return message


def _orders(hint: Any) -> Iterator[tuple[str, ...]]:
    """The choices in a type, or in those of a dataclass's fields, in the order in which they were written."""
    if dataclasses.is_dataclass(hint):
        for part in get_type_hints(hint).values():
            yield from _orders(part)
    elif get_origin(hint) is Literal:
        yield tuple(map(str, get_args(hint)))
    else:
        for part in get_args(hint):
            yield from _orders(part)


def with_flags(message: str, prefix: str, settings: Iterable[str]) -> str:
    """A message of a dataclass's own checks, in which its settings are called as the options of a command are.

    Args:
        prefix: what stands before the names of these settings in options, such as "optimizer.".
        settings: the names of the settings.
    """
    for name in sorted(settings, key=len, reverse=True):
        message = re.sub(rf"(?<![\w.-]){name}(?![\w-])", f"--{prefix}{name.replace('_', '-')}", message)
    return message


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


def choices(text: str, registry: Mapping[str, object], metavar: str | None = None) -> Any:
    """The help of an option that takes names from a registry: a text, then a line for each name.

    What a name stands for is the first sentence of its entry's docstring, or the entry's `summary` if it has one.
    """
    lines = [f"{name}: {getattr(entry, 'summary', None) or _first_sentence(entry)}" for name, entry in registry.items()]
    return tyro.conf.arg(help="\n".join([text, *lines]), metavar=metavar)


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


@contextlib.contextmanager
def result_alone(result: Output | None) -> Iterator[None]:
    """Within the block, what is printed goes to standard error if a result is to stand on standard output alone."""
    if result is None or not result.is_standard_output:
        yield
        return
    with contextlib.redirect_stdout(sys.stderr):
        yield


@contextlib.contextmanager
def numerics_of_commands() -> Iterator[None]:
    """Turn off Pyro's validation and its warnings of values that are not finite: such steps are skipped and counted."""
    with pyro.validation_enabled(False), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Encountered NaN")
        yield


def print_parts(name: str, parts: Mapping[str, str]) -> None:
    """Say which parts a corpus has, and what became of each."""
    print(f"corpus {name}:", flush=True)
    width = max(map(len, parts), default=0)
    for part, text in parts.items():
        print(f"  {part:{width}}  {text}", flush=True)


def pick_device(name: str) -> torch.device:
    """The device of that name; auto is cuda where there is one.

    Raises:
        InputError: if it is cuda and there is none.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: there is no CUDA device here; use --device cpu")
    return torch.device("cuda" if name == "auto" and torch.cuda.is_available() else name.replace("auto", "cpu"))


def has_bfloat16() -> bool:
    """Whether the processor has instructions for products in bfloat16, as far as torch can tell."""
    # Earlier versions of torch have no such function; what it says of other architectures has other names.
    of_processor: dict[str, object] = getattr(torch.cpu, "get_capabilities", dict)()
    return of_processor.get("architecture") != "x86_64" or bool(
        of_processor.get("avx512_bf16") or of_processor.get("amx_bf16")
    )


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

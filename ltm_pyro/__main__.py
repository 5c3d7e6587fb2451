"""List the commands, or run one: python -m ltm_pyro [COMMAND ...], which is installed as `ltm` too."""

from __future__ import annotations

import ast
import importlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from ltm_pyro import cli
from ltm_pyro.errors import InputError

COMMANDS = {
    "train": "ltm_pyro.train",
    "evaluate": "ltm_pyro.evaluate",
    "generate": "ltm_pyro.generate",
    "compare": "ltm_pyro.compare",
    "report": "ltm_pyro.report",
    "tasks": "ltm_pyro.tasks.__main__",
    "prepare": "ltm_pyro.prepare",
    "export": "ltm_pyro.export",
}
"""The module of each command, which has a function `main` from its arguments to an exit status."""


def dispatch(args: Sequence[str]) -> int:
    """Run the command that the first argument names with the others, and return its exit status.

    Raises:
        InputError: if there is no command of that name, or as the command says.
    """
    if not args or args[0] in ("-h", "--help"):
        print(listing())
        return 0
    if args[0] == "--version":
        print(f"ltm_pyro {cli.__version__}")
        return 0
    name, *rest = args
    if name not in COMMANDS:
        raise InputError(f"there is no command {name!r}; choose from {', '.join(COMMANDS)}")
    status: int = importlib.import_module(COMMANDS[name]).main(rest)
    return status


def listing() -> str:
    """A line for each command: its name, and what the first line of its module's docstring says that it is."""
    width = max(map(len, COMMANDS))
    texts = {name: _first_line(module).partition(": python -m")[0] for name, module in COMMANDS.items()}
    lines = [f"  {name:{width}}  {text}" for name, text in texts.items()]
    return "\n".join(["The commands of ltm_pyro (each explains its options with --help):", "", *lines])


def _first_line(module: str) -> str:
    """The first line of a module's docstring, read without importing the module."""
    path = Path(__file__).parents[1].joinpath(*module.split(".")).with_suffix(".py")
    return (ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").partition("\n")[0]


def main() -> NoReturn:
    """Run a command with the arguments of this process, and exit with its status."""
    cli.run(dispatch, sys.argv[1:])


if __name__ == "__main__":
    main()

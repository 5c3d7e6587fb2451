"""Export the trained model of a run into a new folder: python -m ltm_pyro.export RUN --out FOLDER"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import tyro

from ltm_pyro import cli
from ltm_pyro.errors import InputError
from ltm_pyro.runs.pretrained import save_pretrained


@dataclass(frozen=True)
class ExportConfig:
    """Write the weights, settings and model card of a run into a new folder."""

    run: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")] = ""
    """The folder of the run."""
    out: str = ""
    """A new folder for weights, settings and model card."""
    which: str = "newest"
    """Checkpoint of a run: newest, best (by the validations in training), or the number of a step."""


def parse(args: Sequence[str]) -> ExportConfig:
    """The settings.

    Raises:
        InputError: if they cannot be used.
    """
    config = cli.parse(ExportConfig(), args, "export")
    if not config.run:
        raise InputError("give RUN, the folder of a run")
    if not config.out:
        raise InputError("give --out FOLDER, a new folder for the model")
    return config


def main(args: Sequence[str]) -> int:
    config = parse(args)
    save_pretrained(config.run, config.out, config.which)
    print(
        f"{config.out}: weights, settings and model card of {config.run}; ltm_pyro.from_pretrained({config.out!r}) "
        "loads the model"
    )
    return 0


if __name__ == "__main__":
    cli.run(main, sys.argv[1:])

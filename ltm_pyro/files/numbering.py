"""Names that are not taken yet: NAME, NAME-2, NAME-3, …"""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Iterator
from pathlib import Path

from ltm_pyro.errors import InputError


def free_path(folder: Path, stem: str, extension: str = "") -> Path:
    """The first of STEM, STEM-2, … with this extension that does not exist in the folder."""
    return next(path for path in _numbered(folder, stem, extension) if not path.exists())


def create_folder(out: str | None, parent: Path, default_name: str) -> Path:
    """Make a folder for results: `out`, or the first free one of PARENT/NAME, PARENT/NAME-2, …

    Raises:
        InputError: if it cannot be made or written to.
    """
    try:
        path = _create_free(parent, default_name) if out is None else Path(out)
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise InputError(f"the folder for the results cannot be used: {error}; choose another with --out") from None
    return path


def _create_free(parent: Path, name: str) -> Path:
    parent.mkdir(exist_ok=True)
    for path in _numbered(parent, name):
        try:
            path.mkdir()
        except FileExistsError:  # perhaps made by another process a moment ago
            continue
        return path
    raise AssertionError("there is always a next number")


def _numbered(folder: Path, stem: str, extension: str = "") -> Iterator[Path]:
    for number in itertools.count(1):
        yield folder / f"{stem}{'' if number == 1 else f'-{number}'}{extension}"

"""Files and folders that stand whole or not at all, whenever a crash, a power cut or a full disk comes.

What is being written lies beside its place under a hidden name, `.NAME.partial`, and is renamed once it is on the disk.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from ltm_pyro.errors import WriteError


def write(path: Path, content: bytes) -> None:
    """Write a file, in place of one that may be there.

    Raises:
        WriteError: if it cannot be written; what was there before is there still.
    """
    partial = _partial(path)
    with _write_errors(path, partial):
        with partial.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
        sync_folder(path.parent)


def append(path: Path, content: bytes) -> None:
    """Add to the end of a file. This alone is not done whole or not at all: a crash may leave a part of it.

    Raises:
        WriteError: if it cannot be written.
    """
    is_new = not path.exists()
    with _write_errors(path):
        with path.open("ab") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        if is_new:
            sync_folder(path.parent)


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A folder to write into, which takes its place at the end of the block; with an error in the block, it goes.

    Raises:
        WriteError: if it cannot be made.
    """
    partial = _partial(path)
    with _write_errors(path, partial):
        _discard(partial)
        partial.mkdir(parents=True)
        yield partial
        sync_folder(partial)
        os.rename(partial, path)
        sync_folder(path.parent)


def remove_folder(path: Path) -> None:
    """Remove a folder, at no moment of which a half of it stands in its place.

    Raises:
        WriteError: if it cannot be removed.
    """
    partial = _partial(path)
    with _write_errors(path):
        _discard(partial)
        os.rename(path, partial)
        shutil.rmtree(partial)


def remove_leftovers(folder: Path) -> None:
    """Remove what a crash has left half written anywhere in the folder.

    Raises:
        WriteError: if it cannot be removed.
    """
    with _write_errors(folder):
        for partial in [*folder.rglob(".*.partial")]:
            _discard(partial)


def sync_folder(path: Path) -> None:
    """Have the disk hold which files a folder has."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _partial(path: Path) -> Path:
    return path.with_name(f".{path.name}.partial")


def _discard(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@contextlib.contextmanager
def _write_errors(path: Path, partial: Path | None = None) -> Iterator[None]:
    try:
        yield
    except BaseException as error:
        if partial is not None:
            with contextlib.suppress(OSError):  # the error that is reported is the first
                _discard(partial)  # on a full disk it is in the way of what is to go on
        if isinstance(error, OSError):
            raise WriteError(f"{path} cannot be written: {error.strerror or error}") from None
        raise

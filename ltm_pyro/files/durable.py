"""Files and folders that exist whole or not at all, even after a crash, a power cut or a full disk.

While it is written, NAME has the hidden name `.NAME.partial` in the same folder; it is renamed once it is on the disk.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from ltm_pyro.errors import WriteError


def write(path: Path, content: bytes) -> None:
    """Write a file, and replace it if it exists.

    Raises:
        WriteError: if it cannot be written; an existing file is then unchanged.
    """
    partial = partial_of(path)
    with _write_errors(path, partial):
        with partial.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
        sync_folder(path.parent)


def append(path: Path, content: bytes) -> None:
    """Add to the end of a file. Unlike the other functions here, this may leave a part of the content after a crash.

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
    """A folder to write into, which gets its name at the end of the block; it is removed if the block raises an error.

    Raises:
        WriteError: if it cannot be made.
    """
    partial = partial_of(path)
    with _write_errors(path, partial):
        _discard(partial)
        partial.mkdir(parents=True)
        yield partial
        sync_folder(partial)
        os.rename(partial, path)
        sync_folder(path.parent)


def remove_folder(path: Path) -> None:
    """Remove a folder. At no moment does a part of it exist under its name.

    Raises:
        WriteError: if it cannot be removed.
    """
    partial = partial_of(path)
    with _write_errors(path):
        _discard(partial)
        os.rename(path, partial)
        shutil.rmtree(partial)


def remove_leftovers(folder: Path) -> None:
    """Remove the half-written files and folders that a crash has left anywhere in the folder.

    Raises:
        WriteError: if it cannot be removed.
    """
    with _write_errors(folder):
        for partial in [*folder.rglob(".*.partial")]:
            _discard(partial)


def sync_folder(path: Path) -> None:
    """Write the list of a folder's files to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def partial_of(path: Path) -> Path:
    """Where a file or a folder is written before it gets its name."""
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
            with contextlib.suppress(OSError):  # only the first error is reported
                _discard(partial)  # frees space on a full disk
        if isinstance(error, OSError):
            raise WriteError(f"{path} cannot be written: {error.strerror or error}") from None
        raise

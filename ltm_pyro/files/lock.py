"""One process at a time in a folder that is being written."""

from __future__ import annotations

import contextlib
import fcntl
from collections.abc import Iterator
from pathlib import Path

from ltm_pyro.errors import InputError

LOCK = ".lock"


@contextlib.contextmanager
def locked(folder: Path, doing: str = "training this run") -> Iterator[None]:
    """Within the block, no other process gets the lock of this folder.

    The lock is the system's, on the file `.lock`. The system releases it when the process ends, however it ends; the
    file stays and is always empty.

    Args:
        doing: what the other process is doing, for the error.

    Raises:
        InputError: if another process has it.
    """
    with (folder / LOCK).open("a") as file:
        try:
            # Not `flock`: processes that this one starts share such a lock, and hold it as long as one of them lives.
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            raise InputError(f"{folder} is in use: another process is {doing}; wait for it or stop it first") from None
        yield

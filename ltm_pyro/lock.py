"""One process at a time in the folder of a run."""

from __future__ import annotations

import contextlib
import fcntl
from collections.abc import Iterator
from pathlib import Path

from ltm_pyro.errors import InputError


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Within the block, no other process gets the lock of this folder.

    The system holds it, on the file `.lock`, and drops it when the process ends, however it ends: the file stays, and
    says nothing.

    Raises:
        InputError: if another process has it.
    """
    with (folder / ".lock").open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(
                f"{folder} is in use: another process is training this run; wait for it or stop it first"
            ) from None
        yield

"""Writing files so that a crash leaves the old contents or the new ones, and nothing between."""

from __future__ import annotations

import os
from pathlib import Path


def sync(path: Path) -> None:
    """Have the disk hold what was written to a file or, of a folder, which files it has."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def replace(path: Path, contents: bytes) -> None:
    """Write a whole file, in place of the one that may be there."""
    partial = path.with_name(f"{path.name}.partial")
    partial.write_bytes(contents)
    sync(partial)
    os.replace(partial, path)
    sync(path.parent)

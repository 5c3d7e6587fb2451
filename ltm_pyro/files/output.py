"""Where a command writes a result: a file, a device or a pipe, or `-` for standard output.

Everything is opened before the work that makes the result, so that nobody waits for hours for a result that has no
place. What cannot be known before the end, as that a disk has become full, still loses nothing: the result goes to
standard output then.
"""

from __future__ import annotations

import os
import stat
import sys
import tempfile
from pathlib import Path
from typing import BinaryIO

from ltm_pyro.errors import InputError, RunError, WriteError
from ltm_pyro.files import durable

STANDARD_OUTPUT = ("-", "/dev/stdout")
PROBE = bytes(2**16)
"""What is written to see whether there is room."""


class Output:
    """The place of one result. A file appears whole or not at all; a link is followed, and stays a link.

    Args:
        option: the option that the place was given by, for messages.
        path: the place.

    Raises:
        InputError: nothing can be written there.
    """

    def __init__(self, option: str, path: str) -> None:
        self.option, self.path = option, path
        self._stream: BinaryIO | None = None
        self._file: Path | None = None
        self._is_replaced = True
        self._standard_output = sys.stdout  # which may be another one while the work goes on
        if path in STANDARD_OUTPUT:
            return
        try:
            self._open(path)
        except InputError:
            raise
        except (OSError, ValueError) as error:  # a ValueError is that of a name with a null byte
            reason = getattr(error, "strerror", None) or error
            raise InputError(f"{option} {path!r} cannot be written: {reason}") from None

    @property
    def is_standard_output(self) -> bool:
        """Whether the result goes to standard output, where nothing else is to stand then."""
        return self._stream is None and self._file is None

    def _open(self, path: str) -> None:
        try:
            mode = os.stat(path).st_mode
        except FileNotFoundError:
            mode = None
        if mode is not None and stat.S_ISDIR(mode):
            raise InputError(f"{self.option} {path} is a folder: give a file")
        if mode is not None and not stat.S_ISREG(mode):
            self._stream = open(path, "wb", buffering=0)  # noqa: SIM115 - it is open until the end of the work
            return
        file = Path(os.path.realpath(path))
        if not file.parent.is_dir():
            raise InputError(f"{self.option} {path}: its folder does not exist")
        if mode is not None and not os.access(file, os.W_OK):
            raise InputError(f"{self.option} {path} cannot be written: it is read-only")
        self._file = file
        try:
            with tempfile.TemporaryFile(dir=file.parent) as probe:
                probe.write(PROBE)
                probe.flush()
        except PermissionError:
            if mode is None:
                raise
            self._is_replaced = False  # the file may be written, its folder may not

    def update(self, content: bytes) -> None:
        """Write what there is so far, where that can be replaced by more.

        Raises:
            WriteError: it cannot be written.
        """
        if self._file is not None and self._is_replaced:
            durable.write(self._file, content)

    def finish(self, content: bytes) -> None:
        """Write the result.

        Raises:
            RunError: it cannot be written; text has gone to standard output instead.
        """
        try:
            if self._stream is not None:
                with self._stream as stream:
                    _write_all(stream, content)
            elif self._file is None:
                self._standard_output.flush()
                self._standard_output.buffer.write(content)
                self._standard_output.flush()
            elif self._is_replaced:
                durable.write(self._file, content)
            else:
                self._file.write_bytes(content)
        except (OSError, WriteError) as error:
            if self.is_standard_output:
                raise
            reason = error.strerror if isinstance(error, OSError) and error.strerror else error
            is_text = b"\0" not in content
            if is_text:
                print(content.decode(errors="replace"), flush=True)
            where = "; the result stands above" if is_text else ""
            raise RunError(f"{self.option} {self.path} cannot be written: {reason}{where}") from None


def _write_all(stream: BinaryIO, content: bytes) -> None:
    view = memoryview(content)
    while view:
        view = view[stream.write(view) :]

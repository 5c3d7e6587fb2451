"""Stopping a long command cleanly on a signal."""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType
from typing import Any


class StopSignal:
    """Within its block, turns the first Ctrl-C or SIGTERM into a request to stop; a second one acts at once."""

    def __init__(self) -> None:
        self.received: int | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopSignal:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._previous[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.received = number
        self.__exit__()
        if sys.stderr.isatty():
            # Not `print`: the signal may have come in the middle of one.
            os.write(
                sys.stderr.fileno(),
                b"\nstopping after the current unit of work; a second Ctrl-C stops at once, without saving\n",
            )

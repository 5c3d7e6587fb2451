"""Stopping a long command cleanly on a signal, which may come from a terminal that is closed."""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType
from typing import Any


class StopSignal:
    """Within its block, turns the first Ctrl-C, SIGTERM or SIGHUP into a request to stop; a second one acts at once.

    A process that ignores SIGHUP, as `nohup` makes it, goes on doing so.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._previous: dict[int, Any] = {}
        self._terminals: list[int] = []

    def __enter__(self) -> StopSignal:
        self._terminals = [stream for stream in (1, 2) if os.isatty(stream)]
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
                self._previous[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.received = number
        self.__exit__()
        if number == signal.SIGHUP:
            # The terminal is gone, and to print to it would be an error, before the work is saved.
            nowhere = os.open(os.devnull, os.O_WRONLY)
            for stream in self._terminals:
                os.dup2(nowhere, stream)
            os.close(nowhere)
        elif sys.stderr.isatty():
            # Not `print`: the signal may have come in the middle of one.
            os.write(
                sys.stderr.fileno(),
                b"\nstopping after the current unit of work; a second Ctrl-C stops at once, without saving\n",
            )

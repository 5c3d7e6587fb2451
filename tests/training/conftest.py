"""Several processes on one machine."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, NoReturn

import pytest


class Forked(NamedTuple):
    """What came of one of several processes."""

    status: int
    out: str
    err: str


@pytest.fixture
def fork_two(tmp_path: Path) -> Callable[..., list[Forked]]:
    """Does something, given the rank, in two children of this process (or `size` of them) that are told what torchrun
    tells its own.

    Torchrun itself starts Python anew, and imports everything again, in each of them.
    """

    def run(action: Callable[[int], object], size: int = 2) -> list[Forked]:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        children = [os.fork() or work(rank, size, port, action) for rank in range(size)]
        deadline = time.monotonic() + 60
        statuses: dict[int, int] = {}
        while len(statuses) < size:
            for child in set(children) - statuses.keys():
                done, status = os.waitpid(child, os.WNOHANG)
                if done:
                    statuses[child] = os.waitstatus_to_exitcode(status)
                elif time.monotonic() > deadline:
                    os.kill(child, signal.SIGKILL)
            time.sleep(0.01)
        return [
            Forked(statuses[child], *((tmp_path / f"{stream}-{rank}").read_text() for stream in ("out", "err")))
            for rank, child in enumerate(children)
        ]

    def work(rank: int, size: int, port: int, action: Callable[[int], object]) -> NoReturn:
        status = 1
        try:
            os.chdir(tmp_path)
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size)}
            os.environ |= {"LOCAL_WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            with (
                open(f"out-{rank}", "w") as out,
                open(f"err-{rank}", "w") as err,
                contextlib.redirect_stdout(out),
                contextlib.redirect_stderr(err),
            ):
                try:
                    action(rank)
                    status = 0
                except SystemExit as exit:
                    status = exit.code
                except BaseException:
                    traceback.print_exc()
        finally:
            os._exit(status)

    return run

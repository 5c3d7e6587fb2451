"""What other programs do to the cores that a training uses.

The threads of an operation wait for each other. Where another program has one of their cores, all of them wait for the
thread that has none, and the training may be several times slower than with one thread (docs/speed.md).
"""

from __future__ import annotations

import os
import time
from pathlib import Path

SYSTEM = Path("/proc/stat")
LEAST = 0.5
"""The cores that other programs use on average, from which on a training is slowed."""


class LoadOfOthers:
    """The number of cores that other programs have used since this was made.

    Args:
        num_threads: of this program.
    """

    def __init__(self, num_threads: int) -> None:
        self.num_threads = num_threads
        self._started = time.perf_counter(), time.process_time(), busy_seconds()

    def hint(self) -> str | None:
        """What can be done about it; None where nothing need be, or where the system does not say what it does."""
        started, of_this, of_all = self._started
        now, seconds = busy_seconds(), time.perf_counter() - started
        if of_all is None or now is None or not seconds:
            return None
        others = (now - of_all - (time.process_time() - of_this)) / seconds
        num_cores = len(os.sched_getaffinity(0))
        if self.num_threads == 1 or others < LEAST or self.num_threads + others < num_cores + LEAST:
            return None
        return (
            f"other programs use {others:.1f} of {num_cores} cores, and the {self.num_threads} threads of this one "
            "wait for each other: with OMP_NUM_THREADS=1 before the command it may be faster"
        )


def busy_seconds() -> float | None:
    """The time that the cores this program may use have worked since the system started, for whatever program; None
    where the system does not say."""
    try:
        lines = SYSTEM.read_text().splitlines()
        cores = {f"cpu{core}" for core in os.sched_getaffinity(0)}
    except (OSError, AttributeError):
        return None
    # proc(5): user, nice, system, idle, iowait, irq, softirq, steal; what follows is part of user.
    rows = [[int(ticks) for ticks in line.split()[1:9]] for line in lines if line.split()[0] in cores]
    return sum(sum(row[:3]) + sum(row[5:7]) for row in rows) / os.sysconf("SC_CLK_TCK")

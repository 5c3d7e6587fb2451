"""What other programs do: when a training says so."""

from __future__ import annotations

import os
import time

import pytest

from ltm_pyro.training import load
from ltm_pyro.training.load import LoadOfOthers, busy_seconds

TICKS = os.sysconf("SC_CLK_TCK")


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """A machine of four cores, of which this program may use the first two; a function lets so many seconds pass."""
    now = {"wall": 0.0, "own": 0.0, "cores": [0.0, 0.0, 0.0, 0.0]}
    monkeypatch.setattr(load, "SYSTEM", tmp_path / "stat")
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1})
    monkeypatch.setattr(time, "perf_counter", lambda: now["wall"])
    monkeypatch.setattr(time, "process_time", lambda: now["own"])

    def write():
        # Idle, waiting for disks, and taken by the host of the machine: none of it is work of this machine's programs.
        idle = int(100 * now["wall"] * TICKS)
        ticks = [int(seconds * TICKS) for seconds in now["cores"]]
        rows = [f"cpu{core} {busy} 0 0 {idle} {idle} 0 0 {idle} {busy} 0" for core, busy in enumerate(ticks)]
        (tmp_path / "stat").write_text("\n".join(["cpu 1 2 3 4 5 6 7 8 9 10", *rows, "intr 5"]) + "\n")

    def passes(wall, own, *cores):
        now["wall"] += wall
        now["own"] += own
        now["cores"] = [before + more for before, more in zip(now["cores"], cores, strict=True)]
        write()

    write()
    return passes


@pytest.mark.parametrize(
    ("num_threads", "own", "cores", "others"),
    [
        (2, 20, (10, 10, 0, 0), None),  # nothing else runs
        (2, 12, (10, 10, 0, 0), "0.8 of 2"),
        (2, 12, (10, 10, 10, 10), "0.8 of 2"),  # what runs on cores of others is no matter
        (2, 16, (10, 10, 0, 0), None),  # less than half a core
        (1, 10, (10, 10, 0, 0), None),  # one thread waits for no other
        (4, 20, (10, 10, 0, 0), None),  # more threads than cores wait for each other
    ],
)
def test_it_says_so_where_others_take_a_core_that_a_thread_needs(machine, num_threads, own, cores, others):
    watch = LoadOfOthers(num_threads)
    machine(10, own, *cores)
    hint = watch.hint()
    assert (hint is None) == (others is None)
    assert hint is None or f"other programs use {others} cores" in hint


def test_a_core_that_no_thread_needs_is_free_for_others(machine, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 2, 3})
    watch = LoadOfOthers(2)
    machine(10, 20, 10, 10, 10, 0)
    assert watch.hint() is None
    watch = LoadOfOthers(4)
    machine(10, 30, 10, 10, 10, 10)
    assert "other programs use 1.0 of 4 cores" in watch.hint()


def test_a_system_that_does_not_say_is_not_asked_again(monkeypatch, tmp_path):
    monkeypatch.setattr(load, "SYSTEM", tmp_path / "nothing")
    assert busy_seconds() is None
    assert LoadOfOthers(2).hint() is None


def test_the_time_of_this_machine_goes_on():
    before = busy_seconds()
    if before is None:
        pytest.skip("this system does not say what its cores do")
    started = time.process_time()
    while time.process_time() - started < 0.3:
        pass
    assert busy_seconds() - before > 0.2

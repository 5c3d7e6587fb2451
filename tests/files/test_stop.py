from __future__ import annotations

import os
import pty
import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest

from ltm_pyro.files.stop import StopSignal


@pytest.fixture
def terminated() -> Iterator[list[int]]:
    """The signals that reach the handler of SIGTERM that the process had before."""
    reached: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: reached.append(number))
    yield reached
    signal.signal(signal.SIGTERM, before)


@pytest.fixture
def python_default() -> Iterator[None]:
    """Ctrl-C as Python has it; a shell starts what runs in its background with Ctrl-C ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_the_first_signal_is_a_request_and_the_second_acts_as_before(terminated):
    with StopSignal() as stop:
        assert stop.received is None
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.received == signal.SIGTERM
        assert terminated == []
        os.kill(os.getpid(), signal.SIGTERM)
        assert terminated == [signal.SIGTERM]


def test_a_second_ctrl_c_interrupts_at_once(python_default):
    with StopSignal() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.received == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_behind_its_block_signals_act_as_before(terminated):
    with StopSignal() as stop:
        pass
    os.kill(os.getpid(), signal.SIGTERM)
    assert stop.received is None
    assert terminated == [signal.SIGTERM]


def test_an_error_in_the_block_comes_out_and_leaves_signals_as_before(terminated):
    with pytest.raises(ZeroDivisionError), StopSignal():
        raise ZeroDivisionError
    os.kill(os.getpid(), signal.SIGTERM)
    assert terminated == [signal.SIGTERM]


@pytest.fixture
def hung_up() -> Iterator[list[int]]:
    """The signals that reach the handler of SIGHUP that the process had before."""
    reached: list[int] = []
    before = signal.signal(signal.SIGHUP, lambda number, frame: reached.append(number))
    yield reached
    signal.signal(signal.SIGHUP, before)


def test_a_hangup_is_a_request_as_well(hung_up):
    with StopSignal() as stop:
        os.kill(os.getpid(), signal.SIGHUP)
        assert stop.received == signal.SIGHUP
        assert hung_up == []


def test_a_hangup_that_is_ignored_stays_so(hung_up):
    """As under nohup."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with StopSignal() as stop:
        os.kill(os.getpid(), signal.SIGHUP)
        assert stop.received is None
    assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN


WORK = """
import os, sys, time
from ltm_pyro.files.stop import StopSignal

with StopSignal() as stop:
    print("ready", flush=True)
    while stop.received is None:
        time.sleep(0.01)
    time.sleep(0.1)
    print("after the terminal was closed", flush=True)
    print("here too", file=sys.stderr, flush=True)
    open("saved", "w").close()
sys.exit(128 + stop.received)
"""


def test_a_closed_terminal_loses_no_work(tmp_path):
    """What is printed after that goes nowhere, where a terminal that is gone would make it an error."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", WORK], stdin=theirs, stdout=theirs, stderr=theirs, cwd=tmp_path, start_new_session=True
    )
    os.close(theirs)
    assert b"ready" in os.read(ours, 100)
    os.close(ours)
    # The kernel sends it to those whose terminal this is; here the test does.
    process.send_signal(signal.SIGHUP)
    assert process.wait(60) == 128 + signal.SIGHUP
    assert (tmp_path / "saved").exists()

from __future__ import annotations

import os
import signal
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

"""One process at a time: a folder is refused while another process lives that has it, and free when that is dead."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from ltm_pyro.errors import InputError
from ltm_pyro.files.lock import locked

# From Python 3.12, where the test runner has threads; the child does nothing with them.
pytestmark = pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")


def is_free_for_another_process(folder: Path) -> bool:
    child = os.fork()
    if child == 0:
        status = 2
        try:
            with locked(folder):
                status = 0
        except InputError:
            status = 1
        finally:
            os._exit(status)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status in (0, 1)
    return status == 0


def test_within_the_block_and_only_there_another_process_is_refused(tmp_path):
    assert is_free_for_another_process(tmp_path)
    with locked(tmp_path):
        assert not is_free_for_another_process(tmp_path)
    assert is_free_for_another_process(tmp_path)
    with pytest.raises(ZeroDivisionError), locked(tmp_path):
        raise ZeroDivisionError
    assert is_free_for_another_process(tmp_path)


def test_a_process_that_is_killed_leaves_the_folder_free(tmp_path):
    has_lock, tell = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            with locked(tmp_path):
                os.write(tell, b"!")
                signal.pause()
        finally:
            os._exit(1)
    try:
        assert os.read(has_lock, 1) == b"!"
        with pytest.raises(InputError, match="is in use: another process is training this run"), locked(tmp_path):
            pass
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(has_lock)
        os.close(tell)
    with locked(tmp_path):
        assert (tmp_path / ".lock").exists()


def test_folders_do_not_share_a_lock(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    with locked(tmp_path / "a"):
        assert is_free_for_another_process(tmp_path / "b")

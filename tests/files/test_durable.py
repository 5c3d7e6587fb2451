"""Files and folders that stand whole or not at all: killed before any of its operations, none leaves a half."""

from __future__ import annotations

import itertools
import os
import stat
from pathlib import Path

import pytest

from ltm_pyro.errors import WriteError
from ltm_pyro.files import durable

OLD, NEW = b"old" * 1000, b"new" * 5000
# From Python 3.12, where the test runner has threads; the child does nothing with them.
pytestmark = pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def write_folder(path: Path) -> None:
    with durable.new_folder(path) as partial:
        for name in ("a", "b"):
            durable.write(partial / name, NEW)


def test_a_file_is_the_old_or_the_new_one_whenever_its_writer_dies(tmp_path, dies_before):
    seen = []
    for number in itertools.count():
        durable.write(tmp_path / "file", OLD)
        died = dies_before(number, lambda: durable.write(tmp_path / "file", NEW))
        durable.remove_leftovers(tmp_path)
        seen.append(contents(tmp_path))
        if not died:
            break
    assert seen[0] == {"file": OLD}
    assert seen[-1] == {"file": NEW}
    assert len(seen) > 2
    assert all(each in (seen[0], seen[-1]) for each in seen)


def test_a_new_folder_is_there_whole_or_not_at_all_whenever_its_writer_dies(tmp_path, dies_before):
    seen = []
    for number in itertools.count():
        died = dies_before(number, lambda: write_folder(tmp_path / "folder"))
        durable.remove_leftovers(tmp_path)
        seen.append(contents(tmp_path))
        if not died:
            break
        if (tmp_path / "folder").exists():
            durable.remove_folder(tmp_path / "folder")
    assert seen[0] == {}
    assert seen[-1] == {"folder/a": NEW, "folder/b": NEW}
    assert len(seen) > 6
    assert all(each in (seen[0], seen[-1]) for each in seen)


def test_a_folder_is_there_whole_or_not_at_all_whenever_its_remover_dies(tmp_path, dies_before):
    seen = []
    for number in itertools.count():
        if not (tmp_path / "folder").exists():
            write_folder(tmp_path / "folder")
        died = dies_before(number, lambda: durable.remove_folder(tmp_path / "folder"))
        seen.append(contents(tmp_path / "folder"))
        durable.remove_leftovers(tmp_path)
        if not died:
            break
    assert seen[0] == {"a": NEW, "b": NEW}
    assert seen[-1] == {}
    assert len(seen) > 3
    assert all(each in (seen[0], seen[-1]) for each in seen)
    assert list(tmp_path.iterdir()) == []


def test_a_leftover_is_not_in_the_way(tmp_path, dies_before):
    for number in (3, 6):
        assert dies_before(number, lambda: write_folder(tmp_path / "folder"))
        assert any(tmp_path.glob(".*.partial"))
    write_folder(tmp_path / "folder")
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_on_a_full_disk_the_old_file_stays_and_nothing_else(tmp_path, full_beyond):
    durable.write(tmp_path / "file", OLD)
    with full_beyond(len(OLD)), pytest.raises(WriteError, match=r"/file cannot be written: File too large"):
        durable.write(tmp_path / "file", NEW)
    with full_beyond(len(OLD)), pytest.raises(WriteError, match=r"/\.folder\.partial/a cannot be written"):
        write_folder(tmp_path / "folder")
    with pytest.raises(WriteError, match="cannot be written: No space left on device"):
        durable.append(Path("/dev/full"), NEW)
    assert contents(tmp_path) == {"file": OLD}
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_where_nothing_may_be_written_it_says_which_file(tmp_path):
    with pytest.raises(WriteError, match=r"missing/file cannot be written: No such file"):
        durable.write(tmp_path / "missing/file", NEW)
    with pytest.raises(WriteError, match=r"missing cannot be written: No such file"):
        durable.remove_folder(tmp_path / "missing")


def test_an_error_in_the_block_leaves_no_folder(tmp_path):
    def begin() -> None:
        with durable.new_folder(tmp_path / "folder") as partial:
            durable.write(partial / "a", NEW)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        begin()
    assert list(tmp_path.iterdir()) == []


def test_what_is_renamed_is_on_the_disk_and_then_so_is_its_name(tmp_path, monkeypatch):
    """After a power cut, a name must not stand for content that had not reached the disk."""
    order = []
    fsync = os.fsync

    def recorded_fsync(descriptor: int) -> None:
        order.append("folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "file")
        fsync(descriptor)

    def recorded(rename):
        def renamed(*args):
            order.append("rename")
            rename(*args)

        return renamed

    monkeypatch.setattr(os, "fsync", recorded_fsync)
    for name in ("rename", "replace"):
        monkeypatch.setattr(os, name, recorded(getattr(os, name)))
    durable.write(tmp_path / "file", NEW)
    assert order == ["file", "rename", "folder"]
    order.clear()
    with durable.new_folder(tmp_path / "folder") as partial:
        (partial / "a").write_bytes(NEW)
    assert order == ["folder", "rename", "folder"]
    order.clear()
    durable.append(tmp_path / "file", NEW)
    assert order == ["file"]

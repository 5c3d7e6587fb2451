"""Where results go: whatever is there already stays what it is, and no result is lost for want of a place."""

import os
import threading

import pytest

from ltm_pyro.errors import InputError, RunError
from ltm_pyro.files.output import PROBE, Output

CONTENT = b'{"figure": 1}\n' * 10_000


def test_a_file_is_replaced_as_a_whole(tmp_path):
    path = tmp_path / "x.json"
    path.write_bytes(b"before")
    output = Output("--json", str(path))
    assert path.read_bytes() == b"before"
    output.update(b"a part")
    assert path.read_bytes() == b"a part"
    output.finish(CONTENT)
    assert path.read_bytes() == CONTENT
    assert [each.name for each in tmp_path.iterdir()] == ["x.json"]


@pytest.mark.parametrize("exists", [True, False])
def test_a_link_stays_a_link(tmp_path, exists):
    target = tmp_path / "elsewhere" / "x.json"
    target.parent.mkdir()
    if exists:
        target.write_bytes(b"before")
    (tmp_path / "link").symlink_to(target)
    Output("--json", str(tmp_path / "link")).finish(CONTENT)
    assert (tmp_path / "link").is_symlink()
    assert target.read_bytes() == CONTENT


def test_a_pipe_is_written_through(tmp_path):
    path = tmp_path / "pipe"
    os.mkfifo(path)
    received = []
    reader = threading.Thread(target=lambda: received.append(path.read_bytes()))
    reader.start()
    output = Output("--json", str(path))
    output.update(b"a part, which cannot be taken back")
    output.finish(CONTENT)
    reader.join()
    assert received == [CONTENT]
    assert path.is_fifo()


def test_a_device_stays_a_device(tmp_path):
    Output("--json", "/dev/null").finish(CONTENT)
    assert not os.path.isfile("/dev/null")


def test_a_descriptor_of_the_shell(tmp_path):
    """As `--json >(jq .)` gives one."""
    read, write = os.pipe()
    received = []

    def take() -> None:
        with open(read, "rb") as file:
            received.append(file.read())

    reader = threading.Thread(target=take)
    reader.start()
    output = Output("--json", f"/dev/fd/{write}")
    os.close(write)
    output.finish(CONTENT)
    reader.join()
    assert received == [CONTENT]


@pytest.mark.parametrize("path", ["-", "/dev/stdout"])
def test_standard_output(path, capfdbinary):
    output = Output("--json", path)
    assert output.is_standard_output
    output.update(b"a part")
    output.finish(CONTENT)
    assert capfdbinary.readouterr().out == CONTENT


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("missing/x.json", "its folder does not exist"),
        ("file/x.json", "cannot be written"),
        (".", "is a folder"),
        ("loop", "cannot be written"),
        ("x" * 300, "cannot be written"),
        ("\0", "cannot be written"),
        ("/proc/x.json", "cannot be written"),
    ],
)
def test_what_cannot_be_written_is_refused_before_the_work(path, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(InputError, match=f"--json .*{message}") as error:
        Output("--json", path)
    assert "\n" not in str(error.value)


def test_a_full_disk_is_found_before_the_work(tmp_path, full_beyond):
    with full_beyond(len(PROBE) - 1), pytest.raises(InputError, match=r"--json .* cannot be written: File too large"):
        Output("--json", str(tmp_path / "x.json"))
    assert not list(tmp_path.iterdir())


def test_a_disk_that_becomes_full_loses_nothing(tmp_path, full_beyond, capsys):
    path = tmp_path / "x.json"
    path.write_bytes(b"before")
    output = Output("--json", str(path))
    with full_beyond(1000), pytest.raises(RunError, match=r"x\.json cannot be written: .*the result stands above"):
        output.finish(CONTENT)
    assert capsys.readouterr().out == CONTENT.decode() + "\n"
    assert path.read_bytes() == b"before"
    assert [each.name for each in tmp_path.iterdir()] == ["x.json"]


@pytest.mark.parametrize("lost", ["device", "pipe"])
def test_a_place_that_fails_at_the_end_loses_nothing(lost, tmp_path, capsys):
    if lost == "device":
        output = Output("--json", "/dev/full")
    else:
        read, write = os.pipe()
        output = Output("--json", f"/dev/fd/{write}")
        os.close(read)
        os.close(write)
    with pytest.raises(RunError, match="the result stands above"):
        output.finish(CONTENT)
    assert capsys.readouterr().out == CONTENT.decode() + "\n"

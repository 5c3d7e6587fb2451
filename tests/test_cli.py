"""The commands' messages: one line on standard error, and the exit status."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from ltm_pyro import cli
from ltm_pyro.config import preset
from ltm_pyro.errors import InputError, RunError, WriteError

UNKNOWN_OPTION = "Unrecognized options: --widht, 3 (--help lists the options)"
BAD_VALUE = "Error parsing --steps: invalid literal for int() with base 10: 'many' (--help lists the options)"


def message(*args: str) -> str:
    with pytest.raises(InputError) as error:
        cli.parse(preset("tiny"), args, "train")
    return str(error.value)


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (["--widht", "3"], UNKNOWN_OPTION),
        (["--steps", "many"], BAD_VALUE),
        (["--data"], "Missing value for argument '--data'. Expected 1 values. (--help lists the options)"),
        (
            ["--model.num-heads", "0"],
            "Error parsing model: num_heads must be at least 1, not 0 (--help lists the options)",
        ),
    ],
)
def test_a_message_says_what_is_wrong_and_nothing_else(args, expected):
    assert message(*args) == expected


@pytest.mark.parametrize(("args", "expected"), [(["--widht", "3"], UNKNOWN_OPTION), (["--steps", "many"], BAD_VALUE)])
def test_a_message_is_the_same_on_a_terminal_with_colours(args, expected, monkeypatch):
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert message(*args) == expected


def python(*args: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    return subprocess.run([sys.executable, *args], env=environment, capture_output=True, text=True)


def test_a_message_is_the_same_where_the_output_is_ascii():
    result = python("-m", "ltm_pyro.train", "--widht", "3")
    assert (result.returncode, result.stdout, result.stderr) == (2, "", f"error: {UNKNOWN_OPTION}\n")


def test_a_character_that_the_output_lacks_is_written_as_its_number():
    program = """
from ltm_pyro import cli, config
def main(args):
    print("caf\\xe9")
    cli.parse(config.preset("tiny"), args, "train")
cli.run(main, ["--steps", "many"])
"""
    result = python("-c", program)
    assert (result.returncode, result.stdout, result.stderr) == (2, "caf\\xe9\n", f"error: {BAD_VALUE}\n")


@pytest.mark.parametrize(
    ("error", "status", "expected"),
    [
        (InputError("two\nlines, and  spaces"), 2, "error: two lines, and spaces\n"),
        (OSError(28, "No space left on device", "run/metrics.jsonl"), 1, None),
        (WriteError("metrics.jsonl cannot be written"), 1, "error: metrics.jsonl cannot be written\n"),
        (RunError("it diverged"), 1, "error: it diverged\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
    ],
)
def test_an_error_is_one_line_and_a_status(error, status, expected, capsys):
    def main(args: object) -> int:
        raise error

    with pytest.raises(SystemExit) as exit:
        cli.run(main, [])
    out, err = capsys.readouterr()
    assert (exit.value.code, out) == (status, "")
    assert err == (expected or "error: [Errno 28] No space left on device: 'run/metrics.jsonl'\n")


def test_output_that_finds_no_room_is_one_line_too():
    """However much of it there was; /dev/full is a device on which nothing fits."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    for length in (1, 100_000):
        program = f"from ltm_pyro import cli\ncli.run(lambda args: print('x' * {length}) or 0, [])"
        with open("/dev/full", "w") as full:
            result = subprocess.run(
                [sys.executable, "-c", program], env=environment, stdout=full, stderr=subprocess.PIPE, text=True
            )
        assert (result.returncode, result.stderr) == (1, "error: [Errno 28] No space left on device\n")


def test_a_mistake_of_the_program_is_not_hidden():
    def main(args: object) -> int:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        cli.run(main, [])


@pytest.mark.parametrize("status", [0, 1, 143])
def test_the_exit_status_is_what_the_command_returns(status):
    with pytest.raises(SystemExit) as exit:
        cli.run(lambda args: status, [])
    assert exit.value.code == status


def test_arguments_change_the_settings_that_they_name_and_no_other():
    config = cli.parse(preset("small"), ["--vi.learning-rate", "0.25", "--steps", "7"], "train")
    assert (config.vi.learning_rate, config.steps) == (0.25, 7)
    assert cli.parse(preset("small"), ["--vi.learning-rate", str(preset("small").vi.learning_rate)], "train") == preset(
        "small"
    )

"""The commands' messages: one line on standard error, and the exit status."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import inspect
import itertools
import os
import re
import signal
import subprocess
import sys
import textwrap
import tomllib
from pathlib import Path
from typing import get_type_hints

import pytest

import ltm_pyro
from ltm_pyro import cli, compare, evaluate, generate, train
from ltm_pyro.compare import CompareConfig
from ltm_pyro.config import TrainConfig, preset
from ltm_pyro.errors import InputError, RunError, WriteError
from ltm_pyro.evaluate import EvaluateConfig
from ltm_pyro.export import ExportConfig
from ltm_pyro.generate import GenerateConfig
from ltm_pyro.inference import SCHEMES
from ltm_pyro.inference.objectives import OBJECTIVES
from ltm_pyro.inference.schemes.mala import MALA
from ltm_pyro.inference.schemes.vi import VI
from ltm_pyro.prepare import PrepareConfig
from ltm_pyro.report import ReportConfig
from ltm_pyro.train import parse_options

ROOT = Path(__file__).parents[1]
UNKNOWN_OPTION = "Unrecognized options: --widht, 3 (--help lists the options)"
BAD_VALUE = "Error parsing --steps: invalid literal for int() with base 10: 'many' (--help lists the options)"


def message(*args: str) -> str:
    with pytest.raises(InputError) as error:
        parse_options(preset("tiny"), args)
    return str(error.value)


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (["--widht", "3"], UNKNOWN_OPTION),
        (["--steps", "many"], BAD_VALUE),
        (["--data"], "Missing value for argument '--data'. Expected 1 values. (--help lists the options)"),
        (
            ["--model.num-heads", "0"],
            "--model.num-heads must be at least 1, not 0 (--help lists the options)",
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
from ltm_pyro import cli, config, train
def main(args):
    print("caf\\xe9")
    train.parse_options(config.preset("tiny"), args)
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


@pytest.mark.parametrize(
    "command",
    [
        "train",
        "",
        *(
            pytest.param(command, marks=pytest.mark.slow)
            for command in ("evaluate", "generate", "compare", "tasks gsm8k", "prepare", "export")
        ),
    ],
)
@pytest.mark.parametrize(
    "columns", [pytest.param(1, marks=pytest.mark.slow), 5, pytest.param(20, marks=pytest.mark.slow)]
)
def test_help_can_be_read_in_a_terminal_of_few_columns(command, columns):
    """With little memory: laid out in few columns, help once took all of it."""
    program = """
import resource, sys
from ltm_pyro.__main__ import main
import ltm_pyro.train, ltm_pyro.evaluate, ltm_pyro.tasks.__main__
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 2**29, used + 2**29))
main()
"""
    environment = {**os.environ, "COLUMNS": str(columns)}
    command_line = [sys.executable, "-c", program, *command.split(), "--help"]
    result = subprocess.run(command_line, env=environment, capture_output=True, text=True, timeout=120)
    assert (result.returncode, result.stderr) == (0, "")
    assert len(result.stdout) > 300
    boxed = {len(line) for line in result.stdout.splitlines() if line.startswith("│")}
    assert boxed == ({40} if command else set())


CLOSED = {"input": "<&-", "output": ">&-", "messages": "2>&-", "all": "<&- >&- 2>&-"}


def with_closed(stream: str, *args: str) -> subprocess.CompletedProcess[str]:
    command = ["sh", "-c", f'exec "$@" {CLOSED[stream]}', "sh", sys.executable, *args]
    return subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)


@pytest.mark.parametrize("stream", CLOSED)
def test_a_command_works_with_its_standard_streams_closed(stream, tmp_path):
    """What it writes to others arrives, and no file takes the place of a closed stream."""
    program = """
import os, sys
from ltm_pyro import cli

def main(args):
    with open("run.txt", "w") as file:
        assert file.fileno() > 2
        os.write(1, b"from a library\\n")
        os.write(2, b"a warning of a library\\n")
        print("the result")
        print("a message", file=sys.stderr)
        file.write(sys.stdin.read() + "what it made")
    return 0

cli.run(main, [])
"""
    (tmp_path / "program.py").write_text(program)
    command = ["sh", "-c", f'exec "$@" {CLOSED[stream]}', "sh", sys.executable, "program.py"]
    result = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 0
    assert result.stdout == ("" if stream in ("output", "all") else "from a library\nthe result\n")
    assert result.stderr == ("" if stream in ("messages", "all") else "a warning of a library\na message\n")
    assert (tmp_path / "run.txt").read_text() == "what it made"


@pytest.mark.parametrize(("stream", "message"), [("output", f"error: {UNKNOWN_OPTION}\n"), ("all", "")])
def test_a_mistake_has_its_status_with_streams_closed(stream, message):
    result = with_closed(stream, "-m", "ltm_pyro.train", "--widht", "3")
    assert (result.returncode, result.stdout, result.stderr) == (2, "", message)


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


@pytest.mark.parametrize("is_compiled", [True, False])
def test_a_flag_may_be_given_as_it_is_already(is_compiled):
    default = dataclasses.replace(preset("tiny"), compile=is_compiled)
    assert parse_options(default, ["--compile"]).compile
    assert not parse_options(default, ["--no-compile"]).compile
    with pytest.raises(InputError, match="compile"):
        parse_options(default, ["--compile", "--no-compile"])


def test_arguments_change_the_settings_that_they_name_and_no_other():
    small = preset("small")
    config = parse_options(small, ["--vi.learning-rate", "0.25", "--steps", "7"])
    assert config.schemes["vi"].learning_rate == 0.25
    assert config == dataclasses.replace(small, steps=7, schemes={**small.schemes, "vi": VI(learning_rate=0.25)})
    # What is hidden from the options is what it was.
    old = dataclasses.replace(small, schemes={**small.schemes, "mala": MALA(num_steps=3, num_kept=2, vi_steps=1)})
    assert parse_options(old, ["--vi.learning-rate", str(small.schemes["vi"].learning_rate)]) == old


@pytest.mark.parametrize("command", ["train", "evaluate", "generate", "compare", "tasks", "prepare", "export"])
def test_every_command_says_the_version_of_the_package(command, capsys):
    module = "ltm_pyro.tasks.__main__" if command == "tasks" else f"ltm_pyro.{command}"
    with pytest.raises(SystemExit) as exit:
        cli.run(importlib.import_module(module).main, ["--version"])
    assert (exit.value.code, *capsys.readouterr()) == (0, f"ltm_pyro {ltm_pyro.__version__}\n", "")


def test_the_version_is_the_one_that_is_packaged():
    """Without a build: the number that pyproject.toml says to take, from the file that it names."""
    root = Path(ltm_pyro.__file__).parents[1]
    settings = tomllib.loads((root / "pyproject.toml").read_text())
    assert "version" in settings["project"]["dynamic"]
    source = (root / settings["tool"]["hatch"]["version"]["path"]).read_text()
    assert re.findall(r'^__version__ = "(\d+\.\d+\.\d+)"$', source, re.MULTILINE) == [ltm_pyro.__version__]


def test_help_of_training_is_one_screen_and_the_rest_is_there_on_request(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    texts = {}
    for option in ("--help", "--help-all"):
        with pytest.raises(SystemExit) as exit:
            cli.run(train.main, [option])
        assert exit.value.code == 0
        texts[option] = capsys.readouterr().out
    assert len(texts["--help"].splitlines()) < 90
    assert "--help-all" in texts["--help"]
    assert "--model.width" in texts["--help-all"]
    assert "--model.width" not in texts["--help"]
    assert "--map.learning-rate" in texts["--help-all"]
    assert "--mala" not in texts["--help-all"]
    assert "None" not in texts["--help"]


@pytest.mark.parametrize(
    ("main", "rare"), [(evaluate.main, "num-chains"), (generate.main, "rethink"), (compare.main, "num-chains")]
)
def test_help_of_the_other_commands_is_short_too(main, rare, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    texts = {}
    for option in ("--help", "--help-all"):
        with pytest.raises(SystemExit):
            cli.run(main, ["--inference", "mala", option])
        texts[option] = capsys.readouterr().out
        assert "--mala.vi-rank" in texts[option]  # named, so its settings are shown
    assert "--help-all" in texts["--help"]
    assert f"--{rare}" not in texts["--help"]
    assert f"--{rare}" in texts["--help-all"]


def test_no_line_of_a_help_text_ends_within_a_sentence():
    """It would be wrapped once where it was written, and once more in the terminal."""
    options = [TrainConfig, EvaluateConfig, GenerateConfig, CompareConfig, PrepareConfig, ExportConfig, ReportConfig]
    seen = set()
    for cls in classes_of_options([*options, *SCHEMES.values(), *OBJECTIVES.values()]):
        seen.add(cls.__name__)
        for name, text in attribute_docstrings(cls):
            for line in text.splitlines()[:-1]:
                assert not line.strip() or line.rstrip()[-1] in ".:", f"{cls.__name__}.{name}: {line.strip()}"
    assert {"TrainConfig", "DecoderConfig", "MAP", "Chains", "Sampling", "EstimatorSettings"} <= seen


def classes_of_options(classes):
    """The dataclasses, those that they inherit from, and those of their fields."""
    found = []
    while classes:
        cls = classes.pop()
        if dataclasses.is_dataclass(cls) and cls not in found:
            found.append(cls)
            classes += [*cls.__mro__[1:], *get_type_hints(cls).values()]
    return found


def attribute_docstrings(cls):
    """The names of fields, and the texts that stand below them."""
    (definition,) = ast.parse(textwrap.dedent(inspect.getsource(cls))).body
    for field, below in itertools.pairwise(definition.body):
        if isinstance(field, ast.AnnAssign) and isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant):
            yield field.target.id, below.value.value


def test_what_help_does_not_show_is_an_option_all_the_same():
    assert parse_options(preset("tiny"), ["--model.width", "64"]).model.width == 64


@pytest.mark.parametrize(
    ("main", "args", "order"),
    [
        (train.main, ["--inference", "foo"], "map, vi, lowrank"),
        (evaluate.main, ["run", "--estimators", "foo"], "elbo, iwae, ais"),
        (generate.main, ["run", "--inference", "foo"], "map, vi, lowrank"),
        (train.main, ["--packing", "foo"], "document, stream"),
    ],
)
def test_choices_are_listed_in_their_order(main, args, order, run_main):
    status, _, err = run_main(main, *args)
    assert (status, err.count("\n")) == (2, 1)
    assert f"Expected one of {order}" in err
    assert "None" not in err


@pytest.mark.parametrize(
    ("args", "flag"),
    [
        (["--optimizer.learning-rate", "-1"], "--optimizer.learning-rate must be"),
        (["--model.width", "7"], "--model.width 7 must be a multiple of 2 x --model.num-heads"),
        (["--map.learning-rate", "0"], "--map.learning-rate must be"),
        (["--block-size", "0"], "--block-size must be"),
        (["--prompt", "-x"], "--prompt=-x"),
        (["--temperature", "-1"], "--temperature must be"),
        (["--top-k", "-1"], "--top-k must be"),
    ],
)
def test_messages_name_options_as_they_are_given(args, flag, run_main):
    status, _, err = (
        run_main(generate.main, "run", *args)
        if args[0] in ("--prompt", "--temperature", "--top-k")
        else run_main(train.main, *args)
    )
    assert (status, err.count("\n")) == (2, 1)
    assert flag in err


@pytest.mark.parametrize(
    ("args", "mentioned"),
    [
        (["--vi.stride", "2"], "--vi.stride is a setting of vi, which is not used"),
        (["--inference", "vi", "--map.learning-rate=1"], "--map.learning-rate is a setting of map"),
        (
            ["--inference=vi", "--infer-from=whole", "--block-size", "3"],
            "--block-size is a setting of --infer-from past",
        ),
        (["--inference", "none", "--hmc.num-leapfrogs", "3"], "hmc"),
    ],
)
def test_settings_of_what_is_not_used_are_refused(args, mentioned, run_main):
    status, _, err = run_main(train.main, *args)
    assert (status, err.count("\n")) == (2, 1)
    assert mentioned in err


@pytest.fixture
def slow_torch(tmp_path) -> dict[str, str]:
    """An environment in which Ctrl-C comes while torch is imported."""
    (tmp_path / "torch.py").write_text("import os, signal, time\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(60)\n")
    (tmp_path / "ltm").write_text("import sys\nfrom ltm_pyro.__main__ import main\nsys.exit(main())\n")
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}


@pytest.mark.parametrize(
    "module", ["", ".train", ".evaluate", ".generate", ".compare", ".prepare", ".tasks", ".export"]
)
def test_ctrl_c_while_a_command_is_imported_is_one_line(module, slow_torch):
    command = [sys.executable, "-m", f"ltm_pyro{module}", "--help"]
    result = subprocess.run(command, env=slow_torch, capture_output=True, text=True)
    assert (result.returncode, result.stdout, result.stderr) == (130, "", "interrupted\n")


def test_ctrl_c_while_the_installed_command_is_imported_is_one_line(slow_torch, tmp_path):
    result = subprocess.run([sys.executable, tmp_path / "ltm"], env=slow_torch, capture_output=True, text=True)
    assert (result.returncode, result.stdout, result.stderr) == (130, "", "interrupted\n")


def test_another_program_that_imports_the_package_keeps_pythons_way_with_ctrl_c(slow_torch):
    command = [sys.executable, "-c", "import ltm_pyro"]
    result = subprocess.run(command, env=slow_torch, capture_output=True, text=True)
    assert result.returncode == -signal.SIGINT
    assert result.stderr.startswith("Traceback")


def test_another_error_of_an_import_is_not_hidden(slow_torch, tmp_path):
    (tmp_path / "torch.py").write_text("raise ZeroDivisionError\n")
    command = [sys.executable, "-m", "ltm_pyro.train"]
    result = subprocess.run(command, env=slow_torch, capture_output=True, text=True)
    assert result.returncode == 1
    assert "ZeroDivisionError" in result.stderr

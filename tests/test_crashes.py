"""Training that is killed, or finds its disk full or its files damaged: it goes on as if nothing had been, or says why.

The oracle is a run that nothing happened to: the same weights and moments bit for bit, the same lines of metrics.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file

import ltm_pyro
from ltm_pyro import cli, train
from ltm_pyro.training import loop

MORE = (
    "--micro-batch-size 2 --fast-steps 2 --log-every 1 --validation-sequences 4 --validation-samples 4 --steps 28 "
    "--validate-every 6 --checkpoint-every 4 --num-checkpoints 3"
)
Command = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def small(tiny_options: list[str]) -> list[str]:
    """Options of a tiny model that is validated and saved often."""
    return [*tiny_options, *shlex.split(MORE)]


@pytest.fixture(scope="module")
def whole(small: list[str], write_text: Callable[[Path], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing happened to, beside its text."""
    folder = tmp_path_factory.mktemp("whole")
    text = write_text(folder / "text.txt")
    assert train.main([*small, "--data", str(text), "--out", str(folder / "run")]) == 0
    return folder / "run"


@pytest.fixture
def new_run(small: list[str], whole: Path) -> list[str]:
    """The arguments of a run like it."""
    return [*small, "--data", str(whole.parent / "text.txt")]


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """Runs the command in this process and in an empty folder: (exit status, standard output, standard error)."""
    monkeypatch.chdir(tmp_path)

    def run(*args: str) -> tuple[int, str, str]:
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit:
            cli.run(train.main, args)
        return exit.value.code, *capsys.readouterr()

    return run


def checkpoints(run: Path | str) -> list[Path]:
    return sorted(Path(run, "checkpoints").iterdir())


def steps_saved(run: Path | str) -> list[int]:
    return [int(path.name.removeprefix("step-")) for path in checkpoints(run)]


def lines(run: Path | str) -> list[dict]:
    """The lines of metrics, without what a clock says."""
    records = [json.loads(line) for line in Path(run, "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in record.items() if k not in ("seconds", "tokens_per_second")} for record in records]


def assert_as_if_nothing_had_happened(run: Path | str, whole: Path) -> None:
    assert steps_saved(run) == steps_saved(whole)
    for name in ("model.safetensors", "optimizer.safetensors"):
        assert (checkpoints(run)[-1] / name).read_bytes() == (checkpoints(whole)[-1] / name).read_bytes()
    assert lines(run) == lines(whole)
    best = [{path.parent.name: path.read_text() for path in Path(each).rglob("best.json")} for each in (run, whole)]
    assert best[0] == best[1]
    assert not [*Path(run).rglob(".*.partial")]


def flip_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize("damage", [flip_bit, cut_short])
@pytest.mark.parametrize("number", [1, 2])
def test_resume_goes_back_past_damaged_checkpoints_and_says_so(number, damage, command, whole):
    """Lines of metrics behind the step are dropped, as is one that is half written."""
    shutil.copytree(whole, "run")
    *_, before = checkpoints("run")[:-number]
    for path in checkpoints("run")[-number:]:
        damage(path / "model.safetensors")
    with open("run/metrics.jsonl", "a") as file:
        file.write('{"step": 28, "split": "tra')
    status, _, err = command("--out", "run", "--resume")
    assert status == 0
    assert len(err.splitlines()) == 1
    assert err.startswith("warning: run/checkpoints/step-00000028/model.safetensors is damaged: ")
    assert f"; going back to {before}" in err
    assert_as_if_nothing_had_happened("run", whole)


def test_where_no_checkpoint_can_be_read_that_is_one_line_and_nothing_is_touched(command, whole):
    shutil.copytree(whole, "run")
    for path in checkpoints("run"):
        flip_bit(path / "optimizer.safetensors")
    before = {path: path.read_bytes() for path in Path("run").rglob("*") if path.is_file()}
    status, out, err = command("--out", "run", "--resume")
    assert (status, out, len(err.splitlines())) == (2, "", 1)
    assert err.startswith("error: no checkpoint in run/checkpoints can be read: ")
    assert before == {path: path.read_bytes() for path in Path("run").rglob("*") if path.is_file()}


def test_a_damaged_checkpoint_is_not_evaluated(whole, tmp_path):
    shutil.copytree(whole, tmp_path / "run")
    flip_bit(checkpoints(tmp_path / "run")[-1] / "model.safetensors")
    with pytest.raises(ltm_pyro.InputError, match=r"step-00000028/model\.safetensors is damaged"):
        ltm_pyro.load(tmp_path / "run")


def test_the_best_checkpoint_by_validation_is_kept_with_its_figure_and_can_be_loaded(whole):
    validations = [record for record in lines(whole) if record["split"] == "validation"]
    assert [record["step"] for record in validations] == [6, 12, 18, 24]
    expected = min(validations, key=lambda record: record["nats_per_token"])
    (best,) = [path for path in checkpoints(whole) if (path / "best.json").exists()]
    assert best.name == f"step-{expected['step']:08d}"
    figure = json.loads((best / "best.json").read_text())
    assert figure.pop("best_by") == "nats_per_token"
    assert figure.pop("sequences") == "reserved"
    assert figure == {key: value for key, value in expected.items() if key != "tokens_seen"}
    assert steps_saved(whole) == sorted({expected["step"], 20, 24, 28})
    loaded = ltm_pyro.load(whole, which="best").model.state_dict()
    assert all(loaded[name].equal(weight) for name, weight in load_file(best / "model.safetensors").items())


def test_so_many_checkpoints_are_kept_as_asked_for(command, new_run):
    args = ("--out", "run", "--steps", "8", "--checkpoint-every", "2", "--validate-every", "100")
    assert command(*new_run, *args, "--num-checkpoints", "3")[0] == 0
    assert steps_saved("run") == [4, 6, 8]
    assert command("--out", "run", "--resume", "--num-checkpoints", "1")[0] == 0
    assert steps_saved("run") == [8]
    assert command(*new_run, "--out", "other", "--num-checkpoints", "0")[0] == 2


@pytest.mark.parametrize(("name", "call"), [("save", 1), ("save", 2), ("keep_if_best", 4), ("log", 2)])
def test_a_run_that_ends_between_a_checkpoint_its_figure_and_its_line_goes_on(
    name, call, command, new_run, whole, monkeypatch
):
    """By a second Ctrl-C, which saves nothing."""
    function, calls = getattr(loop, name), []

    def interrupted(*args: object) -> object:
        calls.append(args)
        if len(calls) == call:
            raise KeyboardInterrupt
        return function(*args)

    with monkeypatch.context() as patch:
        patch.setattr(loop, name, interrupted)
        status, _, err = command(*new_run, "--out", "run")
    assert (status, err) == (130, "interrupted\n")
    if (name, call) == ("save", 1):
        status, _, err = command("--out", "run", "--resume")
        assert (status, err) == (2, "error: run holds no checkpoint: start a new run in another folder\n")
        return
    assert command("--out", "run", "--resume")[::2] == (0, "")
    assert_as_if_nothing_had_happened("run", whole)


@pytest.mark.parametrize("full_for", ["metrics.jsonl", "optimizer.safetensors"])
def test_a_full_disk_is_one_line_and_costs_the_steps_after_the_last_checkpoint(
    full_for, command, new_run, whole, full_beyond, monkeypatch
):
    """The seventh step finds the disk full: for 10 bytes of its line, or for the second file of a checkpoint."""
    slow_step, calls = loop.slow_step, []

    with contextlib.ExitStack() as stack, monkeypatch.context() as patch:

        def step_before_a_full_disk(*args: object) -> object:
            calls.append(args)
            if len(calls) == 7:
                metrics = Path("run/metrics.jsonl").stat().st_size
                weights = (checkpoints("run")[-1] / "model.safetensors").stat().st_size
                stack.enter_context(full_beyond(metrics + 10 if full_for == "metrics.jsonl" else weights))
            return slow_step(*args)

        patch.setattr(loop, "slow_step", step_before_a_full_disk)
        status, _, err = command(*new_run, "--out", "run")
    assert (status, len(err.splitlines())) == (1, 1)
    assert f"{full_for} cannot be written: File too large; the last checkpoint is run/checkpoints/step-00000006" in err
    assert "make room, and continue with: python -m ltm_pyro.train --out run --resume" in err
    assert steps_saved("run") == [0, 4, 6]
    assert Path("run/metrics.jsonl").read_bytes().endswith(b"\n") == (full_for != "metrics.jsonl")
    assert command("--out", "run", "--resume")[::2] == (0, "")
    assert_as_if_nothing_had_happened("run", whole)


def test_without_room_for_the_first_checkpoint_no_step_is_taken(command, new_run, full_beyond):
    with full_beyond(10_000):
        status, _, err = command(*new_run, "--out", "run")
    assert (status, len(err.splitlines())) == (1, 1)
    assert "there is no checkpoint yet" in err
    assert checkpoints("run") == []
    assert not Path("run/metrics.jsonl").exists()


def begin(args: list[str], folder: Path) -> subprocess.Popen[str]:
    """The command in a process of its own; what it prints comes line by line."""
    return subprocess.Popen(
        [sys.executable, "-u", "-m", "ltm_pyro.train", *args],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1"},  # as this process: other sums would be other bits
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


LINES_OF_CORPUS = 3
"""What is printed of the corpus, behind the first line and before the first step."""


def kill_after(num_lines: int, seconds: float, args: list[str], folder: Path) -> str:
    """Begin, and kill so long after so many lines. Returns what it wrote to standard error."""
    with begin(args, folder) as process:
        for _ in range(num_lines + LINES_OF_CORPUS):
            process.stdout.readline()
        time.sleep(seconds)
        process.kill()
        _, err = process.communicate()
    assert process.returncode == -signal.SIGKILL
    return err


def test_a_run_on_which_another_works_is_refused_until_that_has_ended(command, new_run, tmp_path):
    with begin([*new_run, "--out", "run", "--steps", "100000"], tmp_path) as process:
        while not process.stdout.readline().startswith("step "):
            pass
        status, out, err = command("--out", "run", "--resume")
        process.send_signal(signal.SIGTERM)
        _, err_of_first = process.communicate()
    assert (status, out, len(err.splitlines())) == (2, "", 1)
    assert err.startswith("error: run is in use: another process is training this run")
    assert (process.returncode, err_of_first) == (128 + signal.SIGTERM, "")
    reached = checkpoints("run")[-1].name.removeprefix("step-")
    assert command("--out", "run", "--resume", "--steps", str(int(reached)))[0] == 0


def test_a_run_that_is_killed_goes_on(command, new_run, whole, tmp_path):
    assert kill_after(6, 0.0, [*new_run, "--out", "run"], tmp_path) == ""
    assert command("--out", "run", "--resume")[::2] == (0, "")
    assert_as_if_nothing_had_happened("run", whole)


@pytest.mark.slow
def test_a_run_that_is_killed_at_ten_random_moments_ends_bit_for_bit_as_one_that_is_not(command, new_run, tmp_path):
    args = [*new_run, "--steps", "150", "--checkpoint-every", "5"]
    assert command(*args, "--out", "whole")[0] == 0
    names = load_file(checkpoints("whole")[-1] / "model.safetensors").keys()
    moments = random.Random(0)
    for number in range(10):
        # The first line says how large the model is; the first life gets to its first step, and so to a checkpoint.
        num_lines = moments.randint(1 if number else 2, 12)
        new_or_resumed = ["--out", "run", "--resume"] if number else [*args, "--out", "run"]
        assert kill_after(num_lines, moments.uniform(0, 0.03), new_or_resumed, tmp_path) == ""
        for path in Path("run/checkpoints").glob("step-*"):
            for line in (path / "SHA256SUMS").read_text().splitlines():
                digest, name = line.split("  ")
                assert hashlib.sha256((path / name).read_bytes()).hexdigest() == digest
            assert load_file(path / "model.safetensors").keys() == names
    assert max(steps_saved("run")) < 150
    assert command("--out", "run", "--resume")[::2] == (0, "")
    assert_as_if_nothing_had_happened("run", Path("whole"))

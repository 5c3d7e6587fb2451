"""Several processes that train together, on CPUs: the same losses as one process, and nothing lost when one stops."""

from __future__ import annotations

import dataclasses
import json
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import distributed

from ltm_pyro import cli, prepare, train
from ltm_pyro.config import preset
from ltm_pyro.data.prepared import read_manifest
from ltm_pyro.errors import InputError, RunError
from ltm_pyro.training import loop
from ltm_pyro.training.processes import Processes, joined

MORE = (
    "--batch-size 8 --fast-steps 2 --log-every 1 --validation-sequences 5 --validation-samples 4 --steps 6 "
    "--validate-every 3"
)
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def small(tiny_options: list[str]) -> list[str]:
    """Options of a tiny model that takes six steps."""
    return [*tiny_options, *shlex.split(MORE)]


@pytest.fixture
def data(tmp_path: Path, write_text: Callable[[Path], Path]) -> str:
    return str(write_text(tmp_path / "text.txt"))


@pytest.fixture(scope="module")
def one(small: list[str], write_text: Callable[[Path], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run in one process, beside its text."""
    folder = tmp_path_factory.mktemp("one")
    assert train.main([*small, "--data", str(write_text(folder / "text.txt")), "--out", str(folder / "run")]) == 0
    return folder / "run"


def in_two(*args: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """The command in two processes, by torchrun."""
    command = [*TORCHRUN, "-m", "ltm_pyro.train", *args]
    return subprocess.run(command, cwd=cwd, env=ENVIRONMENT, capture_output=True, text=True, timeout=120)


def lines(run: Path) -> list[dict]:
    """The lines of metrics, without what a clock says."""
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in record.items() if k not in ("seconds", "tokens_per_second")} for record in records]


def assert_same(run: Path, other: Path) -> None:
    """All figures are the same but for rounding, and so are the weights."""
    assert len(lines(run)) == len(lines(other)) > 0
    for record, expected in zip(lines(run), lines(other), strict=True):
        assert record == {
            key: pytest.approx(value, rel=1e-4, abs=1e-6) if isinstance(value, float) else value
            for key, value in expected.items()
        }
    weights, expected_weights = (
        load_file(path / "checkpoints/step-00000006/model.safetensors") for path in (run, other)
    )
    for name, weight in weights.items():
        # Less than a step: the rate is up to 5e-3. What rounding changes most are weights whose gradient is nearly 0.
        assert (weight - expected_weights[name]).abs().max() < 1e-4, name


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("inference", "objective"),
    [
        ("vi", "prefix"),
        ("map", "past"),
        pytest.param("amortized", "past", marks=SLOW),
        pytest.param("amortized", "prefix", marks=SLOW),
        pytest.param("none", "prefix", marks=SLOW),
    ],
)
def test_two_processes_take_the_steps_of_one_with_the_same_batch(small, inference, objective, data, fork_two, tmp_path):
    """Whatever is inferred together: one process takes micro-batches of 4, each of the two takes two of 2."""
    args = [*small, "--data", data, "--inference", inference, "--infer-from", objective, "--tensorboard"]
    args += ["--block-size", "10"] if objective == "past" else []
    if inference == "none":
        args += ["--fast-steps", "0", "--model.num-slots", "0"]
    assert train.main([*args, "--micro-batch-size", "4", "--out", str(tmp_path / "one")]) == 0
    first, second = fork_two(lambda rank: cli.run(train.main, [*args, "--micro-batch-size", "2", "--out", "two"]))
    assert (first.status, second.status, second.out) == (0, 0, ""), first.err + second.err
    assert_same(tmp_path / "two", tmp_path / "one")
    assert first.out.count("step 6/6") == 1
    assert first.out.count("two texts from the model") == 1
    assert len(list((tmp_path / "two/tensorboard").iterdir())) == 1
    assert "in each of 2 processes" in first.out


def test_two_processes_that_are_stopped_save_once_and_one_process_goes_on(small, one, fork_two, tmp_path):
    args = [*small, "--data", str(one.parent / "text.txt")]
    micro_batches, calls = loop.micro_batches, []

    def watched(training):
        calls.append(1)
        if len(calls) == 5 and training.processes.rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return micro_batches(training)

    def train_until_stopped(rank):
        loop.micro_batches = watched
        cli.run(train.main, [*args, "--out", "two"])

    # It stops itself: the second process is asked to stop, and the first one hears of it.
    results = fork_two(train_until_stopped)
    assert [result.status for result in results] == [128 + signal.SIGTERM] * 2, results
    assert "".join(result.out for result in results).count("stopped by SIGTERM") == 1
    assert (tmp_path / "two/checkpoints/step-00000004").is_dir()
    assert train.main(["--out", str(tmp_path / "two"), "--resume"]) == 0
    assert_same(tmp_path / "two", one)


def test_two_processes_go_on_where_one_was_stopped(small, one, fork_two, tmp_path):
    args = [*small, "--data", str(one.parent / "text.txt")]
    # The end of the learning rate's schedule moves with --steps: it is the same for both only in the warm-up.
    assert train.main([*args, "--steps", "4", "--out", str(tmp_path / "two")]) == 0
    results = fork_two(lambda rank: cli.run(train.main, ["--out", "two", "--resume", "--steps", "6"]))
    assert [result.status for result in results] == [0, 0], results
    assert_same(tmp_path / "two", one)


@pytest.mark.slow
@pytest.mark.parametrize("options", [[], ["--precision", "bfloat16"]], ids=["float32", "bfloat16"])
def test_two_processes_that_stop_and_go_on_end_bit_for_bit_where_two_that_did_not(small, options, data, tmp_path):
    args = [*small, "--data", data, "--micro-batch-size", "2", *options]
    assert in_two(*args, "--out", "whole", cwd=tmp_path).returncode == 0
    assert in_two(*args, "--steps", "4", "--out", "parts", cwd=tmp_path).returncode == 0
    assert in_two("--out", "parts", "--resume", "--steps", "6", cwd=tmp_path).returncode == 0
    whole, parts = (
        load_file(tmp_path / run / "checkpoints/step-00000006/model.safetensors") for run in ("whole", "parts")
    )
    assert all(weight.equal(parts[name]) for name, weight in whole.items())
    assert lines(tmp_path / "whole") == lines(tmp_path / "parts")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "options"), [(signal.SIGINT, []), (signal.SIGTERM, []), (signal.SIGTERM, ["--sharded"])]
)
def test_a_signal_to_torchrun_saves_a_checkpoint(small, number, options, data, tmp_path):
    command = [*TORCHRUN, "-m", "ltm_pyro.train", *small, *options, "--data", data, "--steps", "100000", "--out", "run"]
    with subprocess.Popen(
        command, cwd=tmp_path, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        for line in process.stdout:
            if line.startswith("step 3/"):
                break
        process.send_signal(number)
        out, _ = process.communicate(timeout=60)
    assert out.count(f"stopped by {number.name}: saved run/checkpoints/step-") == 1
    saved = out.split("saved ")[1].split(";")[0]
    assert (tmp_path / saved / "model.safetensors").is_file()


@pytest.mark.parametrize(
    ("args", "mentioned"),
    [
        pytest.param(["--steps", "0"], "--steps", marks=SLOW),
        pytest.param(["--batch-size", "9"], "2 processes", marks=SLOW),
        pytest.param(["--data", "missing.txt"], "missing.txt", marks=SLOW),
        (["--out", "used"], "used"),
    ],
)
def test_bad_input_is_said_once(small, args, mentioned, data, tmp_path):
    (tmp_path / "used").mkdir()
    (tmp_path / "used/notes").write_text("mine")
    result = in_two(*small, "--data", data, *args, cwd=tmp_path)
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, result.stderr
    assert mentioned in errors[0]
    assert "exitcode  : 2" in result.stderr


def test_a_batch_that_two_processes_cannot_share_is_bad_input():
    config = dataclasses.replace(preset("tiny"), batch_size=9)
    with pytest.raises(InputError, match="--batch-size 9 cannot be divided evenly among 2 processes"):
        train.load(config, Processes(0, 2))


def test_a_full_disk_ends_all_processes_with_one_line(small, data, fork_two, full_beyond):
    def train_into_full_disk(rank):
        with full_beyond(20_000):  # less than the weights take
            cli.run(train.main, [*small, "--data", data, "--out", "run"])

    first, second = fork_two(train_into_full_disk)
    assert (first.status, second.status) == (1, 1)
    assert first.err.count("\n") == 1, first.err
    assert first.err.startswith("error: ")
    assert "cannot be written" in first.err
    assert second.err == ""


@pytest.mark.parametrize(
    ("uses_gpu", "num_gpus", "gpu"), [(True, 2, 1), (True, 8, 1), (True, 1, None), (False, 2, None)]
)
def test_a_process_takes_a_gpu_of_its_own_before_it_joins_the_others(monkeypatch, uses_gpu, num_gpus, gpu):
    """The second process of a machine with these GPUs, of which nothing is there but their number."""
    calls = []
    for name, value in {"RANK": 5, "WORLD_SIZE": 6, "LOCAL_RANK": 1, "LOCAL_WORLD_SIZE": 2}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: num_gpus)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: calls.append(("take", device)))
    monkeypatch.setattr(distributed, "init_process_group", lambda device_id: calls.append(("join", device_id)))
    monkeypatch.setattr(distributed, "get_rank", lambda: 5)
    monkeypatch.setattr(distributed, "get_world_size", lambda: 6)
    monkeypatch.setattr(distributed, "new_group", lambda backend, timeout=None: "some")
    monkeypatch.setattr(distributed, "destroy_process_group", lambda: calls.append("leave"))
    with joined(uses_gpu) as processes:
        if num_gpus == 1:
            with pytest.raises(InputError, match="this machine has 1 GPUs for 2 processes"):
                processes.require_gpus()
        else:
            processes.require_gpus()
    device = None if gpu is None else torch.device("cuda", gpu)
    assert calls == [*([] if gpu is None else [("take", device)]), ("join", device), "leave"]


def test_a_process_alone_takes_the_gpu_that_torch_takes():
    with joined(uses_gpu=True) as processes:
        processes.require_gpus()
    assert processes == Processes()


def test_damage_that_the_second_process_finds_is_said_once(small, fork_two, tmp_path):
    """The processes of a machine check the files of a prepared corpus between them."""
    rows, corpus = tmp_path / "rows.jsonl", tmp_path / "corpus"
    rows.write_text("".join(json.dumps({"text": f"Document number {number}. " * 9}) + "\n" for number in range(60)))
    assert prepare.main([str(rows), "--out", str(corpus), "--processes", "1", "--shard-tokens", "6000"]) == 0
    sizes = {name: stored.num_bytes for name, stored in read_manifest(corpus).stored().items()}
    _, path = sorted(corpus.glob("train-*.tokens.bin"), key=lambda path: -sizes[path.name])[:2]
    path.write_bytes(bytes([path.read_bytes()[0] ^ 1]) + path.read_bytes()[1:])
    first, second = fork_two(lambda rank: cli.run(train.main, [*small, "--data", str(corpus), "--out", "run"]))
    assert (first.status, second.status) == (2, 2), first.err + second.err
    assert (first.err.count("\n"), second.err) == (1, "")
    assert f"{path.name} is damaged" in first.err
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize("options", [[], ["--sharded"]], ids=["whole", "sharded"])
def test_processes_that_torchrun_starts_again_resume_their_run(small, options, data, tmp_path):
    args = ["-m", "ltm_pyro.train", *small, *options, "--data", data, "--micro-batch-size", "2"]
    args += ["--checkpoint-every", "2"]
    assert in_two(*args[2:], "--out", "whole", cwd=tmp_path).returncode == 0
    command = [*TORCHRUN, "--max-restarts", "1", *args, "--out", "parts"]
    with subprocess.Popen(
        command, cwd=tmp_path, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as process:
        for line in process.stdout:
            if line.startswith("step 3/"):
                break
        workers = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True, check=True)
        os.kill(int(workers.stdout.split()[-1]), signal.SIGKILL)
        out, _ = process.communicate(timeout=120)
    assert process.returncode == 0, out
    assert "continuing after step 2" in out
    whole, parts = (
        load_file(tmp_path / run / "checkpoints/step-00000006/model.safetensors") for run in ("whole", "parts")
    )
    assert all(weight.equal(parts[name]) for name, weight in whole.items())


def test_a_run_without_a_name_cannot_be_found_again(monkeypatch, small, data, capsys):
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    with pytest.raises(InputError, match="only with --out"):
        train.main([*small, "--data", data])


def test_processes_that_failed_before_they_began_a_run_begin_one_when_started_again(monkeypatch, small, data, tmp_path):
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert train.main([*small, "--data", data, "--steps", "1", "--out", str(tmp_path / "new")]) == 0


def test_what_the_processes_tell_each_other(fork_two, tmp_path):
    """Sums, what the first one alone knows, an error of the second one, and that the first one leaves."""

    def fails(processes):
        if processes.rank == 1:
            raise InputError("the second one cannot")

    def tell(rank):
        said = {}
        try:
            with joined(uses_gpu=False) as processes:
                said["ranks"] = processes.gather(processes.rank)
                said["all"] = processes.by_all(lambda: processes.rank * 10)
                said["first"] = processes.by_first(lambda: os.getpid())
                print("standard output of", processes.rank)
                try:
                    processes.by_all(lambda: fails(processes))
                except InputError as error:
                    said["error"] = str(error)
                except SystemExit as exit:
                    said["exit"] = exit.code
                if processes.is_first:
                    raise RunError("the disk is full")
                processes.gather(None)
        except (RunError, SystemExit) as end:
            said["end"] = repr(end)
        Path(f"said-{rank}.json").write_text(json.dumps(said | {"pid": os.getpid()}))

    results = fork_two(tell)
    assert [result.status for result in results] == [0, 0], results
    first, second = (json.loads((tmp_path / f"said-{rank}.json").read_text()) for rank in range(2))
    assert first["ranks"] == second["ranks"] == [0, 1]
    assert (first["all"], second["all"]) == (0, 10)
    assert first["first"] == second["first"] == first["pid"] != second["pid"]
    assert first["error"] == "the second one cannot"
    assert second["exit"] == 2
    assert (first["end"], second["end"]) == ("RunError('the disk is full')", "SystemExit(1)")
    assert "".join(result.out for result in results) == "standard output of 0\n"

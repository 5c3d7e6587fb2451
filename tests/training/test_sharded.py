"""Weights that are split between processes, on CPUs: the same training as if each process had all of them."""

from __future__ import annotations

import gc
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.distributed.tensor import DTensor

from ltm_pyro import cli, train
from ltm_pyro.errors import InputError, WriteError
from ltm_pyro.runs import checkpoint
from ltm_pyro.training import loop
from ltm_pyro.training.processes import Processes

SLOW = pytest.mark.slow
OPTIONS = (
    "--batch-size 8 --micro-batch-size 2 --fast-steps 2 --log-every 1 --validation-sequences 5 --validation-samples 4 "
    "--validate-every 2 --steps 4"
)
UNCLIPPED = ["--optimizer.max-gradient-norm", "1e9"]


@pytest.fixture
def small(tiny_options: list[str], write_text: Callable[[Path], Path], tmp_path: Path) -> list[str]:
    """Options of a tiny model that takes four steps on a text."""
    return [*tiny_options, *shlex.split(OPTIONS), "--data", str(write_text(tmp_path / "text.txt"))]


def in_turn(*commands: list[str]) -> Callable[[int], None]:
    """Trainings, one after another in the same processes."""

    def action(rank: int) -> None:
        port = int(os.environ["MASTER_PORT"])
        for number, args in enumerate(commands):
            os.environ["MASTER_PORT"] = str(port + number)
            assert train.main(args) == 0

    return action


def weights_of(run: Path, step: int = 4) -> dict[str, torch.Tensor]:
    return load_file(run / f"checkpoints/step-{step:08d}/model.safetensors")


def lines(run: Path) -> list[dict]:
    """The lines of metrics, without what a clock says."""
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in record.items() if k not in ("seconds", "tokens_per_second")} for record in records]


def assert_equal(run: Path, other: Path) -> None:
    """Weights and figures are the same, bit for bit; but for the norm of the gradient, whose parts add up otherwise."""
    weights, expected = weights_of(run), weights_of(other)
    assert weights.keys() == expected.keys()
    assert all(weight.equal(expected[name]) for name, weight in weights.items())
    for record, of_other in zip(lines(run), lines(other), strict=True):
        norm, expected_norm = (each.pop("gradient_norm", 0) for each in (record, of_other))
        assert norm == pytest.approx(expected_norm, rel=1e-5)
        assert record == of_other


def assert_close(run: Path, other: Path) -> None:
    """Weights and figures are the same but for rounding."""
    weights, expected = weights_of(run), weights_of(other)
    for name, weight in weights.items():
        # Less than a step: the rate is up to 3e-3. What rounding changes most are weights whose gradient is nearly 0.
        assert (weight - expected[name]).abs().max() < 1e-4, name
    for record, of_other in zip(lines(run), lines(other), strict=True):
        assert record == {
            key: pytest.approx(value, rel=1e-4, abs=1e-6) if isinstance(value, float) else value
            for key, value in of_other.items()
        }


@pytest.mark.parametrize(
    ("inference", "objective", "more"),
    [
        ("amortized", "past", []),
        pytest.param("vi", "whole", ["--model.prior", "affine"], marks=SLOW),
        pytest.param("amortized", "prefix", [], marks=SLOW),
        pytest.param("map", "past", ["--optimizer.algorithm", "adamw"], marks=SLOW),
        pytest.param("none", "prefix", ["--fast-steps", "0", "--model.num-slots", "0"], marks=SLOW),
        pytest.param("langevin", "prefix", ["--precision", "bfloat16"], marks=SLOW),
    ],
)
def test_split_weights_are_trained_bit_for_bit_as_whole_ones(small, inference, objective, more, fork_two, tmp_path):
    args = [*small, *UNCLIPPED, "--inference", inference, "--infer-from", objective, *more]
    args += ["--block-size", "10"] if objective == "past" else []
    first, second = fork_two(in_turn([*args, "--out", "whole"], [*args, "--sharded", "--out", "split"]))
    assert (first.status, second.status, second.out) == (0, 0, ""), first.err + second.err
    assert_equal(tmp_path / "split", tmp_path / "whole")
    assert first.out.count("split between 2 processes") == 1
    assert first.out.count("two texts from the model") == 2


@SLOW
def test_a_gradient_is_clipped_by_the_norm_of_all_its_parts(small, fork_two, tmp_path):
    args = [*small, "--optimizer.max-gradient-norm", "0.01", "--validate-every", "100"]
    results = fork_two(in_turn([*args, "--out", "whole"], [*args, "--sharded", "--out", "split"]))
    assert [result.status for result in results] == [0, 0], results
    assert all(record["gradient_norm"] > 0.1 for record in lines(tmp_path / "split") if record["split"] == "train")
    assert_close(tmp_path / "split", tmp_path / "whole")


@SLOW
def test_a_process_holds_its_part_between_steps_and_all_within_one(small, fork_two, tmp_path):
    def watched_training(rank):
        inside, between, slow_step, save = [], [], loop.slow_step, loop.save
        gc.unfreeze()
        before = {id(weight) for weight in gc.get_objects() if issubclass(type(weight), nn.Parameter)}

        def held():
            """The numbers in weights of this process that are no part of one."""
            found = [weight for weight in gc.get_objects() if issubclass(type(weight), nn.Parameter)]
            found = [weight for weight in found if id(weight) not in before and not isinstance(weight, DTensor)]
            return sum(weight.untyped_storage().nbytes() // 4 for weight in found)

        def watched_step(training, stop):
            inside.append((held(), sum(weight.numel() for weight in training.model.parameters())))
            return slow_step(training, stop)

        def watched_save(training):
            weights = list(training.model.parameters())
            moments = [m for state in training.optimizer.algorithm.state.values() for m in state.values() if m.dim()]
            parts = [sum(each.to_local().numel() for each in tensors) for tensors in (weights, moments)]
            assert all(weight.grad is None for weight in weights)
            between.append((held(), *parts))
            save(training)

        loop.slow_step, loop.save = watched_step, watched_save
        adamw = ["--optimizer.algorithm", "adamw"]  # which has two moments of each weight
        in_turn([*small, *adamw, "--sharded", "--out", "run", "--checkpoint-every", "1"])(rank)
        Path(f"held-{rank}").write_text(json.dumps([inside, between]))

    results = fork_two(watched_training)
    assert [result.status for result in results] == [0, 0], results
    total = sum(weight.numel() for weight in weights_of(tmp_path / "run").values())
    of_both = [json.loads((tmp_path / f"held-{rank}").read_text()) for rank in range(2)]
    for inside, _ in of_both:
        assert inside == [[total, total]] * 4
    for (held, weights, moments), (other_held, other_weights, other_moments) in zip(
        *(between for _, between in of_both), strict=True
    ):
        assert (held, other_held) == (0, 0)
        assert weights + other_weights == total
        assert moments + other_moments in (0, 2 * total)
        assert 0.49 < weights / total < 0.51
        assert moments in (0, 2 * weights)


@SLOW
def test_a_split_run_goes_on_bit_for_bit_and_with_other_numbers_of_processes(small, fork_two, tmp_path):
    args = [*small, "--inference", "vi", "--sharded"]
    results = fork_two(
        in_turn([*args, "--out", "whole"], [*args, "--steps", "2", "--out", "parts"]),
    )
    assert [result.status for result in results] == [0, 0], results
    saved = tmp_path / "parts/checkpoints/step-00000002"
    assert len(list((saved / "optimizer").iterdir())) == 2
    subprocess.run(["sha256sum", "-c", "--quiet", "SHA256SUMS"], cwd=saved, check=True)
    for name in ("one", "four"):
        subprocess.run(["cp", "-r", "parts", name], cwd=tmp_path, check=True)
    (saved / "optimizer" / "other.safetensors").write_bytes(b"")
    with pytest.raises(InputError, match="optimizer has files that SHA256SUMS does not name"):
        checkpoint.load_progress(saved, torch.optim.AdamW([nn.Parameter(torch.zeros(1))]))
    (saved / "optimizer" / "other.safetensors").unlink()
    more = ["--resume", "--steps", "4"]
    results = fork_two(in_turn(["--out", "parts", *more]))
    assert [result.status for result in results] == [0, 0], results
    assert_equal(tmp_path / "parts", tmp_path / "whole")
    assert train.main(["--out", str(tmp_path / "one"), *more, "--no-sharded"]) == 0
    assert_close(tmp_path / "one", tmp_path / "whole")
    results = fork_two(in_turn(["--out", "four", *more]), 4)
    assert [result.status for result in results] == [0] * 4, results
    assert_close(tmp_path / "four", tmp_path / "whole")


@SLOW
def test_a_run_becomes_a_split_one(small, fork_two, tmp_path):
    assert train.main([*small, "--out", str(tmp_path / "whole")]) == 0
    assert train.main([*small, "--steps", "2", "--out", str(tmp_path / "parts")]) == 0
    results = fork_two(in_turn(["--out", "parts", "--resume", "--steps", "4", "--sharded"]))
    assert [result.status for result in results] == [0, 0], results
    assert_close(tmp_path / "parts", tmp_path / "whole")


@pytest.mark.parametrize(
    "full",
    [
        pytest.param([0], marks=SLOW, id="the first's disk"),
        pytest.param([1], id="the second's disk"),
        pytest.param([], marks=SLOW, id="the second's disk, when its part is written"),
    ],
)
def test_a_damaged_part_is_left_out_and_a_full_disk_said_once(small, full, fork_two, full_beyond, tmp_path):
    args = [*small, "--sharded", "--validate-every", "100", "--checkpoint-every", "1"]
    results = fork_two(in_turn([*args, "--steps", "2", "--out", "run"]))
    assert [result.status for result in results] == [0, 0], results
    part = sorted((tmp_path / "run/checkpoints/step-00000002/optimizer").iterdir())[1]
    part.write_bytes(part.read_bytes()[:-1] + bytes([part.read_bytes()[-1] ^ 1]))

    def go_on(rank):
        write_part = checkpoint.write_part

        def write_on_a_full_disk(*parts):
            with full_beyond(20_000 if rank in full else 10**9):  # less than a part
                sums = write_part(*parts)
            if rank and not full:
                raise WriteError("the part cannot be written")
            return sums

        checkpoint.write_part = write_on_a_full_disk
        cli.run(train.main, ["--out", "run", "--resume", "--steps", "4"])

    first, second = fork_two(go_on)
    assert (first.status, second.status) == (1, 1), first.err + second.err
    warning, error = first.err.splitlines()
    assert f"{part.name} is damaged" in warning
    assert "going back to run/checkpoints/step-00000001" in warning
    assert error.startswith("error: ")
    assert "cannot be written" in error
    assert ("File too large" in error) == bool(full)
    assert second.err == ""
    assert sorted(path.name for path in (tmp_path / "run/checkpoints").iterdir()) == ["step-00000001"]


def test_a_process_alone_has_nothing_to_split(small, run_main, tmp_path):
    status, _, err = run_main(train.main, *small, "--sharded", "--out", str(tmp_path / "run"))
    assert (status, err.count("\n")) == (2, 1)
    assert "--sharded splits weights between processes, and there is one" in err
    assert not (tmp_path / "run").exists()


def test_a_version_of_torch_that_lacks_what_it_needs_is_named(small, monkeypatch):
    monkeypatch.setitem(sys.modules, "ltm_pyro.runs.parts", None)  # so that its import fails
    config = train.parse([*small, "--sharded"])
    with pytest.raises(InputError, match=f"does not work with PyTorch {re.escape(torch.__version__)}"):
        train.load(config, Processes(size=2))

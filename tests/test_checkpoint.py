"""Checkpoints: what comes back is what was written, and what was damaged is refused in one line."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from ltm_pyro import checkpoint, cli
from ltm_pyro.checkpoint import Progress
from ltm_pyro.errors import InputError

PROGRESS = Progress(step=3, tokens_seen=1234, seconds=0.1 + 0.2, num_skipped_steps=2, skips_in_a_row=1)


def network(width: int = 5) -> nn.Module:
    return nn.Sequential(nn.Linear(4, width), nn.Linear(width, 3, bias=False))


def optimizer(model: nn.Module) -> torch.optim.AdamW:
    """Two groups, whose weights are not in the model's order: matrices, then the others."""
    groups = [[w for w in model.parameters() if w.dim() > 1], [w for w in model.parameters() if w.dim() <= 1]]
    return torch.optim.AdamW([{"params": group, "weight_decay": 0.1} for group in groups], lr=0.01)


def take_steps(model: nn.Module, adamw: torch.optim.AdamW, num_steps: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(num_steps):
        model(torch.randn(6, 4, generator=generator)).square().sum().backward()
        adamw.step()
        adamw.zero_grad()


@pytest.fixture
def trained() -> tuple[nn.Module, torch.optim.AdamW]:
    model = network()
    adamw = optimizer(model)
    take_steps(model, adamw, 3, seed=1)
    return model, adamw


@pytest.fixture
def saved(tmp_path: Path, trained: tuple[nn.Module, torch.optim.AdamW]) -> Path:
    return checkpoint.save(tmp_path, *trained, PROGRESS)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_weights_moments_and_progress_come_back_bit_for_bit(saved, trained):
    model, adamw = trained
    other = network()
    other_adamw = optimizer(other)
    checkpoint.load_weights(saved, other)
    assert checkpoint.load_progress(saved, other_adamw) == PROGRESS
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert adamw.state[a].keys() == other_adamw.state[b].keys() == {"step", "exp_avg", "exp_avg_sq"}
        assert all(torch.equal(value, other_adamw.state[b][key]) for key, value in adamw.state[a].items())


def test_training_goes_on_from_a_checkpoint_as_if_it_had_not_stopped(saved, trained):
    other = network()
    other_adamw = optimizer(other)
    checkpoint.load_weights(saved, other)
    checkpoint.load_progress(saved, other_adamw)
    take_steps(*trained, 2, seed=2)
    take_steps(other, other_adamw, 2, seed=2)
    assert all(torch.equal(a, b) for a, b in zip(trained[0].parameters(), other.parameters(), strict=True))


def test_a_checkpoint_before_the_first_step_has_no_moments(tmp_path):
    model = network()
    saved = checkpoint.save(tmp_path, model, optimizer(model), Progress())
    adamw = optimizer(model)
    assert checkpoint.load_progress(saved, adamw) == Progress()
    assert not adamw.state_dict()["state"]


def test_the_rates_and_decays_are_those_of_the_settings_and_not_of_the_checkpoint(saved):
    adamw = optimizer(network())
    adamw.param_groups[1]["lr"] = 0.5
    checkpoint.load_progress(saved, adamw)
    assert [group["lr"] for group in adamw.param_groups] == [0.01, 0.5]


def test_only_the_last_two_are_kept(tmp_path, trained):
    for step in (1, 9, 10, 100):
        path = checkpoint.save(tmp_path, *trained, Progress(step=step))
        assert path == checkpoint.all_checkpoints(tmp_path)[-1]
    assert names(tmp_path) == ["step-00000010", "step-00000100"]


def test_what_a_crash_left_half_written_is_no_checkpoint_and_is_removed(tmp_path, trained):
    left_behind = tmp_path / ".step-00000002.partial"
    left_behind.mkdir()
    (left_behind / "model.safetensors").write_bytes(b"half")
    assert checkpoint.all_checkpoints(tmp_path) == []
    checkpoint.save(tmp_path, *trained, Progress(step=2))
    assert names(tmp_path) == ["step-00000002"]


def test_a_crash_in_the_middle_of_writing_leaves_the_checkpoint_before_it(tmp_path, trained, monkeypatch):
    checkpoint.save(tmp_path, *trained, Progress(step=1))

    def full_disk(*args: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.files, "sync", full_disk)
        with pytest.raises(OSError, match="No space left"):
            checkpoint.save(tmp_path, *trained, Progress(step=2))
    assert [path.name for path in checkpoint.all_checkpoints(tmp_path)] == ["step-00000001"]
    checkpoint.save(tmp_path, *trained, Progress(step=2))
    assert names(tmp_path) == ["step-00000001", "step-00000002"]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_nothing_is_written_where_a_weight_is_not_finite(value, tmp_path, trained):
    model, adamw = trained
    with torch.no_grad():
        model[1].weight[1, 2] = value
    with pytest.raises(FloatingPointError, match="not finite"):
        checkpoint.save(tmp_path / "checkpoints", model, adamw, PROGRESS)
    assert names(tmp_path) == []


def test_a_checkpoint_of_the_same_step_is_not_written_again(saved, trained):
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in saved.iterdir()}
    model, adamw = trained
    with torch.no_grad():
        model[0].weight.zero_()
    assert checkpoint.save(saved.parent, model, adamw, PROGRESS) == saved
    assert before == {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in saved.iterdir()}


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-5])


def change_moments(saved: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    moments = load_file(saved / "optimizer.safetensors")
    change(moments)
    save_file(moments, saved / "optimizer.safetensors")


def change_progress(saved: Path, **values: object) -> None:
    (saved / "progress.json").write_text(json.dumps(dataclasses.asdict(PROGRESS) | values))


def moments_of_a_wider_model(saved: Path) -> None:
    other = network(width=7)
    adamw = optimizer(other)
    take_steps(other, adamw, 1, seed=3)
    (path,) = saved.parent.glob("step-*")
    wider = checkpoint.save(saved.parent / "other", other, adamw, PROGRESS)
    (wider / "optimizer.safetensors").replace(path / "optimizer.safetensors")


DAMAGE: dict[str, Callable[[Path], object]] = {
    "weights cut short": lambda saved: cut_short(saved / "model.safetensors"),
    "empty weights": lambda saved: (saved / "model.safetensors").write_bytes(b""),
    "no weights": lambda saved: (saved / "model.safetensors").unlink(),
    "weights are not safetensors": lambda saved: (saved / "model.safetensors").write_text("weights " * 20),
    "moments cut short": lambda saved: cut_short(saved / "optimizer.safetensors"),
    "no moments": lambda saved: (saved / "optimizer.safetensors").unlink(),
    "moments of another model": moments_of_a_wider_model,
    "moments of one more weight": lambda saved: change_moments(
        saved, lambda moments: moments.update({"3.exp_avg": torch.zeros(5)})
    ),
    "a moment without a number": lambda saved: change_moments(
        saved, lambda moments: moments.update(exp_avg=torch.zeros(5))
    ),
    "a moment that AdamW lacks": lambda saved: change_moments(
        saved, lambda moments: moments.update({"0.momentum": torch.zeros(5, 4)})
    ),
    "a moment is missing": lambda saved: change_moments(saved, lambda moments: moments.pop("0.exp_avg_sq")),
    "the moments of a weight are missing": lambda saved: change_moments(
        saved, lambda moments: [moments.pop(f"2.{key}") for key in ("step", "exp_avg", "exp_avg_sq")]
    ),
    "a moment is a single number": lambda saved: change_moments(
        saved, lambda moments: moments.update({"0.exp_avg": torch.tensor(0.0)})
    ),
    "the step of a moment is a matrix": lambda saved: change_moments(
        saved, lambda moments: moments.update({"0.step": torch.zeros(5, 4)})
    ),
    "no progress": lambda saved: (saved / "progress.json").unlink(),
    "progress is empty": lambda saved: (saved / "progress.json").write_text(""),
    "progress says nothing": lambda saved: (saved / "progress.json").write_text("{}"),
    "progress is a list": lambda saved: (saved / "progress.json").write_text("[3, 4]"),
    "progress is not JSON": lambda saved: (saved / "progress.json").write_text("step: 3"),
    "progress is not UTF-8": lambda saved: (saved / "progress.json").write_bytes(b'{"step": "\xff"}'),
    "progress says one thing more": lambda saved: change_progress(saved, epoch=1),
    "step is text": lambda saved: change_progress(saved, step="3"),
    "step is a fraction": lambda saved: change_progress(saved, step=3.0),
    "step is true": lambda saved: change_progress(saved, step=True),
    "seconds are null": lambda saved: change_progress(saved, seconds=None),
}


def resume(saved: Path) -> int:
    model = network()
    adamw = optimizer(model)
    checkpoint.load_weights(saved, model)
    checkpoint.load_progress(saved, adamw)
    return 0


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE.keys())
def test_a_damaged_checkpoint_is_refused_in_one_line_that_says_which(damage, saved, capsys):
    assert resume(saved) == 0
    damage(saved)
    with pytest.raises(SystemExit) as exit:
        cli.run(lambda args: resume(saved), [])
    assert exit.value.code == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ")
    assert len(err.splitlines()) == 1
    assert saved.name in err


def test_the_weights_of_another_model_are_refused(saved):
    with pytest.raises(InputError, match="not those of this model"):
        checkpoint.load_weights(saved, network(width=6))
    deeper = network().append(nn.Linear(3, 3))
    with pytest.raises(InputError, match="not those of this model"):
        checkpoint.load_weights(saved, deeper)

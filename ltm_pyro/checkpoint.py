"""Checkpoints: the weights and everything needed to go on, written whole or not at all.

`checkpoints/step-00000200/` holds `model.safetensors` (the weights), `optimizer.safetensors` (AdamW's moments) and
`progress.json`. All randomness of training is a pure function of (seed, step), so no random state is stored.
Nothing read from here can run code.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ltm_pyro import files
from ltm_pyro.errors import InputError

KEPT = 2


@dataclass
class Progress:
    """Where a training run stands."""

    step: int = 0
    """Slow steps taken, the skipped ones included."""
    tokens_seen: int = 0
    """Predicted tokens that the slow steps have read."""
    seconds: float = 0.0
    """Time spent in training steps."""
    num_skipped_steps: int = 0
    """Slow steps left out because a value was not finite."""
    skips_in_a_row: int = 0
    """How many of them were the last ones."""


def save(folder: Path, model: nn.Module, adamw: torch.optim.Optimizer, progress: Progress) -> Path:
    """Write a checkpoint into the folder `checkpoints`, unless there is one of this step; all but the last two go.

    Raises:
        FloatingPointError: if a weight is not finite; nothing is written then.
    """
    weights = model.state_dict()
    if not all(weight.isfinite().all() for weight in weights.values()):
        raise FloatingPointError("a weight is not finite")
    target = folder / f"step-{progress.step:08d}"
    if target.exists():
        return target
    for left_behind in folder.glob(".step-*.partial"):
        shutil.rmtree(left_behind)
    partial = folder / f".{target.name}.partial"
    partial.mkdir(parents=True)
    save_file(weights, partial / "model.safetensors")
    save_file(_moments(adamw), partial / "optimizer.safetensors")
    (partial / "progress.json").write_text(json.dumps(dataclasses.asdict(progress)))
    for path in (*partial.iterdir(), partial):
        files.sync(path)
    os.replace(partial, target)
    files.sync(folder)
    for old in all_checkpoints(folder)[:-KEPT]:
        shutil.rmtree(old)
    return target


def all_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in the folder `checkpoints`, oldest first."""
    return sorted(path for path in folder.glob("step-*") if path.is_dir())


def load_weights(checkpoint: Path, model: nn.Module) -> None:
    """Put the weights of a checkpoint into the model.

    Raises:
        InputError: if they cannot be read, or are those of another model.
    """
    weights = _read(checkpoint / "model.safetensors")
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise InputError(f"the weights in {checkpoint} are not those of this model: {error}") from None


def load_progress(checkpoint: Path, adamw: torch.optim.Optimizer) -> Progress:
    """Put AdamW's moments into the optimiser, and return where the run stood.

    Raises:
        InputError: if the checkpoint cannot be read.
    """
    weights = [weight for group in adamw.param_groups for weight in group["params"]]
    state: dict[int, dict[str, Tensor]] = {}
    for name, value in _read(checkpoint / "optimizer.safetensors").items():
        index, _, key = name.partition(".")
        if not index.isdecimal():
            raise InputError(f"the moments in {checkpoint} are not those of this model: {name}")
        state.setdefault(int(index), {})[key] = value
    shapes = {index: {key: value.shape for key, value in values.items()} for index, values in state.items()}
    expected = {n: {"step": (), "exp_avg": w.shape, "exp_avg_sq": w.shape} for n, w in enumerate(weights)}
    # None at all before the first step.
    if state and shapes != expected:
        raise InputError(f"the moments in {checkpoint} are not those of this model")
    adamw.load_state_dict({"state": state, "param_groups": adamw.state_dict()["param_groups"]})
    return read_progress(checkpoint)


def read_progress(checkpoint: Path) -> Progress:
    """Where the run stood.

    Raises:
        InputError: if the checkpoint cannot be read.
    """
    path = checkpoint / "progress.json"
    try:
        values = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read: {error}") from None
    fields = {field.name: type(field.default) for field in dataclasses.fields(Progress)}
    if not isinstance(values, dict) or {name: type(value) for name, value in values.items()} != fields:
        raise InputError(f"{path} does not say where the run stood: it needs {', '.join(fields)}")
    return Progress(**values)


def _moments(adamw: torch.optim.Optimizer) -> dict[str, Tensor]:
    return {
        f"{index}.{key}": value
        for index, values in adamw.state_dict()["state"].items()
        for key, value in values.items()
    }


def _read(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path} cannot be read: {error}") from None

"""Checkpoints: the weights and everything needed to resume training, written whole or not at all.

`checkpoints/step-00000200/` holds `model.safetensors` (the weights), `optimizer.safetensors` (AdamW's moments),
`progress.json`, and `SHA256SUMS` of these, which `sha256sum -c` reads too. The best
checkpoint also holds `best.json`, the held-out figure by which it is the best. All randomness of training is a pure
function of (seed, step), so no random state is stored. Nothing read from here can run code.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors import torch as safetensors
from torch import Tensor, nn

from ltm_pyro.errors import InputError
from ltm_pyro.files import durable, strict_json

WEIGHTS = "model.safetensors"
MOMENTS = "optimizer.safetensors"
PROGRESS = "progress.json"
BEST = "best.json"
SUMS = "SHA256SUMS"


@dataclass
class Progress:
    """How far a training run has come."""

    step: int = 0
    """The number of slow steps taken, including skipped ones."""
    tokens_seen: int = 0
    """The number of predicted tokens that the slow steps have read."""
    seconds: float = 0.0
    """The time spent in training steps."""
    num_skipped_steps: int = 0
    """The number of slow steps that were skipped because a value was not finite."""
    skips_in_a_row: int = 0
    """The number of steps that have been skipped since the last one that was not."""


def save(folder: Path, model: nn.Module, adamw: torch.optim.Optimizer, progress: Progress, num_kept: int) -> Path:
    """Write a checkpoint into the folder `checkpoints`, unless it has one of this step, and remove older ones.

    Args:
        num_kept: the number of newest checkpoints to keep. The best one (see :func:`mark_best`) is kept in addition.

    Raises:
        FloatingPointError: if a weight is not finite; nothing is written then.
        WriteError: if it cannot be written; earlier checkpoints are then unchanged.
    """
    weights = model.state_dict()
    if not all(weight.isfinite().all() for weight in weights.values()):
        raise FloatingPointError("a weight is not finite")
    target = folder / f"step-{progress.step:08d}"
    if not target.exists():
        with durable.new_folder(target) as partial:
            sums = {
                WEIGHTS: _write(partial / WEIGHTS, safetensors.save(weights)),
                MOMENTS: _write(partial / MOMENTS, safetensors.save(_moments(adamw))),
                PROGRESS: _write(partial / PROGRESS, json.dumps(dataclasses.asdict(progress)).encode()),
            }
            _write_sums(partial, sums)
    best = best_checkpoint(folder)
    for old in all_checkpoints(folder)[:-num_kept]:
        if old != best:
            durable.remove_folder(old)
    return target


def all_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in the folder `checkpoints`, oldest first."""
    return sorted(path for path in folder.glob("step-*") if path.is_dir())


def step_of(path: Path) -> int:
    """The step of a checkpoint, from its name."""
    return int(path.name.removeprefix("step-"))


def best_checkpoint(folder: Path) -> Path | None:
    """The checkpoint that was marked as the best most recently; None if none was."""
    return next((path for path in reversed(all_checkpoints(folder)) if (path / BEST).exists()), None)


def is_best(folder: Path, figure: dict[str, Any]) -> bool:
    """Whether a held-out figure is finite, and better than that of the best checkpoint.

    True also if the two figures cannot be compared, since they come from other texts or another number of draws.
    """
    best = best_checkpoint(folder)
    if not math.isfinite(figure["nats_per_token"]):
        return False
    if best is None:
        return True
    try:
        before = read_best(best)
    except InputError:  # nothing is known of a figure that cannot be read
        return True
    same = ("estimator", "num_samples", "num_tokens", "sequences")
    is_comparable = all(before.get(key) == figure.get(key) for key in same)
    return not is_comparable or figure["nats_per_token"] < before["nats_per_token"]


def mark_best(checkpoint: Path, figure: dict[str, Any]) -> None:
    """Record in the checkpoint that it is the best so far, and by which held-out figure.

    Args:
        figure: the record of the figure, as in `metrics.jsonl`; the lower its `nats_per_token`, the better.

    Raises:
        WriteError: if it cannot be written.
    """
    content = strict_json.dumps({"best_by": "nats_per_token", "split": "validation", **figure})
    # A crash between the two writes leaves a figure without a checksum. The line in `metrics.jsonl` is then still
    # missing, so the resumed run validates and marks the checkpoint again.
    digest = _write(checkpoint / BEST, content.encode())
    _write_sums(checkpoint, {**_read_sums(checkpoint), BEST: digest})


def read_best(checkpoint: Path) -> dict[str, Any]:
    """The held-out figure of a checkpoint that was marked as the best.

    Raises:
        InputError: if it cannot be read.
    """
    figure = _read_json(checkpoint / BEST)
    if not isinstance(figure, dict) or type(figure.get("nats_per_token")) is not float:
        raise InputError(f"{checkpoint / BEST} holds no figure")
    return figure


def restore(folder: Path, model: nn.Module, adamw: torch.optim.Optimizer) -> tuple[Path, Progress, list[InputError]]:
    """Put the newest checkpoint that can be read into the model and the optimiser.

    Returns:
        the checkpoint, the progress of the run at it, and what is wrong with each newer checkpoint.

    Raises:
        InputError: if none can be read.
    """
    errors: list[InputError] = []
    for checkpoint in reversed(all_checkpoints(folder)):
        try:
            load_weights(checkpoint, model)
            return checkpoint, load_progress(checkpoint, adamw), errors
        except InputError as error:
            errors.append(error)
    raise InputError(f"no checkpoint in {folder} can be read: {'; '.join(map(str, errors)) or 'there is none'}")


def remove_after(checkpoint: Path) -> None:
    """Remove the checkpoints that are newer than this one.

    Raises:
        WriteError: if one cannot be removed.
    """
    for newer in all_checkpoints(checkpoint.parent):
        if newer > checkpoint:
            durable.remove_folder(newer)


def copy_without_moments(checkpoint: Path, folder: Path) -> None:
    """Copy the weights and the progress, but not what only training needs, into an existing folder.

    Raises:
        InputError: if the checkpoint cannot be read.
        WriteError: if the copy cannot be written.
    """
    sums = {name: _write(folder / name, _read(checkpoint / name)) for name in (WEIGHTS, PROGRESS)}
    _write_sums(folder, sums)


def load_weights(checkpoint: Path, model: nn.Module) -> None:
    """Put the weights of a checkpoint into the model.

    Raises:
        InputError: if they cannot be read, or are those of another model.
    """
    weights, own = _read_tensors(checkpoint / WEIGHTS), model.state_dict()
    shapes, expected = ({name: list(value.shape) for name, value in each.items()} for each in (weights, own))
    # One of them says what is wrong; torch would name them all, and settings are wrong for many at once.
    wrong = [name for name in {**expected, **shapes} if shapes.get(name) != expected.get(name)]
    if wrong:
        first, others = wrong[0], f" (and {len(wrong) - 1} others do not fit either)" if len(wrong) > 1 else ""
        there, here = (each.get(first, "missing") for each in (shapes, expected))
        raise InputError(
            f"the weights in {checkpoint} do not fit this model, as its settings describe it: {first} is {there} in "
            f"the file and {here} in the model{others}"
        )
    model.load_state_dict(weights)


def load_progress(checkpoint: Path, adamw: torch.optim.Optimizer) -> Progress:
    """Put AdamW's moments into the optimiser, and return the progress of the run.

    Raises:
        InputError: if the checkpoint cannot be read.
    """
    progress = read_progress(checkpoint)
    weights = [weight for group in adamw.param_groups for weight in group["params"]]
    state: dict[int, dict[str, Tensor]] = {}
    for name, value in _read_tensors(checkpoint / MOMENTS).items():
        parts = re.fullmatch(r"(\d{1,9})\.(\w+)", name, re.ASCII)
        if not parts:
            raise InputError(f"the moments in {checkpoint} do not fit this model: {name}")
        state.setdefault(int(parts[1]), {})[parts[2]] = value
    shapes = {index: {key: value.shape for key, value in values.items()} for index, values in state.items()}
    expected = {n: {"step": (), "exp_avg": w.shape, "exp_avg_sq": w.shape} for n, w in enumerate(weights)}
    # Before the first step there are no moments at all.
    if state and shapes != expected:
        raise InputError(f"the moments in {checkpoint} do not fit this model")
    adamw.load_state_dict({"state": state, "param_groups": adamw.state_dict()["param_groups"]})
    return progress


def read_progress(checkpoint: Path) -> Progress:
    """The progress of the run at this checkpoint.

    Raises:
        InputError: if the checkpoint cannot be read.
    """
    path = checkpoint / PROGRESS
    values = _read_json(path)
    fields = {field.name: type(field.default) for field in dataclasses.fields(Progress)}
    if not isinstance(values, dict) or {name: type(value) for name, value in values.items()} != fields:
        raise InputError(f"{path} does not give the progress of the run: it needs {', '.join(fields)}")
    if not all(0 <= value < math.inf for value in values.values()):
        raise InputError(f"{path} does not give the progress of the run: a number is negative or not finite")
    return Progress(**values)


def _moments(adamw: torch.optim.Optimizer) -> dict[str, Tensor]:
    return {
        f"{index}.{key}": value
        for index, values in adamw.state_dict()["state"].items()
        for key, value in values.items()
    }


def _write(path: Path, content: bytes) -> str:
    durable.write(path, content)
    return hashlib.sha256(content).hexdigest()


def _write_sums(checkpoint: Path, sums: dict[str, str]) -> None:
    lines = [f"{digest}  {name}\n" for name, digest in sums.items()]
    durable.write(checkpoint / SUMS, "".join(lines).encode())


def _read_sums(checkpoint: Path) -> dict[str, str]:
    path = checkpoint / SUMS
    try:
        lines = path.read_text("utf-8").splitlines()
    except FileNotFoundError:
        raise InputError(
            f"{checkpoint} has no {SUMS}: it is damaged, or older than checksums; in the second case, make them in "
            f"it with: sha256sum *.* > {SUMS}"
        ) from None
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read: {error}") from None
    return {name: digest for digest, _, name in (line.partition("  ") for line in lines)}


def _read(path: Path) -> bytes:
    """The content of a file of a checkpoint, checked against its checksum."""
    sums = _read_sums(path.parent)
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error}") from None
    if hashlib.sha256(content).hexdigest() != sums.get(path.name):
        raise InputError(f"{path} is damaged: its checksum is not the one in {SUMS}")
    return content


def _read_json(path: Path) -> Any:
    content = _read(path)
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} cannot be read: {error}") from None


def _read_tensors(path: Path) -> dict[str, Tensor]:
    content = _read(path)
    try:
        return safetensors.load(content)
    # The last three are raised for numbers of a type or a size that torch does not have.
    except (SafetensorError, KeyError, TypeError, RuntimeError) as error:
        raise InputError(f"{path} cannot be read: {error}") from None

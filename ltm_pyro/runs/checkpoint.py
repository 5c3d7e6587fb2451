"""Checkpoints: the weights and everything needed to resume training, written whole or not at all.

`checkpoints/step-00000200/` holds `model.safetensors` (the weights), `optimizer.safetensors` (the optimiser's moments),
`progress.json`, and `SHA256SUMS` of these, which `sha256sum -c` reads too. The best checkpoint also holds `best.json`,
the held-out figure by which it is the best. All randomness of training is a pure function of (seed, step), so no random
state is stored. Nothing read from here can run code.

Where weights are split between processes, the moments are files in `optimizer/` instead, one of each process, in the
format of torch's distributed checkpointing for safetensors (its other format is a pickle). What was written by any
number of processes, split or not, is read by any other.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors import torch as safetensors
from torch import Tensor, nn

from ltm_pyro.errors import InputError, WriteError
from ltm_pyro.files import durable, strict_json

WEIGHTS = "model.safetensors"
MOMENTS = "optimizer.safetensors"
MOMENTS_IN_PARTS = "optimizer"
PROGRESS = "progress.json"
BEST = "best.json"
SUMS = "SHA256SUMS"
MOMENT = re.compile(r"(\d{1,9})\.(\w+)", re.ASCII)
"""The name of a moment: the number of the weight in the optimiser, and that of the moment."""


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


def save(
    folder: Path,
    weights: nn.Module | Mapping[str, Tensor],
    optimizer: torch.optim.Optimizer,
    progress: Progress,
    num_kept: int,
    write_parts: Callable[[Path], dict[str, str]] | None = None,
) -> Path:
    """Write a checkpoint into the folder `checkpoints`, unless it has one of this step, and remove older ones.

    Args:
        weights: the model, or its weights by their names.
        write_parts: writes the moments of all processes into an unfinished checkpoint, as :func:`write_part` does, and
            returns the checksums of their files; None for an optimiser that holds all moments.
        num_kept: the number of newest checkpoints to keep. The best one (see :func:`mark_best`) is kept in addition.

    Raises:
        FloatingPointError: if a weight is not finite; nothing is written then.
        WriteError: if it cannot be written; earlier checkpoints are then unchanged.
    """
    weights = weights.state_dict() if isinstance(weights, nn.Module) else weights
    if not all(weight.isfinite().all() for weight in weights.values()):
        raise FloatingPointError("a weight is not finite")
    target = path_of(folder, progress)
    if not target.exists():
        with durable.new_folder(target) as partial:
            sums = {WEIGHTS: _write(partial / WEIGHTS, safetensors.save(dict(weights)))}
            if write_parts is None:
                sums[MOMENTS] = _write(partial / MOMENTS, safetensors.save(_moments(optimizer)))
            else:
                sums |= write_parts(partial)
                if not _parts_in(partial) <= set(sums):  # over a network, files may be seen late
                    raise WriteError(f"{partial / MOMENTS_IN_PARTS} cannot be written: a process does not see its file")
            sums[PROGRESS] = _write(partial / PROGRESS, json.dumps(dataclasses.asdict(progress)).encode())
            _write_sums(partial, sums)
    best = best_checkpoint(folder)
    for old in all_checkpoints(folder)[:-num_kept]:
        if old != best:
            durable.remove_folder(old)
    return target


def path_of(folder: Path, progress: Progress) -> Path:
    """Where :func:`save` writes a checkpoint."""
    return folder / f"step-{progress.step:08d}"


def write_part(partial: Path, optimizer: torch.optim.Optimizer, group: Any) -> dict[str, str]:
    """Write this process's part of the moments into an unfinished checkpoint. All processes do so together.

    Args:
        group: the processes, which communicate on CPUs.

    Returns:
        the checksums of this process's files.

    Raises:
        WriteError: if it cannot be written, or another process cannot write.
    """
    from ltm_pyro.runs import parts

    try:
        written = parts.write(partial / MOMENTS_IN_PARTS, _moments(optimizer), group)
        return {f"{MOMENTS_IN_PARTS}/{path.name}": _digest(path) for path in written}
    except OSError as error:
        raise WriteError(f"{partial / MOMENTS_IN_PARTS} cannot be written: {error.strerror or error}") from None


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


def restore(
    folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer
) -> tuple[Path, Progress, list[InputError]]:
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
            return checkpoint, load_progress(checkpoint, optimizer), errors
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
    """Put the weights of a checkpoint into the model; where they are split between processes, this one's part.

    Raises:
        InputError: if they cannot be read, or are those of another model.
    """
    own = model.state_dict()
    is_split = _is_split(own.values())
    if is_split:
        from ltm_pyro.runs import parts

        _verify(checkpoint, WEIGHTS)
        stored = parts.shapes(checkpoint)
        shapes = {name: shape for name, shape in stored.items() if not MOMENT.fullmatch(name)}
    else:
        weights = _read_tensors(checkpoint / WEIGHTS)
        shapes = {name: list(value.shape) for name, value in weights.items()}
    expected = {name: list(value.shape) for name, value in own.items()}
    # One of them says what is wrong; torch would name them all, and settings are wrong for many at once.
    wrong = [name for name in {**expected, **shapes} if shapes.get(name) != expected.get(name)]
    if wrong:
        first, others = wrong[0], f" (and {len(wrong) - 1} others do not fit either)" if len(wrong) > 1 else ""
        there, here = (each.get(first, "missing") for each in (shapes, expected))
        raise InputError(
            f"the weights in {checkpoint} do not fit this model, as its settings describe it: {first} is {there} in "
            f"the file and {here} in the model{others}"
        )
    if is_split:
        parts.read_into(own, checkpoint)
    else:
        model.load_state_dict(weights)


def load_progress(checkpoint: Path, optimizer: torch.optim.Optimizer) -> Progress:
    """Put the moments into the optimiser, and return the progress of the run. Where weights are split between
    processes, the moments are this one's part.

    Raises:
        InputError: if the checkpoint cannot be read.
    """
    progress = read_progress(checkpoint)
    needed = _needed_moments(optimizer)
    moments = _read_moments(checkpoint, needed)
    shapes, expected = ({name: list(value.shape) for name, value in each.items()} for each in (moments, needed))
    # Before the first step there are no moments at all.
    if moments and shapes != expected:
        raise InputError(f"the moments in {checkpoint} do not fit this model")
    state: dict[int, dict[str, Tensor]] = {}
    for name, value in moments.items():
        number, _, key = name.partition(".")
        state.setdefault(int(number), {})[key] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
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


def _moments(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    return {
        f"{index}.{key}": value
        for index, values in optimizer.state_dict()["state"].items()
        for key, value in values.items()
    }


def _needed_moments(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The moments of an optimiser that has taken a step, by their names: for each a tensor of the same shape, which is
    split between processes as the moment is."""
    found: dict[str, Tensor] = {}
    number = torch.zeros(())
    weights = [(weight, group) for group in optimizer.param_groups for weight in group["params"]]
    for index, (weight, group) in enumerate(weights):
        names = ["momentum_buffer"] if group.get("num_maps") else ["exp_avg", "exp_avg_sq"]
        found |= {f"{index}.step": number} | {f"{index}.{name}": weight for name in names}
    return found


def _is_split(tensors: Iterable[Tensor]) -> bool:
    """Whether tensors are split between processes: `DTensor`s, whose import, like that of `parts`, takes a second."""
    return any(hasattr(tensor, "device_mesh") for tensor in tensors)


def _read_moments(checkpoint: Path, needed: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The moments in a checkpoint, of which those of split weights are split in the same way.

    Args:
        needed: what :func:`_needed_moments` returns.
    """
    files = [name for name in _read_sums(checkpoint) if name.startswith(f"{MOMENTS_IN_PARTS}/")]
    if not files and not _is_split(needed.values()):
        return _read_tensors(checkpoint / MOMENTS)
    from ltm_pyro.runs import parts

    for name in files or [MOMENTS]:
        _verify(checkpoint, name)
    folder = checkpoint / MOMENTS_IN_PARTS if files else checkpoint
    if files and _parts_in(checkpoint) != set(files):  # all files of the folder are read below
        raise InputError(f"{folder} has files that {SUMS} does not name")
    stored = {name: shape for name, shape in parts.shapes(folder).items() if MOMENT.fullmatch(name)}
    if stored and stored != {name: list(like.shape) for name, like in needed.items()}:
        raise InputError(f"the moments in {checkpoint} do not fit this model")
    moments = {name: torch.zeros_like(needed[name]) for name in stored}
    parts.read_into(moments, folder)
    return moments


def _parts_in(checkpoint: Path) -> set[str]:
    """The files of split moments, by the names that they have in the checksums."""
    return {f"{MOMENTS_IN_PARTS}/{path.name}" for path in (checkpoint / MOMENTS_IN_PARTS).iterdir()}


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
    _check(path, hashlib.sha256(content).hexdigest(), sums.get(path.name))
    return content


def _verify(checkpoint: Path, name: str) -> None:
    """Check a file of a checkpoint against its checksum, without all of it in memory."""
    try:
        digest = _digest(checkpoint / name)
    except OSError as error:
        raise InputError(f"{checkpoint / name} cannot be read: {error}") from None
    _check(checkpoint / name, digest, _read_sums(checkpoint).get(name))


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _check(path: Path, digest: str, expected: str | None) -> None:
    if digest != expected:
        raise InputError(f"{path} is damaged: its checksum is not the one in {SUMS}")


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

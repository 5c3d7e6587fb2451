"""A run: the folder that training writes.

config.yaml       the version of the file (see `migrations.py`), all settings, and what they were resolved to
                  (corpus, tokenizer, versions)
metrics.jsonl     one JSON object per logged step
checkpoints/      see `checkpoint.py`
tensorboard/      see `training/tensorboard.py`; only with --tensorboard
.lock             see `files/lock.py`
"""

from __future__ import annotations

import json
import platform
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyro
import tiktoken
import torch
import yaml
from torch import nn

from ltm_pyro.config import TrainConfig, from_dict, to_dict
from ltm_pyro.data import fingerprint
from ltm_pyro.errors import InputError
from ltm_pyro.files import durable, strict_json
from ltm_pyro.files.numbering import create_folder
from ltm_pyro.runs import checkpoint
from ltm_pyro.runs.checkpoint import Progress
from ltm_pyro.runs.migrations import VERSION, migrated


@dataclass(frozen=True)
class Run:
    """The folder of a run."""

    path: Path

    @property
    def config_path(self) -> Path:
        return self.path / "config.yaml"

    @property
    def metrics_path(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    def read_config(self) -> tuple[TrainConfig, dict[str, str]]:
        """The settings, and what they were resolved to.

        Raises:
            InputError: if the folder holds no run, or its config cannot be read.
        """
        try:
            values = read_settings(self.config_path)
        except FileNotFoundError:
            if not self.path.exists():
                raise InputError(f"there is no run {self.path}, nor any folder of that name") from None
            hint = "the run that comes with the package is called demo"
            raise InputError(f"{self.path} holds no run: it has no config.yaml ({hint})") from None
        if not isinstance(values.get("resolved"), dict):
            raise InputError(f"{self.config_path} is not the configuration of a run")
        resolved = values.pop("resolved")
        return from_dict(migrated(values)), resolved

    def write_config(self, config: TrainConfig, resolved: dict[str, str]) -> None:
        """Write `config.yaml`.

        Raises:
            WriteError: if it cannot be written; an existing file is then unchanged.
        """
        values = {"version": VERSION, **to_dict(config), "resolved": resolved}
        text = yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
        durable.write(self.config_path, text.encode())

    def checkpoint(self, which: str | int) -> Path:
        """The checkpoint of that name: newest, best (by the held-out figure of the validations), or that of a step.

        Raises:
            InputError: if there is none, or the name is another.
        """
        if which == "newest":
            return self.newest_checkpoint()
        if which == "best":
            return self.best_checkpoint()
        if not re.fullmatch("[0-9]+", str(which)):
            raise InputError(f"which must be newest, best or the number of a step, not {which!r}")
        there = {checkpoint.step_of(path): path for path in checkpoint.all_checkpoints(self.checkpoints)}
        if int(which) not in there:
            steps = ", ".join(map(str, there)) or "no step"
            raise InputError(f"{self.path} holds no checkpoint of step {int(which)}, but of {steps}")
        return there[int(which)]

    def newest_checkpoint(self) -> Path:
        """The newest checkpoint; in a folder of :func:`ltm_pyro.save_pretrained`, the folder itself.

        Raises:
            InputError: if there is none.
        """
        if (self.path / checkpoint.WEIGHTS).exists():
            return self.path
        checkpoints = checkpoint.all_checkpoints(self.checkpoints)
        if not checkpoints:
            raise InputError(f"{self.path} holds no checkpoint: start a new run in another folder")
        return checkpoints[-1]

    def best_checkpoint(self) -> Path:
        """The checkpoint of the best validation.

        Raises:
            InputError: if there is none.
        """
        best = checkpoint.best_checkpoint(self.checkpoints)
        if best is None:
            raise InputError(f"{self.path} holds no checkpoint that was validated")
        return best

    def restore(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[Progress, str | None]:
        """Go back to the newest checkpoint that can be read, and remove later and half-written files.

        Returns:
            the progress of the run at it, and in one line what was wrong with newer checkpoints, if there were any.

        Raises:
            InputError: if none can be read, or `metrics.jsonl` cannot; nothing is removed then.
            WriteError: if something cannot be removed.
        """
        restored, progress, errors = checkpoint.restore(self.checkpoints, model, optimizer)
        self.read_metrics()
        durable.remove_leftovers(self.path)
        checkpoint.remove_after(restored)
        self.forget_metrics_after(progress.step)
        damage = "; ".join(" ".join(str(error).split()) for error in errors)
        return progress, f"{damage}; going back to {restored} and repeating the steps after it" if errors else None

    def append_metrics(self, record: dict[str, Any]) -> None:
        """Add a line to `metrics.jsonl`; numbers that are not finite become null."""
        durable.append(self.metrics_path, f"{strict_json.dumps(record)}\n".encode())

    def read_metrics(self) -> list[dict[str, Any]]:
        """The lines of `metrics.jsonl`, but for the last one if a crash has cut it short.

        Raises:
            InputError: if another one is damaged, or the file cannot be read.
        """
        return [record for _, record in self._metrics()]

    def forget_metrics_after(self, step: int) -> None:
        """Drop the lines of steps that a resumed run takes again, and the report that it will write again."""
        kept = [line for line, record in self._metrics() if record["step"] <= step and record.get("split") != "report"]
        durable.write(self.metrics_path, b"".join(line + b"\n" for line in kept))

    def _metrics(self) -> list[tuple[bytes, dict[str, Any]]]:
        try:
            lines = self.metrics_path.read_bytes().removesuffix(b"\n").split(b"\n")
        except FileNotFoundError:
            return []
        except OSError as error:
            raise InputError(f"{self.metrics_path} cannot be read: {error}") from None
        records = [_record(line) for line in lines]
        if None in records[:-1]:
            raise InputError(
                f"line {records.index(None) + 1} of {self.metrics_path} is not the record of a step: "
                "the file is damaged; correct that line or remove it"
            )
        return [(line, record) for line, record in zip(lines, records, strict=True) if record is not None]


def read_settings(path: Path) -> dict[str, Any]:
    """The values of a file of settings.

    Raises:
        FileNotFoundError: there is none.
        InputError: it cannot be read, or holds something else.
    """
    try:
        values = _safe_load(path.read_text("utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise FileNotFoundError(path) from None
    except (OSError, ValueError, OverflowError, yaml.YAMLError) as error:
        raise InputError(f"{path} cannot be read: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict) or not all(isinstance(name, str) for name in values):
        raise InputError(f"{path} holds no settings")
    return values


def _safe_load(text: str) -> Any:
    """The values in a YAML text that needs no more of YAML than :meth:`Run.write_config` does.

    Raises:
        ValueError, OverflowError, yaml.YAMLError: if it holds anything else.
    """
    # Before anything is built: deep nesting would end the recursion of the builder, an alias can stand for a value
    # that never ends, and a tag makes PyYAML raise whatever a conversion stumbles on.
    depth = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > 8 or isinstance(event, yaml.AliasEvent) or getattr(event, "tag", None):
            where = f"line {event.start_mark.line + 1}" if event.start_mark else "it"
            raise ValueError(f"{where} has deep nesting, an alias or a tag, which settings never have")
    return yaml.safe_load(text)


def _record(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) and type(record.get("step")) is int else None


def check_is_free(out: str, can_resume: bool = False) -> None:
    """Check that a command may write its results to this folder.

    Args:
        can_resume: whether the command can continue a run that exists already.

    Raises:
        InputError: if it holds anything already.
    """
    path = Path(out)
    try:
        if path.exists() and any(path.iterdir()):
            is_run = (path / "config.yaml").exists()
            hint = "add --resume to continue it, or " if is_run and can_resume else ""
            raise InputError(f"--out {out} holds {'a run' if is_run else 'files'} already: {hint}give another folder")
    except OSError as error:
        raise InputError(f"--out {out} cannot be used: {error}") from None


def create_run(out: str | None, default_name: str) -> Run:
    """Make the folder of a new run: `out`, or the first free one of runs/NAME, runs/NAME-2, …

    Raises:
        InputError: if `out` holds anything already, or the folder cannot be made or written to.
    """
    if out is not None:
        check_is_free(out, can_resume=True)
    run = Run(create_folder(out, Path("runs"), default_name))
    try:
        run.checkpoints.mkdir()
    except FileExistsError:
        raise InputError(f"--out {out}: another process has just begun a run there; give another folder") from None
    return run


def resolved_against(
    corpus_sha256: str, encoding: tiktoken.Encoding, device: torch.device, num_processes: int
) -> dict[str, str]:
    """What the settings of a run mean on this machine: corpus, tokenizer, device and versions that they stood for."""
    return {
        "corpus_sha256": corpus_sha256,
        "tokenizer_sha256": fingerprint(encoding),
        "device": str(device),
        "processes": str(num_processes),
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "pyro": pyro.__version__,
    }

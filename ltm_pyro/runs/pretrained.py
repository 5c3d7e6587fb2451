"""An exported model: a folder with the model of a run, without what only training needs.

config.yaml         the settings, and what they were resolved to
model.safetensors   the weights; with progress.json and SHA256SUMS, as in a checkpoint
README.md           the model card: data, steps, scheme, and the figures with their meaning

`ltm_pyro.from_pretrained` reads this folder, and so do `ltm_pyro.load` and the commands that read a run.
"""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

import torch

from ltm_pyro.config import NO_INFERENCE, TrainConfig
from ltm_pyro.errors import InputError
from ltm_pyro.files import durable
from ltm_pyro.runs import checkpoint
from ltm_pyro.runs.checkpoint import Progress
from ltm_pyro.runs.run import Run
from ltm_pyro.runs.trained import TrainedModel, load


def save_pretrained(run: str | os.PathLike[str], folder: str | os.PathLike[str], which: str | int = "newest") -> None:
    """Write the model of a run into a new folder, whole or not at all.

    Args:
        which: the "newest" checkpoint, the one with the "best" held-out figure of the validations in training, or the
            one of a step, given by its number.

    Raises:
        InputError: if the run cannot be read, or the folder exists already.
        WriteError: if it cannot be written.
    """
    source, target = Run(Path(run)), Path(folder)
    config, resolved = source.read_config()
    chosen = source.checkpoint(which)
    progress = checkpoint.read_progress(chosen)
    figures = [r for r in source.read_metrics() if r["step"] == progress.step and r.get("split") != "train"]
    if target.exists():
        raise InputError(f"{target} exists already: give a new folder")
    with durable.new_folder(target) as partial:
        checkpoint.copy_without_moments(chosen, partial)
        Run(partial).write_config(dataclasses.replace(config, out=None), resolved)
        card = model_card(target.name, config, resolved, progress, figures)
        durable.write(partial / "README.md", card.encode())


def from_pretrained(folder: str | os.PathLike[str], device: torch.device | str = "cpu") -> TrainedModel:
    """The model in a folder of :func:`save_pretrained`.

    Raises:
        InputError: if the folder is not such a folder, or cannot be read.
    """
    if not (Path(folder) / checkpoint.WEIGHTS).is_file():
        raise InputError(
            f"{folder} holds no model of save_pretrained: it has no {checkpoint.WEIGHTS}; ltm_pyro.load reads runs"
        )
    return load(folder, device)


def model_card(
    name: str, config: TrainConfig, resolved: dict[str, str], progress: Progress, figures: list[dict[str, Any]]
) -> str:
    """What a reader of the weights must know, as Markdown.

    Args:
        figures: the lines of `metrics.jsonl` with held-out figures of these weights.
    """
    inference = "no z" if config.inference == NO_INFERENCE else f"{config.inference}, {config.fast_steps} fast steps"
    model = config.model
    facts = {
        "data": f"{config.data} (SHA-256 {resolved.get('corpus_sha256')})",
        "tokenizer": config.tokenizer,
        "steps": f"{progress.step:,} slow steps of {config.batch_size} sequences, {progress.tokens_seen:,} tokens",
        "inference of z": inference,
        "model": f"{model.num_layers} layers of width {model.width}, with {model.num_slots} slots each; "
        f"window {model.window}, length {model.length}",
        "trained with": ", ".join(f"{key} {resolved.get(key)}" for key in ("python", "torch", "pyro")),
    }
    rows = [
        (
            "held-out text of the same corpus",
            figure.get("estimator"),
            figure.get("posterior") or "",
            figure.get("fast_steps"),
            _error_text(figure.get("nats_per_token"), figure.get("standard_error")),
            _error_text(figure.get("bits_per_byte"), None),
            figure.get("num_sequences"),
            "yes" if figure.get("valid_bound") else "**no**",
        )
        for figure in figures
    ]
    what_z_is = _what_z_is(config)
    head = ("text", "estimator", "z from", "T", "nats/token ± over documents", "bits/byte", "sequences", "valid bound")
    table = "\n".join(map(_row, (head, ["---"] * len(head), *rows)))
    return f"""---
library_name: ltm_pyro
tags: [latent-thought-model, pyro]
---

# {name}

A Latent Thought Model (Kong et al. 2025): a causal transformer that reads a short window of the text.
{what_z_is}

{chr(10).join(map(_row, [("", ""), ("---", "---"), *facts.items()]))}

## Figures

{table if rows else "None: these weights were not scored in training."}

## Use

```python
import ltm_pyro

ltm = ltm_pyro.from_pretrained("{name}")
```
"""


def _what_z_is(config: TrainConfig) -> str:
    if config.inference == NO_INFERENCE:
        return "This one has no latent z: it is the autoregressive model that others are compared with."
    read = "the text before each block" if config.objective.block_size is not None else "the whole text"
    if config.model.thoughts == "fast-weights":
        return f"It adds a latent z to its weights, which is inferred from {read}."
    return f"Its layers attend to a latent z, which is inferred from {read}."


def _row(cells: Any) -> str:
    texts = (" ".join(str(cell).split()).replace("|", r"\|") for cell in cells)
    return f"| {' | '.join(texts)} |"


def _error_text(value: float | None, error: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.4f}" if error is None else f"{value:.4f} ± {error:.4f}"

"""How much of a text z holds: the text is written again from z alone, and compared token by token.

With z of the first l layers kept and that of the others drawn from the prior, this shows how much of the text those
layers hold. The share of right tokens is a strict figure, since a text that has slipped by one token counts as wrong
from there on; with all of z from the prior it is the share that is right by chance.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from ltm_pyro.evaluation.plots import style
from ltm_pyro.inference import PRIOR, Noise, infer
from ltm_pyro.models import LatentThoughtModel, Sampling, TokenBatch


def token_accuracy(model: LatentThoughtModel, batch: TokenBatch, z_BLSD: Tensor) -> Tensor:
    """Share of each text's tokens, end-of-text included, that are right in the most likely text given z: [B] float64.

    Nothing of the text is read. Positions of weight 0 do not count.
    """
    length = batch.tokens.shape[1]
    written = model.generate(z_BLSD, length, sampling=Sampling(temperature=0))
    counts = (batch.weights != 0).double()
    return ((written == batch.tokens) * counts).sum(1) / counts.sum(1)


def accuracy_by_layers(model: LatentThoughtModel, batch: TokenBatch, z_BLSD: Tensor, rng: Noise) -> Tensor:
    """Token accuracy with z of the first 0, 1, … L layers kept, and the others from the prior: [L + 1, B] float64."""
    prior = PRIOR.distribution(infer(PRIOR, model, batch, rng), rng, "reconstruction").sample()
    kept = [torch.cat([z_BLSD[:, :layers], prior[:, layers:]], dim=1) for layers in range(z_BLSD.shape[1] + 1)]
    return torch.stack([token_accuracy(model, batch, z) for z in kept])


@style.in_style
def plot(accuracies: Tensor, path: str | Path) -> None:
    """Draw the mean over texts of what `accuracy_by_layers` gives, with its standard error."""
    canvas = style.new_canvas(2.5, style.WIDTH / 2)
    axes = canvas.add_subplot()
    num_kept, num_texts = accuracies.shape
    error = accuracies.std(1) / num_texts**0.5 if num_texts > 1 else None
    axes.errorbar(range(num_kept), accuracies.mean(1), yerr=error, marker="o", color=style.COLOURS[0])
    axes.set_xticks(range(num_kept))
    axes.set_xlabel("layers of z that are kept")
    axes.set_ylabel("share of tokens that are right")
    axes.set_title(f"{num_texts} texts written again from z")
    axes.grid(alpha=0.5)
    canvas.savefig(path, dpi=200)

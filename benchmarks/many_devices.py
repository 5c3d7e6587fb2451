"""Compute the memory and the communication of training in several processes.

    python benchmarks/many_devices.py [--processes 8]

Every process holds the weights, their gradients and AdamW's two moments, all in float32. It also holds the activations
of the fast loop, which are not counted here; they depend only on --micro-batch-size. The gradients are averaged once in
each slow step by a ring all-reduce, in which each of N processes sends and receives 2 (N - 1) / N times their size.
"""

from __future__ import annotations

import argparse
import dataclasses

import torch

from ltm_pyro.config import TrainConfig, preset
from ltm_pyro.models import LatentThoughtModel

VOCAB_SIZE = 50_258  # the ids of gpt2, and begin-of-text
LARGE = preset("large")
MODELS = {
    "large": LARGE,
    # As large, but with 16 instead of 12 layers, each four times as wide.
    "1 B": dataclasses.replace(
        LARGE, model=dataclasses.replace(LARGE.model, num_layers=16, width=2048, num_heads=32, hidden=5504)
    ),
}


def num_weights(config: TrainConfig) -> int:
    """The number of weights of a model, counted without allocating them."""
    with torch.device("meta"):
        model = LatentThoughtModel(config.model, VOCAB_SIZE, VOCAB_SIZE - 2)
    return sum(weight.numel() for weight in model.parameters())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=8)
    options = parser.parse_args()
    size = options.processes
    print(
        f"| {size} processes | weights | weights, gradients, moments [GB each] | sent by each in a slow step [GB] "
        "| sequences of each | fast steps in between |\n|---|---|---|---|---|---|"
    )
    for name, config in MODELS.items():
        count = num_weights(config)
        parts = ", ".join(f"{count * copies * 4 / 1e9:.2f}" for copies in (1, 1, 2))
        sent = 2 * (size - 1) / size * count * 4 / 1e9
        print(
            f"| {name} | {count:,} | {parts} | {sent:.2f} | {config.batch_size // size} | {config.fast_steps} |",
            flush=True,
        )


if __name__ == "__main__":
    main()

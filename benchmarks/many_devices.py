"""Compute the memory and the communication of training in several processes.

    python benchmarks/many_devices.py [--processes 8]

Every process holds the weights, their gradients and AdamW's two moments, all in float32. With --sharded it holds its
part of weights and moments between steps; within a slow step it holds all weights and all gradients as well, until they
are reduced, a layer at a time. Beside them it holds what the backward pass of a step needs of the sequences that are
inferred together (--micro-batch-size). That is counted on torch's device "meta", which computes nothing: all that
autograd saves of one sequence, without the weights, in float32. (In bfloat16 what matrix products save takes half as
much.) The gradients are averaged once in each slow step by a ring all-reduce, in which each of N processes sends and
receives 2 (N - 1) / N times their size. With --sharded it sends half of that for the weights, and half for the
gradients.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable

import pyro
import torch
from torch import Tensor

from ltm_pyro.config import TrainConfig, preset
from ltm_pyro.data import token_batch
from ltm_pyro.inference.streaming import gradient_of_block
from ltm_pyro.inference.svi import predict_backward
from ltm_pyro.models import LatentThoughtModel

VOCAB_SIZE = 50_258  # the ids of gpt2, and begin-of-text
LARGE = preset("large")
MODELS = {
    "large": LARGE,
    # As large, but with 16 instead of 12 layers, each four times as wide.
    "1 B": dataclasses.replace(
        LARGE, model=dataclasses.replace(LARGE.model, num_layers=16, width=2048, num_heads=32, hidden=5504)
    ),
    # The depth and width of common models of this size; cross-attention has a part of the weights.
    "7 B": dataclasses.replace(
        LARGE, model=dataclasses.replace(LARGE.model, num_layers=32, width=4096, num_heads=32, hidden=5632)
    ),
}


def saved_bytes(model: LatentThoughtModel, work: Callable[[], object]) -> int:
    """What autograd saves while it works, in bytes, without the weights."""
    weights = {weight.untyped_storage()._cdata for weight in model.parameters()}
    sizes: dict[int, int] = {}
    kept = []  # or another tensor could take its place in memory, and its number

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            sizes[storage._cdata] = storage.nbytes()
            kept.append(storage)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        work()
    return sum(sizes.values())


def needs(config: TrainConfig) -> tuple[int, int, int]:
    """The number of weights, and the bytes that the backward passes of a fast and of a slow step need of a sequence."""
    with torch.device("meta"):
        model = LatentThoughtModel(config.model, VOCAB_SIZE, VOCAB_SIZE - 2)
    batch = token_batch(torch.zeros(1, config.model.length, dtype=torch.int64)).to("meta")
    z = torch.zeros(1, *config.model.latent_shape, device="meta")
    fast = saved_bytes(model, lambda: gradient_of_block(model, model.precompute(batch), z))
    slow = saved_bytes(model, lambda: predict_backward(model, z, batch, 1.0))
    return sum(weight.numel() for weight in model.parameters()), fast, slow


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=8)
    options = parser.parse_args()
    size = options.processes
    heads = [
        f"{size} processes",
        "weights",
        "weights, gradients, moments [GB each]",
        "sharded: between steps, in a slow step [GB each]",
        "a sequence in a fast step, in a slow step [GB]",
        "sent by each in a slow step [GB]",
        "sequences of each",
        "fast steps in between",
    ]
    print(f"| {' | '.join(heads)} |\n{'|---' * len(heads)}|")
    for name, config in MODELS.items():
        count, fast, slow = needs(config)
        cells = [
            name,
            f"{count:,}",
            ", ".join(f"{count * copies * 4 / 1e9:.2f}" for copies in (1, 1, 2)),
            ", ".join(f"{count * copies * 4 / 1e9:.2f}" for copies in (3 / size, 2 + 3 / size)),
            f"{fast / 1e9:.2f}, {slow / 1e9:.2f}",
            f"{2 * (size - 1) / size * count * 4 / 1e9:.2f}",
            f"{config.batch_size // size}",
            f"{config.fast_steps}",
        ]
        print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    with pyro.validation_enabled(False):
        main()

"""Measure what training on the past of each block costs, against the autoregressive model's training.

    python benchmarks/past_cost.py [--block-sizes 64 128 256] [--threads 1] [--rounds 9]

Both are of preset tiny with new weights on the same random bytes: "no z" is the decoder without z, "past" the decoder
with thoughts that map absorbs in one step a block. A step here is the gradient of the loss; the optimiser is left out,
as it costs both the same. The models take turns, so that a change of the machine's speed meets all of them; times are
medians, with the quartiles. Operations are counted (`ltm_pyro.evaluation.operations`).
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import sys
import time
from collections.abc import Callable

import torch
from timing import machine

from ltm_pyro.config import TrainConfig, preset, scheme_of
from ltm_pyro.data import token_batch
from ltm_pyro.evaluation import operations
from ltm_pyro.inference import SequenceNoise
from ltm_pyro.inference.objectives.past import Past
from ltm_pyro.models import LatentThoughtModel


def step_of(config: TrainConfig) -> tuple[Callable[[], object], float]:
    """A training step without the optimiser, and its operations per token."""
    torch.manual_seed(0)
    model = LatentThoughtModel(config.model, 258, 256)
    tokens = torch.randint(256, (config.batch_size, config.model.length))
    batch, scheme, objective = token_batch(tokens), scheme_of(config), config.objective

    def step() -> object:
        model.zero_grad()
        return objective.backward(model, model, scheme, batch, SequenceNoise(0), tokens.numel())

    return step, operations.of_training(model, scheme, objective)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--block-sizes", type=int, nargs="+", default=[64, 128, 256])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=9)
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    configs = {"no z": preset("tiny", "none")}
    for size in chosen.block_sizes:
        past = preset("tiny", "map", "past")
        objectives = {**past.objectives, "past": Past(block_size=size)}
        configs[f"past, blocks of {size}"] = dataclasses.replace(past, objectives=objectives)
    steps = {name: step_of(config) for name, config in configs.items()}
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(chosen.rounds + 1):
        for name, (step, _) in steps.items():
            started = time.perf_counter()
            step()
            if number:  # the first round is a warm-up
                seconds[name].append(time.perf_counter() - started)
    num_tokens = preset("tiny").batch_size * preset("tiny").model.length
    plain = statistics.median(seconds["no z"])
    print(f"`python benchmarks/past_cost.py {' '.join(sys.argv[1:])}`\n\n{machine(torch.device('cpu'))}\n")
    print("| training | M operations a token | of no z | s a step (quartiles) | tokens/s | times that of no z |")
    print("|---|---|---|---|---|---|")
    for name, (_, count) in steps.items():
        low, middle, high = statistics.quantiles(seconds[name], n=4)
        print(
            f"| {name} | {count / 1e6:.2f} | {count / steps['no z'][1]:.2f} | {middle:.3f} ({low:.3f} to {high:.3f}) | "
            f"{num_tokens / middle:,.0f} | {middle / plain:.2f} |"
        )


if __name__ == "__main__":
    main()

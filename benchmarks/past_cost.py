"""Measure what training on the past of each block costs, against the autoregressive model's training.

    python benchmarks/past_cost.py [--block-sizes 64 128 256] [--threads 1] [--rounds 9] [--lengths 2048 2048 1500 600]

Both are of preset tiny with new weights on the same random bytes: "no z" is the decoder without z, "past" the decoder
with thoughts that map absorbs in one step a block. A step here is the gradient of the loss; the optimiser is left out,
as it costs both the same. The models take turns, so that a change of the machine's speed meets all of them; times are
medians, with the quartiles. Operations are counted (`ltm_pyro.evaluation.operations`). With --lengths there is a row
more for each size of blocks, with texts of these numbers of tokens; a text that has ended is not computed any more.
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


def step_of(config: TrainConfig, lengths: list[int]) -> tuple[Callable[[], object], float]:
    """A training step without the optimiser on texts of these lengths, and its operations per token where all are as
    long as the longest."""
    torch.manual_seed(0)
    model = LatentThoughtModel(config.model, 258, 256)
    tokens = torch.randint(256, (config.batch_size, config.model.length))
    batch = token_batch(tokens).prefix(torch.tensor(lengths))
    scheme, objective = scheme_of(config), config.objective

    def step() -> object:
        model.zero_grad()
        return objective.backward(model, model, scheme, batch, SequenceNoise(0), sum(lengths))

    return step, operations.of_training(model, scheme, objective)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--block-sizes", type=int, nargs="+", default=[64, 128, 256])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=9)
    tiny = preset("tiny")
    parser.add_argument("--lengths", type=int, nargs=tiny.batch_size, help="at most 2048 each")
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    full = [tiny.model.length] * tiny.batch_size
    rows = {"no z": (preset("tiny", "none"), full)}
    for size in chosen.block_sizes:
        past = preset("tiny", "map", "past")
        objectives = {**past.objectives, "past": Past(block_size=size)}
        config = dataclasses.replace(past, objectives=objectives)
        rows[f"past, blocks of {size}"] = config, full
        if chosen.lengths:
            rows[f"past, blocks of {size}, texts of {', '.join(map(str, chosen.lengths))}"] = config, chosen.lengths
    steps = {name: step_of(config, lengths) for name, (config, lengths) in rows.items()}
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(chosen.rounds + 1):
        for name, (step, _) in steps.items():
            started = time.perf_counter()
            step()
            if number:  # the first round is a warm-up
                seconds[name].append(time.perf_counter() - started)
    plain = statistics.median(seconds["no z"])
    print(f"`python benchmarks/past_cost.py {' '.join(sys.argv[1:])}`\n\n{machine(torch.device('cpu'))}\n")
    print("| training | M operations a token | of no z | s a step (quartiles) | tokens/s | times that of no z |")
    print("|---|---|---|---|---|---|")
    for name, (_, count) in steps.items():
        low, middle, high = statistics.quantiles(seconds[name], n=4)
        print(
            f"| {name} | {count / 1e6:.2f} | {count / steps['no z'][1]:.2f} | {middle:.3f} ({low:.3f} to {high:.3f}) | "
            f"{sum(rows[name][1]) / middle:,.0f} | {middle / plain:.2f} |"
        )


if __name__ == "__main__":
    main()

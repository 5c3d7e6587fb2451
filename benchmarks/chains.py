"""Measure the cost of Markov chains: the time of `infer` with 1, 2, 4, 8 and 16 chains.

    python benchmarks/chains.py

Chains are a dimension of the batch. The models have random weights, and z of one text is inferred. The chain counts are
timed in turns in one process; the table shows the median and the quartiles over the rounds.
"""

from __future__ import annotations

import argparse
import platform
import time

import pyro
import torch

from ltm_pyro.data import UniformLanguage, token_batch
from ltm_pyro.inference import SCHEMES, BatchNoise, infer
from ltm_pyro.models import DecoderConfig, LatentThoughtModel

CHAINS = (1, 2, 4, 8, 16)
SHAPES = {
    "width 16, 2 layers, 64 tokens": DecoderConfig(
        num_layers=2, width=16, num_heads=2, hidden=32, num_slots=2, window=16, length=64
    ),
    "width 64, 2 layers, 64 tokens": DecoderConfig(
        num_layers=2, width=64, num_heads=2, hidden=128, num_slots=2, window=16, length=64
    ),
    "width 128, 3 layers, 256 tokens": DecoderConfig(window=64, length=256),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inference", choices=("langevin", "mala", "underdamped", "hmc"), default="mala")
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    print(f"`{options.inference}`, 16 steps, one text; Python {platform.python_version()}, torch {torch.__version__}, ")
    print(f"{torch.get_num_threads()} thread(s); median of {options.rounds} rounds (quartiles)\n")
    print("| model | " + " | ".join(f"{count} chain{'s' * (count > 1)} [ms]" for count in CHAINS) + " | 8 : 1 |")
    print("|---|" + "---|" * (len(CHAINS) + 1))
    for name, config in SHAPES.items():
        model = LatentThoughtModel(config, vocab_size=258, end_of_text=256)
        batch = token_batch(UniformLanguage(256).sample(1, config.length, torch.Generator().manual_seed(0)))
        seconds = {count: [] for count in CHAINS}
        for number in range(options.rounds + 1):
            for count in CHAINS:
                scheme = SCHEMES[options.inference](num_steps=16, num_chains=count)
                started = time.perf_counter()
                infer(scheme, model, batch, BatchNoise(torch.Generator().manual_seed(number)))
                if number:  # the first round is a warm-up
                    seconds[count].append(time.perf_counter() - started)
        quartiles = {
            count: torch.tensor(values).mul(1000).quantile(torch.tensor([0.25, 0.5, 0.75])).tolist()
            for count, values in seconds.items()
        }
        cells = [f"{middle:.1f} ({low:.1f}-{high:.1f})" for low, middle, high in quartiles.values()]
        print(f"| {name} | {' | '.join(cells)} | {quartiles[8][1] / quartiles[1][1]:.2f} |", flush=True)


if __name__ == "__main__":
    with pyro.validation_enabled(False):
        main()

"""Measure how fast chains mix on stiff directions, by the units in which they move.

    python benchmarks/stiff_chains.py [RUN ...] [--seeds 3]

Chains move alike in all dimensions, in the scales that `vi` has fitted (`vi_steps`), or in the shape that `lowrank` has
fitted (`vi_rank`). The problems are those of `stiff.py` with curvature 100; for each RUN, the folder of a trained run,
held-out texts. The table shows means over 4 texts and over seeds: the fitted length of a leapfrog, the effective sample
size for each 1,000 gradients (the median over numbers of z), and the largest R̂ of any number of z.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from typing import Any

import pyro
import torch
from stiff import PROBLEMS
from thinking import opened
from timing import machine

from ltm_pyro.evaluation import figures
from ltm_pyro.inference import SCHEMES, SequenceNoise, infer
from ltm_pyro.inference.base import Model
from ltm_pyro.inference.diagnostics import mixing

NUM_TEXTS = 4
UNITS = {
    "alike": {},
    "`vi_steps` 48": {"vi_steps": 48},
    "`vi_steps` 48, `vi_rank` 16": {"vi_steps": 48, "vi_rank": 16},
}


def problems(runs: list[str]) -> Iterator[tuple[str, Model, Any]]:
    """Names, programs and batches."""
    for name, problem in PROBLEMS.items():
        if name.endswith("c = 100"):
            yield name, problem, problem.sample()[torch.arange(NUM_TEXTS)]
    for folder in runs:
        run = opened(folder)
        yield run.name, run.trained.model, run.packed.batch(figures.chosen_sequences(len(run.packed), NUM_TEXTS))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*", metavar="RUN", help="folders of runs")
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    print(f"`python benchmarks/stiff_chains.py {' '.join(sys.argv[1:])}`\n\n{machine(torch.device('cpu'))}\n")
    print("| problem | scheme | units | leapfrog | effective draws for 1,000 gradients | R̂ |")
    print("|---|---|---|---|---|---|")
    for name, model, batch in problems(options.runs):
        for scheme_name in ("mala", "hmc"):
            for units, settings in UNITS.items():
                scheme = SCHEMES[scheme_name](num_steps=200, num_chains=4, num_kept=100, **settings)
                found = []
                for seed in range(options.seeds):
                    rng = SequenceNoise(seed)
                    state = infer(scheme, model, batch, rng)
                    mixed = mixing(scheme.posterior(state, scheme.num_draws, rng))
                    assert mixed is not None
                    length = state.log_step_size.exp().mean().item()
                    size = mixed.effective_sample_size.mean().item() / scheme.num_gradients * 1000
                    found.append((length, size, mixed.largest_r_hat.max().item()))
                length, size, r_hat = torch.tensor(found).mean(0).tolist()
                print(f"| {name} | `{scheme_name}` | {units} | {length:.2f} | {size:.1f} | {r_hat:.2f} |", flush=True)


if __name__ == "__main__":
    with pyro.validation_enabled(False):
        main()

"""Measure what each setting of training on the past of each block gives.

    python benchmarks/past_variants.py --data DATA [--out FOLDER] [--seed 0] [--steps 250] [--only NAME ...]

Each variant changes one thing of "past" in thinking.py. It is trained by AdamW for a short time, and scored on 32
held-out sequences of 2,048 tokens, the same for all: by the code length with the fast steps that it was trained with,
and without any (what "amortized" then still does is what its encoder does). Differences between variants that are
smaller than the spread over seeds (results/thinking.md) say nothing. Runs that are finished are not trained again.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from thinking import NO_Z, OPTIMIZERS, OPTIONS, PAST, opened, scored, trained
from timing import machine

from ltm_pyro.evaluation.report import number_text

PAST_OPTIONS = OPTIONS[PAST]
LENGTH, NUM_SEQUENCES = 2048, 32
NUM_SAMPLES = 8
"""Draws of z for a block, of a scheme that has several."""
AMORTIZED = [*PAST_OPTIONS, "--inference", "amortized", "--model.num-slots", "64"]
VARIANTS = {
    "no z": OPTIONS[NO_Z],
    "no z, width 136": [*OPTIONS[NO_Z], "--model.width", "136", "--model.hidden", "366"],
    "past": PAST_OPTIONS,
    "blocks of 64": [*PAST_OPTIONS, "--block-size", "64"],
    "blocks of 256": [*PAST_OPTIONS, "--block-size", "256"],
    "half the step of map": [*PAST_OPTIONS, "--map.block-step", "0.15"],
    "twice the step of map": [*PAST_OPTIONS, "--map.block-step", "0.6"],
    "two fast steps": [*PAST_OPTIONS, "--fast-steps", "2"],
    "a quarter of the slots": [*PAST_OPTIONS, "--model.num-slots", "86"],
    "sequences of 512": [*PAST_OPTIONS, "--model.length", "512", "--batch-size", "16"],
    "sequences of 8192": [*PAST_OPTIONS, "--model.length", "8192", "--batch-size", "1"],
    "64 slots": [*PAST_OPTIONS, "--model.num-slots", "64"],
    "64 slots, amortized": [*AMORTIZED, "--fast-steps", "0"],
    "64 slots, amortized and one gradient": [*AMORTIZED, "--fast-steps", "1"],
    "vi": [*PAST_OPTIONS, "--inference", "vi"],
    "attended, 16 slots, prior affine": [
        *("--infer-from", "past", "--inference", "map"),
        *("--model.thoughts", "attended", "--model.num-slots", "16", "--model.prior", "affine"),
    ],
    # z moves by the step times the scale at which `scaled` starts: all that is missing is that the scale is learned.
    "scale not learned": [*PAST_OPTIONS, "--model.prior", "standard", "--map.block-step", "0.003"],
    "start learned": [*PAST_OPTIONS, "--model.prior", "affine", "--map.block-step", "0.003"],
    "prefix, vi, T = 1": ["--infer-from", "prefix", "--inference", "vi", "--fast-steps", "1"],
    "whole, vi, T = 1": ["--infer-from", "whole", "--inference", "vi", "--fast-steps", "1"],
    "window 64": [*PAST_OPTIONS, "--model.window", "64"],
    "no z, window 64": [*OPTIONS[NO_Z], "--model.window", "64"],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="a corpus, as --data of ltm_pyro.train")
    parser.add_argument("--out", type=Path, default=Path("past-variants"), help="folder of the runs and results")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=250)
    parser.add_argument("--only", nargs="+", choices=list(VARIANTS), default=list(VARIANTS), metavar="NAME")
    chosen = parser.parse_args()
    common = [*OPTIMIZERS["adamw"], "--data", chosen.data, "--steps", str(chosen.steps), "--validate-every", "100000"]
    common += ["--validation-sequences", "16", "--validation-samples", "1"]
    rows = ["| variant | training, k operations a token | bits/byte | without fast steps |", "|---|---|---|---|"]
    for name in chosen.only:
        folder = chosen.out / name.replace(", ", "-").replace(" ", "-").replace("=", "")
        trained(folder, chosen.seed, [*VARIANTS[name], *common])
        run = opened(str(folder), LENGTH)
        own = scored(run, NUM_SEQUENCES, num_samples=NUM_SAMPLES).record()["bits_per_byte"]
        without = None
        if run.trained.config.fast_steps:
            without = scored(run, NUM_SEQUENCES, 0, NUM_SAMPLES).record()["bits_per_byte"]
        operations = run.training_operations_per_token / 1e3
        rows.append(f"| {name} | {operations:.0f} | {own:.3f} | {number_text(without, 3)} |")
    command = f"`python benchmarks/past_variants.py {' '.join(sys.argv[1:])}`"
    text = f"{command}\n\n{machine(torch.device('cpu'))}\n\n" + "\n".join(rows) + "\n"
    (chosen.out / "past_variants.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()

"""Measure the cost of training on this machine: fast and slow step, tokens per second, memory, share of the limit.

    python benchmarks/speed.py [--presets tiny small] [--inference vi langevin] [--device cuda] [--precision bfloat16]
    python benchmarks/speed.py --scaling

The limit is the rate of a large matrix product in the same precision, measured in the same run. The operations of a
step are counted while the code runs. --scaling shows how the time of a training step grows with T, batch and length. It
also shows the slope of the logarithm of that time over the logarithm of the size, which is 1 where the cost is linear.
"""

from __future__ import annotations

import argparse
import dataclasses
import resource
from collections.abc import Callable
from typing import Any

import numpy as np
import pyro
import torch
from timing import machine, matrix_rate, median_seconds

from ltm_pyro.config import TrainConfig, preset, scheme_of
from ltm_pyro.data import token_batch
from ltm_pyro.evaluation.operations import count
from ltm_pyro.inference import SCHEMES, BatchNoise, infer
from ltm_pyro.inference.base import frozen
from ltm_pyro.inference.svi import WeightOptimizer, elbo_backward
from ltm_pyro.models import LatentThoughtModel


class Step:
    """A training step on random tokens, and its parts."""

    def __init__(self, config: TrainConfig, batch_size: int, options: argparse.Namespace) -> None:
        device = torch.device(options.device)
        vocab_size = 258 if config.tokenizer == "bytes" else 50_258
        torch.manual_seed(0)
        self.model = LatentThoughtModel(config.model, vocab_size, vocab_size - 2).to(device)
        if options.precision == "bfloat16":
            self.model.decoder.compute_dtype = torch.bfloat16
        if options.compile:
            self.model.decoder.compile()
        self.batch = token_batch(torch.randint(vocab_size - 2, (batch_size, config.model.length))).to(device)
        self.scheme = scheme_of(config)
        self.rng = BatchNoise(torch.Generator(device).manual_seed(0))
        self.optimizer = WeightOptimizer(self.model, config.optimizer, 1000)
        with frozen(self.model, self.batch) as self.precomputed:
            self.state = self.scheme.init(self.model, self.precomputed, self.rng)

    def fast(self) -> None:
        with frozen(self.model):
            self.scheme.step(self.model, self.state, self.precomputed, self.rng)

    def slow(self) -> None:
        guide = self.scheme.guide(self.model, self.state, self.batch, self.rng)
        elbo_backward(self.model, guide, self.batch, self.batch.tokens.numel())
        self.optimizer.update(0)

    def training(self) -> None:
        self.state = infer(self.scheme, self.model, self.batch, self.rng)
        self.slow()


def memory_mb(device: torch.device) -> float:
    """The peak memory of this process so far [MB]."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def table(options: argparse.Namespace) -> None:
    device = torch.device(options.device)
    rate = matrix_rate(device, getattr(torch, options.precision))
    print(f"a product of 4096 x 4096 matrices in {options.precision}: {rate / 1e9:.0f} G operations a second\n")
    print(
        "| preset | scheme | T | fast step [s] | of the limit | slow step [s] | of the limit | tokens/s | memory [MB] |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    for name in options.presets:
        for inference in options.inference:
            config = preset(name, inference, "whole")
            step = Step(config, options.batch_size, options)
            fast, slow = (median_seconds(work, options.rounds, device) for work in (step.fast, step.slow))
            shares = ("", "") if options.compile else (count(step.fast) / fast / rate, count(step.slow) / slow / rate)
            cells = [name, inference, config.fast_steps, f"{fast:.3f}", shares[0], f"{slow:.3f}", shares[1]]
            cells += [
                f"{step.batch.tokens.numel() / (config.fast_steps * fast + slow):,.0f}",
                f"{memory_mb(device):.0f}",
            ]
            print("| " + " | ".join(f"{x:.0%}" if type(x) is float else str(x) for x in cells) + " |", flush=True)
    print("\nMemory is the peak of this process so far.")


def scaling(options: argparse.Namespace) -> None:
    device = torch.device(options.device)
    base = preset(options.presets[0], infer_from="whole")
    window = base.model.window
    axes: dict[str, tuple[tuple[int, ...], Callable[[int], tuple[TrainConfig, int]]]] = {
        "T": ((4, 8, 16), lambda n: (dataclasses.replace(base, fast_steps=n), options.batch_size)),
        "batch [sequences]": ((2, 4, 8), lambda n: (base, n)),
        "length [tokens]": (
            tuple(window * n for n in (4, 8, 16)),
            lambda n: (dataclasses.replace(base, model=dataclasses.replace(base.model, length=n)), options.batch_size),
        ),
    }
    print(f"preset {options.presets[0]}, window {window}\n\n| | seconds of a training step | slope |\n|---|---|---|")
    for axis, (values, of) in axes.items():
        found: list[Any] = [
            median_seconds(Step(*of(value), options).training, options.rounds, device) for value in values
        ]
        slope = np.polyfit(np.log(values), np.log(found), 1)[0]
        cells = ", ".join(f"{value}: {seconds:.2f}" for value, seconds in zip(values, found, strict=True))
        print(f"| {axis} | {cells} | {slope:.2f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--presets", nargs="+", default=["tiny", "small"], choices=["tiny", "small", "medium", "large"])
    parser.add_argument("--inference", nargs="+", default=["vi"], choices=[n for n in SCHEMES if n != "amortized"])
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--precision", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument(
        "--compile", action="store_true", help="compile the decoder; its operations are then not counted"
    )
    parser.add_argument(
        "--scaling",
        action="store_true",
        help="show how the time of a training step of the first preset grows with T, batch and length",
    )
    options = parser.parse_args()
    print(f"{machine(torch.device(options.device))}, {options.batch_size} sequences")
    scaling(options) if options.scaling else table(options)


if __name__ == "__main__":
    with pyro.validation_enabled(False):
        main()

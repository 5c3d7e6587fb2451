"""Measure the cost of training on this machine: fast and slow step, tokens per second, memory, share of the limit.

    python benchmarks/speed.py [--presets tiny small] [--inference vi langevin] [--device cuda] [--precision bfloat16]
    python benchmarks/speed.py --scaling

A training step is `slow_step` of `ltm_pyro.training.loop`, with T fast steps and the slow one, its data and its noise;
the others are parts of it. The limit is the rate of a large matrix product in the same precision, measured in the same
run. The operations of a step are counted while the code runs. --scaling shows how the time of a training step grows
with T, batch and length, and the slope of its logarithm over that of the size, which is 1 where the cost is linear.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import pyro
import tiktoken
import torch
from timing import machine, matrix_rate, median_seconds, peak_memory

from ltm_pyro.config import TrainConfig, preset, scheme_of
from ltm_pyro.data import TokenizedCorpus
from ltm_pyro.data.documents import Documents
from ltm_pyro.data.packing import pack_as_stream
from ltm_pyro.evaluation.operations import count
from ltm_pyro.files.stop import StopSignal
from ltm_pyro.inference import SCHEMES, SequenceNoise
from ltm_pyro.inference.base import frozen
from ltm_pyro.inference.svi import WeightOptimizer, elbo_backward
from ltm_pyro.runs.checkpoint import Progress
from ltm_pyro.runs.trained import TrainedModel, build_model
from ltm_pyro.training.loop import Training, micro_batches, slow_step
from ltm_pyro.training.processes import Processes


def random_training(config: TrainConfig, options: argparse.Namespace) -> Training:
    """A training on random tokens, with new weights."""
    device = torch.device(options.device)
    vocab_size = 258 if config.tokenizer == "bytes" else 50_258
    # Any tokens will do: a tokenizer with as many of them, which needs no download.
    ranks = {number.to_bytes(2 if vocab_size > 258 else 1, "big"): number for number in range(vocab_size - 2)}
    specials = {"<|endoftext|>": vocab_size - 2, "<|beginoftext|>": vocab_size - 1}
    encoding = tiktoken.Encoding("random", pat_str=".", mergeable_ranks=ranks, special_tokens=specials)
    torch.manual_seed(0)
    model = build_model(config, encoding, device)
    if options.compile:
        model.decoder.compile()
    length, num_sequences = config.model.length, 4 * config.batch_size
    tokens = np.random.default_rng(0).integers(0, vocab_size - 2, length * num_sequences, dtype=np.uint16)
    documents = Documents([tokens], *np.array([[0], [len(tokens)]]))
    sequences = pack_as_stream(documents, encoding, length)
    return Training(
        trained=TrainedModel(model, encoding, config, Path(), {}, Progress()),
        corpus=cast(TokenizedCorpus, None),  # only the closing report reads it
        synchronised=model,
        scheme=scheme_of(config),
        optimizer=WeightOptimizer(model, config.optimizer, config.steps),
        train=sequences,
        validation=sequences,
        device=device,
        processes=Processes(),
    )


class Step:
    """A training step on random tokens, all sequences at a time, and its parts."""

    def __init__(self, config: TrainConfig, batch_size: int, options: argparse.Namespace) -> None:
        sizes = {"batch_size": batch_size, "micro_batch_size": batch_size, "precision": options.precision}
        self.training_run = random_training(dataclasses.replace(config, **sizes), options)
        self.model, self.scheme = self.training_run.model, self.training_run.scheme
        (batch,) = micro_batches(self.training_run)
        self.batch = batch.to(options.device)
        self.rng = SequenceNoise(0, options.device)
        with frozen(self.model, self.batch) as self.precomputed:
            self.state = self.scheme.init(self.model, self.precomputed, self.rng)

    def fast(self) -> None:
        with frozen(self.model):
            self.scheme.step(self.model, self.state, self.precomputed, self.rng)

    def slow(self) -> None:
        guide = self.scheme.guide(self.model, self.state, self.batch, self.rng)
        elbo_backward(self.model, guide, self.batch, self.batch.tokens.numel())
        self.training_run.optimizer.update(0)

    def training(self) -> None:
        """A whole step as the command takes it, with its data and its noise."""
        slow_step(self.training_run, StopSignal())


def table(options: argparse.Namespace) -> None:
    device = torch.device(options.device)
    rate = matrix_rate(device, getattr(torch, options.precision))
    print(f"a product of 4096 x 4096 matrices in {options.precision}: {rate / 1e9:,.0f} G operations a second\n")
    print(
        "| preset | scheme | T | fast step [ms] | of the limit | slow step [ms] | of the limit | training step [ms] "
        "| tokens/s | memory [MB] |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|")
    for name in options.presets:
        for inference in options.inference:
            config = preset(name, inference, "whole")
            with peak_memory(device) as peak:  # before operations are counted, which takes memory of its own
                step = Step(config, options.batch_size, options)
                whole = median_seconds(step.training, options.rounds, device)
            fast, slow = (median_seconds(work, options.rounds, device) for work in (step.fast, step.slow))
            shares = ["", ""]
            if not options.compile:
                counted = (count(step.fast) / fast, count(step.slow) / slow)
                shares = [f"{operations / rate:.0%}" for operations in counted]
            times = [f"{1e3 * seconds:,.1f}" for seconds in (fast, slow, whole)]
            cells = [name, inference, config.fast_steps, times[0], shares[0], times[1], shares[1], times[2]]
            cells += [f"{step.batch.tokens.numel() / whole:,.0f}", f"{peak[0]:,.0f}"]
            print("| " + " | ".join(map(str, cells)) + " |", flush=True)
    if device.type != "cuda":
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

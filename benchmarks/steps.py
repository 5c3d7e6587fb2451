"""Compare ways of taking steps of inference: the valid bound that each reaches, after how many gradients and how long.

    python benchmarks/steps.py RUN [--reference PATH]

RUN is the folder of a trained run. The table shows the negative ELBO of held-out texts of its corpus, in nats per text,
after a given number of gradients of log p(x, z) per text; the ELBO uses draws that no fit has seen. Time is that of
`infer` for all of these texts. The first way is the yardstick: 64 steps of Adam with the settings of the reference
implementation, but with fresh noise and from the prior. If --reference gives a clone of the reference, the time of the
yardstick is that of 64 of its own steps, on a model of the same shape. Otherwise it is that of our steps.

Adam also runs with the best settings of a grid, chosen at 16 steps on held-out texts other than those that are scored.
"""

from __future__ import annotations

import argparse
import bisect
import dataclasses
import itertools
import math
import statistics
import time
from typing import Any

import pyro
import torch
from timing import machine
from torch import Tensor
from vs_reference import Theirs, import_reference

import ltm_pyro
from ltm_pyro.data import PACKING, load_tokenized_corpus
from ltm_pyro.evaluation.figures import chosen_sequences
from ltm_pyro.inference import BatchNoise, SequenceNoise, bounds, infer
from ltm_pyro.inference.base import StepInfo
from ltm_pyro.inference.schemes.adam_vi import AdamVI
from ltm_pyro.inference.schemes.lowrank import LowRank
from ltm_pyro.inference.schemes.vi import VI, VIState

GRADIENTS = (1, 2, 4, 8, 16, 32, 64)
REFERENCE_STEPS = 64
GRID = tuple(itertools.product((0.01, 0.03, 0.1, 0.3), (1e-8, 0.01, 0.2, 1.0)))
"""The learning rates and epsilons of Adam that are tried."""
TUNED_AT = 16


@dataclasses.dataclass(frozen=True)
class CosineAdam(AdamVI):
    """`adamvi` with a learning rate that falls to 0 over T steps by a cosine."""

    def step(self, model: Any, state: Any, batch: Any, rng: Any) -> Any:
        share = (1 + math.cos(math.pi * min(1.0, int(state.step[0]) / self.num_steps))) / 2
        return AdamVI.step(
            dataclasses.replace(self, learning_rate=self.learning_rate * share), model, state, batch, rng
        )


@dataclasses.dataclass(frozen=True)
class Variant(VI):
    """`vi` with switches for its parts. With the defaults it is `vi` itself."""

    mirrored: bool = True
    shared_curvature: bool = True
    guarded: bool = True
    """Whether a step goes no further than to the optimum along it. If not, the look along it is taken all the same."""
    constant_rate: bool = False

    def _shrunk(self, excess: Tensor, step: Tensor, belief: Tensor | None = None) -> Tensor:
        return super()._shrunk(excess, step, belief) if self.shared_curvature else excess

    def _step_sizes(self, step: Tensor) -> Tensor:
        if self.constant_rate:
            return torch.full_like(step, self.learning_rate, dtype=torch.float32)
        return super()._step_sizes(step)

    def _part(self, step: Tensor, *args: Tensor) -> Tensor:
        return super()._part(step, *args) if self.guarded else torch.ones(len(step))

    def step(self, model: Any, state: VIState, batch: Any, rng: Any) -> tuple[VIState, StepInfo]:
        if not self.mirrored:  # what every second step mirrors is then new noise
            new = rng.normal("vi", state.sequence_ids, state.step, state.mean.shape[1:], like=state.mean)
            state = dataclasses.replace(state, noise=-new)
        return super().step(model, state, batch, rng)


@dataclasses.dataclass(frozen=True)
class FromEncoder:
    """`vi`, started at the mean that the run's encoder proposes."""

    num_steps: int

    @property
    def num_gradients(self) -> int:
        return self.num_steps


WAYS: dict[str, Any] = {
    "Adam of the reference, fresh noise, from the prior": lambda t: AdamVI(t, 0.34, 1e-8),
    "the same from scale exp(-2.5), as the reference starts": lambda t: AdamVI(t, 0.34, 1e-8, math.exp(-2.5)),
    "`adamvi` (rate 0.1, epsilon 0.2)": AdamVI,
    "`vi` (natural gradient, rate 0.5)": VI,
    "`vi`, rate 0.3": lambda t: VI(t, 0.3),
    "`vi`, rate 0.7": lambda t: VI(t, 0.7),
    "`vi`, rate 0.5 throughout": lambda t: Variant(t, constant_rate=True),
    "`vi`, draws not mirrored": lambda t: Variant(t, mirrored=False),
    "`vi`, no shared curvature": lambda t: Variant(t, shared_curvature=False),
    "`vi`, neither": lambda t: Variant(t, mirrored=False, shared_curvature=False),
    "`vi`, no look along the step": lambda t: Variant(t, guarded=False),
    "`vi`, every 4th position (a quarter of the vocabulary term)": lambda t: VI(t, stride=4),
    "`lowrank`": LowRank,
}


def within(way: Any, num_gradients: int) -> Any | None:
    """The scheme with the largest number of steps that this number of gradients allows; None if it allows no step."""
    steps = bisect.bisect_right(range(1, num_gradients + 1), num_gradients, key=lambda t: way(t).num_gradients)
    return way(steps) if steps else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", metavar="RUN", help="folder of a trained run")
    parser.add_argument("--reference", help="folder of a clone of the reference implementation")
    parser.add_argument("--sequences", type=int, default=32)
    parser.add_argument("--draws", type=int, default=32)
    parser.add_argument("--seeds", type=int, default=2, help="number of seeds for the noise of inference")
    options = parser.parse_args()
    ltm = ltm_pyro.load(options.run)
    config = ltm.config
    corpus = load_tokenized_corpus(config.data, config.text_column, ltm.tokenizer)
    held_out = PACKING[config.packing](corpus.validation.documents, ltm.tokenizer, config.model.length)
    chosen = chosen_sequences(len(held_out), 3 * options.sequences)
    # The first of these sequences were used while `vi` was developed, so the last are scored.
    for_tuning = held_out.batch(chosen[: options.sequences])
    texts = held_out.batch(chosen[2 * options.sequences :])

    def reached(scheme: Any, batch: Any = texts, seeds: int = options.seeds) -> tuple[float, float, float]:
        """The bound and the KL [nats per text], and the seconds of inference."""
        nelbo, kl, seconds = [], [], []
        for seed in range(seeds):
            started, warm = time.perf_counter(), None
            if isinstance(scheme, FromEncoder):
                with torch.no_grad():
                    warm, _ = ltm.model.encode(batch)
            fit = VI(scheme.num_steps) if isinstance(scheme, FromEncoder) else scheme
            state = infer(fit, ltm.model, batch, BatchNoise(torch.Generator().manual_seed(seed)), warm)
            seconds.append(time.perf_counter() - started)
            estimate = bounds.elbo(ltm.model, batch, fit.distribution(state, SequenceNoise(0)), options.draws)
            nelbo.append(estimate.nelbo.mean().item())
            kl.append(estimate.kl.mean().item())
        return statistics.mean(nelbo), statistics.mean(kl), min(seconds)

    prior, *_ = reached(VI(0))
    best, kl, _ = reached(VI(256))
    print(machine(torch.device("cpu")))
    print(
        f"{len(texts)} texts of {corpus.name}, {texts.weights.sum() / len(texts):.0f} tokens on average; z of "
        f"{math.prod(config.model.latent_shape)} dimensions; {options.draws} draws; mean of {options.seeds} seeds"
    )
    print(f"z from the prior: {prior:.2f} nats a text; `vi` after 256 steps: {best:.2f}, of which KL {kl:.2f}\n")
    yardstick, _, seconds = reached(next(iter(WAYS.values()))(REFERENCE_STEPS))
    whose = "ours"
    if options.reference:
        # The reference supports neither our vocabulary nor texts of different lengths. Its time depends on neither.
        theirs = Theirs(import_reference(options.reference, False), config, texts.tokens, False, ltm.tokenizer.n_vocab)
        theirs.fast_step()
        times = []
        for _ in range(8):
            started = time.perf_counter()
            theirs.fast_step()
            times.append(time.perf_counter() - started)
        seconds, whose = REFERENCE_STEPS * statistics.median(times), "the reference"
    print(f"The yardstick: {yardstick:.2f} nats a text, {REFERENCE_STEPS} steps of {whose} in {seconds:.1f} s\n")

    ways = dict(list(WAYS.items())[:3])
    for kind, schedule in ((AdamVI, "constant rate"), (CosineAdam, "cosine")):
        by_bound = {
            (rate, epsilon): reached(kind(TUNED_AT, rate, epsilon), for_tuning, seeds=1)[0] for rate, epsilon in GRID
        }
        rate, epsilon = min(by_bound, key=by_bound.get)
        ways[f"Adam, {schedule}, best of {len(GRID)}: rate {rate}, epsilon {epsilon}"] = (
            lambda t, kind=kind, rate=rate, epsilon=epsilon: kind(t, rate, epsilon)
        )
    adam = min(reached(way(REFERENCE_STEPS))[0] for way in ways.values())
    ways.update(WAYS)
    if config.model.encoder_layers:
        ways["`vi` from the encoder's mean"] = FromEncoder
    print(f"The best of these Adams after {REFERENCE_STEPS} steps: {adam:.2f}\n")
    ends = ("reaches yardstick at", "time of that / yardstick's", "reaches best Adam at")
    print(f"| gradients a text | {' | '.join(map(str, GRADIENTS))} | {' | '.join(ends)} |")
    print("|---|" + "---|" * (len(GRADIENTS) + 3))
    for name, way in ways.items():
        found = {count: reached(scheme) for count in GRADIENTS if (scheme := within(way, count))}
        cells = [f"{found[g][0]:.2f} ({found[g][1]:.1f})" if g in found else "" for g in GRADIENTS]
        good, better = (next((g for g in found if found[g][0] <= least), None) for least in (yardstick, adam))
        part = "" if good is None else f"1/{seconds / found[good][2]:.0f}"
        print(f"| {name} | {' | '.join(cells)} | {good or 'no'} | {part} | {better or 'no'} |", flush=True)
    print("\nNats a text, of which KL in brackets.")


if __name__ == "__main__":
    with pyro.validation_enabled(False):
        main()

"""Measure what inference gains or loses on problems whose answer is known: stiff directions.

    python benchmarks/stiff.py [RUN ...] [--schemes vi lowrank] [--seeds 3]

z ~ N(0, I) of 1,536 dimensions. Looks at it, each with noise of variance 1, add curvature c along some directions: one
or four that all dimensions share ("dense"), one or four axes, 512 axes, or 32 dense directions of curvatures from 1 to
100. The table shows the excess of the bound over -log p(x) in nats, which is KL(q ‖ p(z | x)) in closed form: of the
prior, of the best Gaussian with independent dimensions, and of q after T steps. Means over 32 texts and over seeds for
the noise of inference; the largest mean of a seed is in brackets where it is above the prior's.

For each RUN, the folder of a trained run, a row shows the negative ELBO of 8 held-out texts in nats, from 32 draws that
no fit has seen.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from thinking import opened
from timing import machine
from torch import Tensor

from ltm_pyro.evaluation import figures
from ltm_pyro.evaluation.report import ScoredRun
from ltm_pyro.inference import SCHEMES, SequenceNoise, bounds, infer
from ltm_pyro.inference.schemes.vi import VI

NUM_DIMS, NUM_TEXTS = 1536, 32
NUM_HELD_OUT, NUM_DRAWS = 8, 32
STEPS = (1, 2, 4, 8, 16, 32, 64)


@dataclass(frozen=True)
class Looks:
    """A batch of looks, y [B, r]."""

    y: Tensor
    sequence_ids: Tensor

    def __len__(self) -> int:
        return len(self.y)

    def __getitem__(self, index: Any) -> Looks:
        return Looks(self.y[index], self.sequence_ids[index])


@dataclass(frozen=True)
class Problem:
    """y = √c Vᵀz + noise."""

    directions: Tensor
    """V, [d, r], orthonormal columns."""
    curvatures: Tensor
    """c, [r]."""

    def __call__(self, batch: Looks) -> None:
        with pyro.plate("sequences", len(batch), dim=-1):
            z = pyro.sample("z", dist.Normal(torch.zeros(NUM_DIMS), 1).to_event(1))
            pyro.sample("y", dist.Normal(z @ self.directions * self.curvatures.sqrt(), 1).to_event(1), obs=batch.y)

    def sample(self) -> Looks:
        generator = torch.Generator().manual_seed(0)
        z = torch.randn(NUM_TEXTS, NUM_DIMS, generator=generator)
        noise = torch.randn(NUM_TEXTS, len(self.curvatures), generator=generator)
        return Looks(z @ self.directions * self.curvatures.sqrt() + noise, torch.arange(NUM_TEXTS))

    def excess(self, y: Tensor, mean: Tensor, variance: Tensor, log_volume: Tensor, covariance: Tensor) -> Tensor:
        """[B]: KL(q ‖ p(z | x)).

        Args:
            mean: of q, [B, d].
            variance: of each dimension under q, [B, d].
            log_volume: half the log determinant of the covariance of q, [B].
            covariance: Vᵀ Σ V of q, its diagonal, [B, r].
        """
        v, c = self.directions.double(), self.curvatures.double()
        distance = mean - (c.sqrt() * y / (1 + c)) @ v.T
        square = distance.square().sum(1) + (distance @ v).square() @ c
        trace = variance.sum(1) + covariance @ c
        return 0.5 * (square + trace - NUM_DIMS - torch.log1p(c).sum()) - log_volume


def dense(*curvatures: float) -> Problem:
    generator = torch.Generator().manual_seed(1)
    square = torch.randn(NUM_DIMS, len(curvatures), generator=generator)
    return Problem(torch.linalg.qr(square).Q, torch.tensor(curvatures))


def axes(number: int, curvature: float) -> Problem:
    return Problem(torch.eye(NUM_DIMS)[:, :number], torch.full((number,), curvature))


PROBLEMS = {
    "1 dense direction, c = 3": dense(3.0),
    "1 dense direction, c = 10": dense(10.0),
    "1 dense direction, c = 100": dense(100.0),
    "4 dense directions, c = 100": dense(*[100.0] * 4),
    "32 dense directions, c = 1 to 100": dense(*torch.logspace(0, 2, 32).tolist()),
    "1 axis, c = 100": axes(1, 100.0),
    "4 axes, c = 100": axes(4, 100.0),
    "512 axes, c = 3": axes(512, 3.0),
}


def of_diagonal(problem: Problem, y: Tensor, mean: Tensor, scale: Tensor) -> Tensor:
    variance = scale.square()
    covariance = variance @ problem.directions.double().square()
    return problem.excess(y, mean, variance, scale.log().sum(1), covariance)


def of_scheme(problem: Problem, batch: Looks, scheme: Any, seed: int) -> float:
    """The mean excess over the texts."""
    state = infer(scheme, problem, batch, SequenceNoise(seed))
    y, mean, scale = batch.y.double(), state.mean.double(), state.log_scale.double().exp()
    if not hasattr(state, "directions"):
        return of_diagonal(problem, y, mean, scale).mean().item()
    q = scheme.distribution(state, SequenceNoise(seed))
    along, stretch = q.directions.double(), q.stretch.double()
    change = stretch.square() - 1
    variance = scale.square() * (1 + (along.square() * change[:, None]).sum(-1))
    v = problem.directions.double()
    scaled = torch.einsum("bd,dr->bdr", scale, v)
    covariance = scaled.square().sum(1) + (
        torch.einsum("bdk,bdr->bkr", along, scaled).square() * change[..., None]
    ).sum(1)
    log_volume = scale.log().sum(1) + stretch.log().sum(1)
    return problem.excess(y, mean, variance, log_volume, covariance).mean().item()


def of_run(run: ScoredRun, scheme: Any, seed: int) -> float:
    """The mean negative ELBO of held-out texts of a run."""
    batch = run.packed.batch(figures.chosen_sequences(len(run.packed), NUM_HELD_OUT))
    state = infer(scheme, run.trained.model, batch, SequenceNoise(seed))
    q = scheme.distribution(state, SequenceNoise(seed))
    return bounds.elbo(run.trained.model, batch, q, NUM_DRAWS).nelbo.mean().item()


def cells(compute: Callable[[Any, int], float], scheme: str, num_seeds: int, prior: float) -> str:
    """The cells of a row."""
    texts = []
    for steps in STEPS:
        found = [compute(SCHEMES[scheme](num_steps=steps), seed) for seed in range(num_seeds)]
        worst = f" ({max(found):,.1f})" if max(found) > prior else ""
        texts.append(f"{statistics.mean(found):,.1f}{worst}")
    return " | ".join(texts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*", metavar="RUN", help="folders of runs")
    parser.add_argument("--schemes", nargs="+", default=["vi", "lowrank"], choices=["vi", "lowrank", "adamvi"])
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    print(f"`python benchmarks/stiff.py {' '.join(sys.argv[1:])}`\n\n{machine(torch.device('cpu'))}\n")
    print(f"| problem | prior | best diagonal | scheme | {' | '.join(f'T = {steps}' for steps in STEPS)} |")
    print("|---|---|---|---|" + "---|" * len(STEPS))
    for name, problem in PROBLEMS.items():
        batch = problem.sample()
        y, zero = batch.y.double(), torch.zeros(NUM_TEXTS, NUM_DIMS, dtype=torch.float64)
        v, c = problem.directions.double(), problem.curvatures.double()
        prior = of_diagonal(problem, y, zero, zero + 1).mean().item()
        scale = (1 + v.square() @ c).rsqrt().expand_as(zero)
        best = of_diagonal(problem, y, (c.sqrt() * y / (1 + c)) @ v.T, scale).mean().item()
        for scheme in options.schemes:
            row = cells(functools.partial(of_scheme, problem, batch), scheme, options.seeds, prior)
            print(f"| {name} | {prior:.1f} | {best:.1f} | `{scheme}` | {row} |", flush=True)
    for folder in options.runs:
        run = opened(folder)
        prior = of_run(run, VI(0), 0)
        for scheme in options.schemes:
            row = cells(functools.partial(of_run, run), scheme, options.seeds, prior)
            print(f"| {run.name} | {prior:.1f} | | `{scheme}` | {row} |", flush=True)
    print("\nNats a text.")


if __name__ == "__main__":
    with pyro.validation_enabled(False):
        main()

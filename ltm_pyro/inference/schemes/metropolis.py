"""Chains that accept or refuse their moves, and so leave the posterior exactly invariant: what MALA and HMC share.

Every chain accepts or refuses by itself. All chains of a sequence share a step size ε. In the first half of the steps,
the warm-up, it is fitted so that a target share of the moves is accepted; then it is frozen, so that the second half is
a Markov chain whose stationary distribution is the posterior. Draws of the warm-up are not kept.

The fit is dual averaging (Hoffman & Gelman 2014, eq. 6 and section 3.2.1), which recovers from a bad start within a
few steps, where the decaying gain of Robbins & Monro takes dozens:

    h ← (1 - 1 / (t + t₀)) h + (target - acceptance) / (t + t₀)
    log ε ← log ε₁ - √t h / γ,        after the warm-up its mean with weights t^-κ

The start ε₁ suits a posterior of scale 1 in units of the moves. Theirs is shrunk towards ten times the start, since
their start is low.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ltm_pyro.inference.base import Batch, Model, StepInfo
from ltm_pyro.inference.noise import Noise
from ltm_pyro.inference.schemes.chains import EvaluatedChains, EvaluatedState, evaluate
from ltm_pyro.inference.schemes.leapfrog import transition

GAMMA, T_0, KAPPA = 0.05, 10.0, 0.75


@dataclass(frozen=True)
class MetropolisState(EvaluatedState):
    log_step_size: Tensor
    """[B]: log ε, the length of a leapfrog in the units of the moves."""
    mean_log_step_size: Tensor
    """[B]: the mean of log ε over the warm-up so far."""
    missed_acceptance: Tensor
    """[B]: h, the running mean of target - acceptance."""


@dataclass(frozen=True)
class Metropolis(EvaluatedChains):
    """Settings and methods of chains that accept or refuse."""

    target_acceptance: ClassVar[float]
    """The share of moves to be accepted, to which the step size is fitted."""

    @property
    def num_warmup(self) -> int:
        """The first half of the steps, in which the step size is fitted."""
        return self.num_steps // 2

    def init(self, model: Model, batch: Batch, rng: Noise, warm: Tensor | None = None) -> MetropolisState:
        start = super().init(model, batch, rng, warm)
        log_step_size = torch.full_like(start.log_density[:, 0], _first_log_step_size(start))
        return MetropolisState(
            **vars(start),
            log_step_size=log_step_size,
            mean_log_step_size=log_step_size.clone(),
            missed_acceptance=torch.zeros_like(log_step_size),
        )

    def move(
        self, model: Model, state: MetropolisState, batch: Batch, rng: Noise, step_size: Tensor, num_leapfrogs: int
    ) -> tuple[MetropolisState, StepInfo]:
        """Take a step of every chain, with leapfrogs of the given length, [B] or [C, B] in `state.units`."""
        ids, steps, chains = state.sequence_ids, state.step, (self.num_chains,)
        momentum = rng.normal("momentum", ids, steps, state.z.shape[2:], chains, like=state.z)
        uniform = rng.uniform("accept", ids, steps, chains)
        start = state.point
        point, acceptance = transition(
            start, functools.partial(evaluate, model, batch), step_size, state.units, num_leapfrogs, momentum, uniform
        )
        acceptance = acceptance.mean(0)
        info = StepInfo(-start.log_density.mean(0), acceptance)
        return state.moved_to(point, **self._fitted(state, acceptance)), info

    def _fitted(self, state: MetropolisState, acceptance: Tensor) -> dict[str, Tensor]:
        """The fields of the step size after a step with this acceptance, [B]."""
        t = (state.step + 1).to(acceptance)
        missed = state.missed_acceptance
        missed = missed + (self.target_acceptance - acceptance - missed) / (t + T_0)
        log_step_size = _first_log_step_size(state) - t.sqrt() / GAMMA * missed
        weight = t**-KAPPA
        mean = weight * log_step_size + (1 - weight) * state.mean_log_step_size
        fitted = {
            "log_step_size": torch.where(t == self.num_warmup, mean, log_step_size),
            "mean_log_step_size": mean,
            "missed_acceptance": missed,
        }
        return {name: torch.where(t <= self.num_warmup, value, getattr(state, name)) for name, value in fitted.items()}


def _first_log_step_size(state: EvaluatedState) -> float:
    """The step size for d dimensions of scale 1: it falls as d^(-1/4) (Beskos et al. 2013)."""
    return -0.25 * math.log(max(1, state.z.shape[2:].numel()))

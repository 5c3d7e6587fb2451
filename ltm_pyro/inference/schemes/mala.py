"""Metropolis-adjusted Langevin dynamics: a Langevin step is a proposal, which is accepted or refused.

    z' = z + s Σ ∇_z log p(x, z) + √(2 s) A ξ,    ξ ~ N(0, I)
    accepted with probability min(1, p(x, z') N(z | z' + s Σ ∇', 2 s Σ) / p(x, z) N(z' | z + s Σ ∇, 2 s Σ))

(Roberts & Tweedie 1996), with Σ = A Aᵀ = I or, after `vi_steps`, the covariance of q. It is Hamiltonian Monte Carlo
with one leapfrog of length ε = √(2 s) (Neal 2011, section 5.5.2), and that is how it is computed. The step size is
fitted to an acceptance of 0.574, the best in the limit of many dimensions (Roberts & Rosenthal 1998).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ltm_pyro.inference.base import Batch, Model, StepInfo
from ltm_pyro.inference.noise import Noise
from ltm_pyro.inference.schemes.metropolis import Metropolis, MetropolisState


@dataclass(frozen=True)
class MALA(Metropolis):
    """Chains of Metropolis-adjusted Langevin dynamics, with a fitted step size."""

    target_acceptance: ClassVar[float] = 0.574

    def step(self, model: Model, state: MetropolisState, batch: Batch, rng: Noise) -> tuple[MetropolisState, StepInfo]:
        return self.move(model, state, batch, rng, state.log_step_size.exp(), num_leapfrogs=1)

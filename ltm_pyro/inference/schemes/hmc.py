"""Hamiltonian Monte Carlo: a move is a path of several leapfrogs, whose end is accepted or refused (see `leapfrog.py`).

The length of the leapfrogs is drawn anew for every move and chain, uniformly between half and one and a half times
that of the sequence: if all paths had one length, a dimension whose period equals it would hardly move (Mackenzie
1989).
The step size is fitted to an acceptance of 0.8: in the limit of many dimensions 0.65 is best (Beskos et al. 2013), but
the cost is flat above it and steep below, where the narrowest dimensions of a posterior make whole paths fail.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ltm_pyro.inference.base import Batch, Model, StepInfo, require_settings
from ltm_pyro.inference.noise import Noise
from ltm_pyro.inference.schemes.metropolis import Metropolis, MetropolisState


@dataclass(frozen=True)
class HMC(Metropolis):
    """Chains of Hamiltonian Monte Carlo, with a fitted step size."""

    num_leapfrogs: int = 5
    """The number of leapfrogs in a step (L). Each costs a gradient."""

    target_acceptance: ClassVar[float] = 0.8

    def __post_init__(self) -> None:
        super().__post_init__()
        require_settings(self, "num_leapfrogs")

    @property
    def num_gradients(self) -> int:
        """The gradients of the log joint for each sequence: one a leapfrog, one where each chain starts, and those
        before."""
        return self._num_gradients_before + self.num_chains * (1 + self.num_steps * self.num_leapfrogs)

    def step(self, model: Model, state: MetropolisState, batch: Batch, rng: Noise) -> tuple[MetropolisState, StepInfo]:
        jitter = 0.5 + rng.uniform("jitter", state.sequence_ids, state.step, (self.num_chains,)).to(state.z)
        return self.move(model, state, batch, rng, jitter * state.log_step_size.exp(), self.num_leapfrogs)

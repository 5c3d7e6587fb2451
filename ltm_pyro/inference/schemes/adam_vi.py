"""Mean-field variational inference by Adam: a diagonal Gaussian q(z) per sequence, as the reference fits it.

    minimise over (μ, log σ):   KL(N(μ, σ²) ‖ p) - E_{ε ~ N(0, I)} log p(x | μ + σ ε)

by Adam on the reparameterised gradient (Kingma & Welling 2014, eq. 10), the KL in closed form. Each step draws ε
afresh, as algorithm 1 of Kong et al. 2025 says. `vi` fits the same Gaussian in far fewer steps; this is for comparison
with the reference, and has its option of one noise for all steps.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.distributions import kl_divergence

from ltm_pyro.inference.base import (
    Batch,
    Guide,
    Model,
    State,
    StepInfo,
    first_fields,
    latent_prior,
    log_joint,
    require_positive,
)
from ltm_pyro.inference.guides import fresh_noise, guide_of, normal
from ltm_pyro.inference.noise import Noise
from ltm_pyro.inference.posterior import Posterior
from ltm_pyro.inference.schemes.adam import adam_step


@dataclass(frozen=True)
class AdamVIState(State):
    mean: Tensor
    """[B, *event_shape]: μ."""
    mean_first_moment: Tensor
    mean_second_moment: Tensor
    log_scale: Tensor
    """[B, *event_shape]: log σ."""
    log_scale_first_moment: Tensor
    log_scale_second_moment: Tensor
    noise: Tensor
    """[B, *event_shape]: the one ε of `noise="reused"`; [B, 0] otherwise."""


@dataclass(frozen=True)
class AdamVI:
    """Mean-field Gaussian posterior of z, by Adam.

    Started at the prior (`initial_scale` 1), where the KL is zero. The reference implementation starts at
    exp(-2.5), where each latent dimension costs 2 nats before it carries anything, and T = 16 steps do not get back.
    """

    num_steps: int = 16
    """Steps of inference for each sequence (T)."""
    learning_rate: float = 0.1
    """Step size of Adam on the mean [units of z, whose prior has scale 1] and on the log scale."""
    epsilon: float = 0.2
    """Adam's epsilon [nats per unit of z]. What the text says little of is moved in proportion to its gradient;
    with Adam's usual 1e-8 it would move by the learning rate too, at random, and cost KL."""
    initial_scale: float = 1.0
    """Scale of q at the start [prior scales]."""
    noise: Literal["fresh", "reused"] = "fresh"
    """fresh: drawn anew in every step.
    reused: q is fitted to one draw, and the weights are trained on it, as in the reference implementation.
    That is for reproducing it only: the loss it reports is no bound."""

    has_density: ClassVar[bool] = True
    has_chains: ClassVar[bool] = False
    needs_encoder: ClassVar[bool] = False
    num_draws: ClassVar[None] = None

    @property
    def num_gradients(self) -> int:
        """One a step."""
        return self.num_steps

    def __post_init__(self) -> None:
        require_positive(self, "learning_rate", "epsilon", "initial_scale")

    def init(self, model: Model, batch: Batch, rng: Noise, warm: Tensor | None = None) -> AdamVIState:
        prior = latent_prior(model, batch)
        mean = (prior.mean if warm is None else warm).detach().clone()
        log_scale = (self.initial_scale * prior.stddev.detach()).log().expand_as(mean).clone()
        noise = mean.new_zeros(len(mean), 0)
        if self.noise == "reused":
            noise = rng.normal(
                "vi", batch.sequence_ids, torch.zeros_like(batch.sequence_ids), mean.shape[1:], like=mean
            )
        moments = [torch.zeros_like(mean) for _ in range(4)]
        return AdamVIState(*first_fields(batch), mean, *moments[:2], log_scale, *moments[2:], noise)

    def step(self, model: Model, state: AdamVIState, batch: Batch, rng: Noise) -> tuple[AdamVIState, StepInfo]:
        noise = state.noise
        if self.noise == "fresh":
            noise = rng.normal("vi", state.sequence_ids, state.step, state.mean.shape[1:], like=state.mean)
        with torch.enable_grad():
            mean = state.mean.detach().requires_grad_()
            log_scale = state.log_scale.detach().requires_grad_()
            scale = log_scale.exp()
            joint = log_joint(model, batch, mean + scale * noise)
            objective = kl_divergence(normal(mean, scale, draw=None), joint.prior) - joint.log_likelihood
            mean_gradient, log_scale_gradient = torch.autograd.grad(objective.sum(), (mean, log_scale))
        new = AdamVIState(
            state.sequence_ids,
            state.step + 1,
            state.num_skipped,
            *adam_step(
                mean.detach(),
                mean_gradient,
                state.mean_first_moment,
                state.mean_second_moment,
                state.step,
                self.learning_rate,
                self.epsilon,
            ),
            *adam_step(
                log_scale.detach(),
                log_scale_gradient,
                state.log_scale_first_moment,
                state.log_scale_second_moment,
                state.step,
                self.learning_rate,
                self.epsilon,
            ),
            state.noise,
        )
        return new, StepInfo(objective.detach())

    @property
    def loss_is_bound(self) -> bool:
        """Not where q was fitted to the noise that the loss is taken at."""
        return self.noise == "fresh"

    def mean(self, state: AdamVIState) -> Tensor:
        """μ, [B, *event_shape]."""
        return state.mean

    def distribution(self, state: AdamVIState, rng: Noise, purpose: str = "distribution") -> TorchDistribution:
        """q(z), batch_shape [B]; each draw of the object that is returned uses new noise, which no step has seen."""
        return normal(state.mean, state.log_scale.exp(), fresh_noise(state, state.mean, rng, purpose))

    def guide(self, model: Model, state: AdamVIState, batch: Batch, rng: Noise) -> Guide:
        """q(z), drawn afresh; with `noise="reused"`, drawn at the noise that q was fitted to."""
        if self.noise == "reused":
            return guide_of(normal(state.mean, state.log_scale.exp(), lambda outer: state.noise))
        return guide_of(self.distribution(state, rng, purpose="guide"))

    def posterior(self, state: AdamVIState, num_samples: int, rng: Noise) -> Posterior:
        """Independent draws from q: one chain."""
        q = self.distribution(state, rng, purpose="posterior")
        return Posterior(q.sample((1, num_samples)), state.sequence_ids)

"""Mean-field variational inference by Adam: a diagonal Gaussian q(z) per sequence, fitted as in the reference.

    minimise over (μ, log σ):   KL(N(μ, σ²) ‖ p) - E_{ε ~ N(0, I)} log p(x | μ + σ ε)

by Adam on the reparameterised gradient (Kingma & Welling 2014, eq. 10), with the KL in closed form if there is one.
Each step draws ε afresh, as in algorithm 1 of Kong et al. 2025. `vi` fits the same Gaussian in far fewer steps; this
scheme is for comparison with the reference, and has its option of one noise for all steps.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar, Literal, TypeVar

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor

from ltm_pyro.inference.base import (
    Batch,
    Guide,
    Model,
    State,
    StepInfo,
    first_fields,
    ids_of,
    kl,
    latent_prior,
    log_joint,
    moments,
    require_settings,
)
from ltm_pyro.inference.guides import fresh_noise, guide_of, normal
from ltm_pyro.inference.noise import Noise
from ltm_pyro.inference.posterior import Posterior
from ltm_pyro.inference.schemes.adam import adam_step
from ltm_pyro.inference.surroundings import entry


@dataclass(frozen=True)
class AdamVIState(State):
    mean: Tensor
    """[B, *event_shape]: μ."""
    mean_first_moment: Tensor
    """[B, *event_shape]: Adam's running mean of the gradient for μ."""
    mean_second_moment: Tensor
    """[B, *event_shape]: Adam's running mean of its square."""
    log_scale: Tensor
    """[B, *event_shape]: log σ."""
    log_scale_first_moment: Tensor
    """[B, *event_shape]: Adam's running mean of the gradient for log σ."""
    log_scale_second_moment: Tensor
    """[B, *event_shape]: Adam's running mean of its square."""
    noise: Tensor
    """[B, *event_shape]: the one ε of `noise="reused"`; [B, 0] otherwise."""


AnyState = TypeVar("AnyState", bound=AdamVIState)


@dataclass(frozen=True)
class AdamVI:
    """A Gaussian with independent dimensions, fitted by Adam.

    It starts at the prior's scale (`initial_scale` 1), where the KL from a Gaussian prior is 0. The reference
    implementation starts at a scale of exp(-2.5), where each latent dimension costs 2 nats before it carries any
    information, and T = 16 steps are too few to make up for that.
    """

    num_steps: int = 16
    """The number of steps of inference for each sequence (T)."""
    learning_rate: float = 0.1
    """The step size of Adam for the mean [units of z, whose prior has scale 1] and for the log scale."""
    epsilon: float = 0.2
    """Adam's epsilon [nats per unit of z]. Dimensions with small gradients move in proportion to them.
    With Adam's usual 1e-8 they would move by the learning rate too, at random, and cost KL."""
    initial_scale: float = 1.0
    """The scale of q at the start [prior scales]."""
    noise: Literal["fresh", "reused"] = "fresh"
    """fresh: noise is drawn anew in every step.
    reused: q is fitted to one draw, and the weights are trained on it, as in the reference implementation.
    This is only for reproducing the reference: the loss is not a bound."""

    has_density: ClassVar[bool] = True
    has_chains: ClassVar[bool] = False
    can_absorb: ClassVar[bool] = False
    needs_encoder: ClassVar[bool] = False
    num_draws: ClassVar[None] = None

    @property
    def num_gradients(self) -> int:
        """One gradient a step."""
        return self.num_steps

    def __post_init__(self) -> None:
        require_settings(self, "learning_rate", "epsilon", "initial_scale")

    def init(self, model: Model, batch: Batch, rng: Noise, warm: Tensor | None = None) -> AdamVIState:
        prior_mean, prior_scale = moments(latent_prior(model, batch))
        mean = (prior_mean if warm is None else warm).detach().clone()
        log_scale = (self.initial_scale * prior_scale).log().expand_as(mean).clone()
        noise = mean.new_zeros(len(mean), 0)
        if self.noise == "reused":
            ids = ids_of(batch).to(mean.device)
            noise = rng.normal("vi", ids, torch.zeros_like(ids), mean.shape[1:], like=mean)
        return AdamVIState(
            *first_fields(batch, mean),
            mean=mean,
            mean_first_moment=torch.zeros_like(mean),
            mean_second_moment=torch.zeros_like(mean),
            log_scale=log_scale,
            log_scale_first_moment=torch.zeros_like(mean),
            log_scale_second_moment=torch.zeros_like(mean),
            noise=noise,
        )

    def step(self, model: Model, state: AnyState, batch: Batch, rng: Noise) -> tuple[AnyState, StepInfo]:
        noise = state.noise
        if self.noise == "fresh":
            noise = rng.normal("vi", state.sequence_ids, state.step, state.mean.shape[1:], like=state.mean)
        with torch.enable_grad():
            mean = state.mean.detach().requires_grad_()
            log_scale = state.log_scale.detach().requires_grad_()
            scale = log_scale.exp()
            z = mean + scale * noise
            joint = log_joint(model, batch, z)
            objective = kl(normal(mean, scale), joint.prior, z) - joint.log_likelihood
            mean_gradient, log_scale_gradient = torch.autograd.grad(objective.sum(), (mean, log_scale))
        rates = state.step, self.learning_rate, self.epsilon
        mean, mean_first_moment, mean_second_moment = adam_step(
            mean.detach(), mean_gradient, state.mean_first_moment, state.mean_second_moment, *rates
        )
        log_scale, log_scale_first_moment, log_scale_second_moment = adam_step(
            log_scale.detach(),
            log_scale_gradient,
            state.log_scale_first_moment,
            state.log_scale_second_moment,
            *rates,
        )
        new = dataclasses.replace(
            state,
            step=state.step + 1,
            mean=mean,
            mean_first_moment=mean_first_moment,
            mean_second_moment=mean_second_moment,
            log_scale=log_scale,
            log_scale_first_moment=log_scale_first_moment,
            log_scale_second_moment=log_scale_second_moment,
        )
        return new, StepInfo(objective.detach())

    @property
    def loss_is_bound(self) -> bool:
        """False if q was fitted to the very noise at which the loss is evaluated."""
        return self.noise == "fresh"

    def mean(self, state: AdamVIState) -> Tensor:
        """μ, [B, *event_shape]."""
        return state.mean

    @entry()
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

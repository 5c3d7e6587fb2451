"""Mean-field variational inference by natural gradients: a diagonal Gaussian q(z) per sequence.

With z = μ + σ ε, ε ~ N(0, I), and the path derivative of the negative ELBO (Roeder, Wu & Duvenaud 2017, eq. 8)

    g = -∇_z log p(x, z) - ε / σ,     E[g] = ∂/∂μ,     E[g ε / σ] = 2 ∂/∂σ² = diag E[-∇² log p(x, z)] - 1/σ²

a step of size ρ moves the precision s = 1/σ² towards the curvature, and the mean by the gradient over it:

    s ← s exp(ρ e / s),  e ≈ g ε / σ        (to second order Lin, Schmidt & Khan 2020, eq. 11: s stays positive)
    μ ← μ - ρ g / s

(Khan & Rue 2023, arXiv 2107.04562, section 5.2). So steps are as long as the curvature allows, and near the optimum g
itself vanishes if the posterior has no correlations. One draw is enough for a step, because

- every second step takes the draw of the one before with its sign reversed. The value of g at μ cancels from the sum
  of both g ε, and the noise of ε from the sum of both g (antithetic draws, at one gradient a step);
- the noise of all other dimensions hides the curvature of a single one of d dimensions, but not their mean: e is shrunk
  towards its mean over the dimensions by λ = d / (d + 50 t) after t steps;
- far from the optimum one draw says little: log s moves by at most 1 in either direction, so that noise alone does not
  carry it away, and μ by at most σ. The precision does not fall below that of the prior's own variance: the text makes
  q narrower, never wider. (Where the likelihood is not log-concave, the best q may be wider than the prior; then this
  floor costs some nats.)
- dimensions may be stiff together: 1/s knows the curvature of each, and a step along many of them at once may meet the
  sum of them all. So log p(x, z) is evaluated once more, without a gradient, at the end of the step. What it lacks of
  what the gradient promised is the curvature along the step, and μ goes no further than to the optimum along it, and
  at the smaller rates of later steps only a part of that way. What single dimensions say of their curvature counts in
  the same part, since there it is noise of the stiff direction.

benchmarks/results/steps.md and stiff.md measure the gain from each of these, and what Adam needs for the same bound.

Blocks of a text can be absorbed one by one, each by one whole step from the posterior before it, which takes the place
of the prior (streaming variational Bayes: Broderick et al. 2013, arXiv 1307.6769; one step of natural gradients a
block: Jones et al. 2024, arXiv 2405.19681). With g = -∇_z log p(b | z) at a draw z = μ + σ ε, and m the mean of g ε / σ
over the dimensions,

    s ← s + e,  e ≈ g ε / σ        μ ← μ - (g - m σ ε) / s

where s stays at or above the precision of the prior, and μ moves by at most σ (root mean square). The last term takes
out of g what the noise ε put into it, in as far as all dimensions share their curvature. With a `memory` below 1, the
posterior before a block is taken to that power, and the prior to the rest. A block has one gradient and no evaluation
at the end of its step, so this does not see dimensions that are stiff together.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor

from ltm_pyro.inference.base import (
    Batch,
    BlockEvidence,
    Guide,
    Model,
    State,
    StepInfo,
    first_fields,
    flat,
    latent_prior,
    log_joint,
    moments,
    require_settings,
)
from ltm_pyro.inference.guides import fresh_noise, guide_of, normal
from ltm_pyro.inference.noise import Noise
from ltm_pyro.inference.posterior import Posterior
from ltm_pyro.inference.surroundings import entry

DIMENSIONS_A_STEP = 50
"""The number of dimensions for which one more step gives as much reason to trust the curvature of each."""


@dataclass(frozen=True)
class VIState(State):
    mean: Tensor
    """[B, *event_shape]: μ."""
    log_scale: Tensor
    """[B, *event_shape]: log σ."""
    noise: Tensor
    """[B, *event_shape]: ε of the last step, whose mirror image every second step takes."""


@dataclass(frozen=True)
class VI:
    """A Gaussian with independent dimensions, fitted by natural gradients. It starts at the prior's moments."""

    num_steps: int = 16
    """The number of steps of inference for each sequence (T)."""
    learning_rate: float = 0.5
    """The step size ρ of the first step, where 1 would be a whole Newton step; a cosine takes it to 0 in T steps."""
    stride: int = 1
    """Each step uses every stride-th position of a text, from a random first one, and counts it stride times.
    On average this is the log-likelihood of all positions, at a part of its cost (on a CPU) and with more noise.
    1: all positions."""
    memory: float = 1.0
    """The part of what has been learned of z that is kept before each block, with --infer-from past.
    The posterior is taken to this power, and the prior to the rest. 1: nothing is forgotten."""

    has_density: ClassVar[bool] = True
    has_chains: ClassVar[bool] = False
    can_absorb: ClassVar[bool] = True
    needs_encoder: ClassVar[bool] = False
    loss_is_bound: ClassVar[bool] = True
    num_draws: ClassVar[None] = None

    def __post_init__(self) -> None:
        require_settings(self, "learning_rate", "stride")
        if self.learning_rate > 1:
            raise ValueError(f"learning_rate must be at most 1, not {self.learning_rate}")
        if not 0 <= self.memory <= 1:
            raise ValueError(f"memory must be from 0 to 1, not {self.memory}")

    @property
    def num_gradients(self) -> int:
        """One a step, beside one evaluation of the density without a gradient."""
        return self.num_steps

    def init(self, model: Model, batch: Batch, rng: Noise, warm: Tensor | None = None) -> VIState:
        prior_mean, prior_scale = moments(latent_prior(model, batch))
        mean = (prior_mean if warm is None else warm).detach().clone()
        log_scale = prior_scale.log().expand_as(mean).clone()
        return VIState(*first_fields(batch, mean), mean, log_scale, torch.zeros_like(mean))

    def step(self, model: Model, state: VIState, batch: Batch, rng: Noise) -> tuple[VIState, StepInfo]:
        noise = rng.normal("vi", state.sequence_ids, state.step, state.mean.shape[1:], like=state.mean)
        noise = torch.where(_by_sequence(state.step % 2 == 1, noise), -state.noise, noise)
        scale, batch = state.log_scale.exp(), self._subsampled(state, batch, rng)
        with torch.enable_grad():
            z = (state.mean + scale * noise).detach().requires_grad_()
            joint = log_joint(model, batch, z)
            log_density = joint.log_likelihood + joint.log_prior
            (gradient,) = torch.autograd.grad(-log_density.sum(), z)
        log_q = normal(state.mean, scale).log_prob(z.detach())
        path_gradient = gradient - noise / scale
        step_size = _by_sequence(self._step_sizes(state.step).to(gradient), gradient)
        excess, widest = path_gradient * noise / scale, joint.prior.stddev.detach().log()
        log_scale = self._narrowed(state, self._shrunk(excess, state.step), widest)
        move = (step_size * path_gradient * (2 * log_scale).exp()).clamp(-scale, scale)
        with torch.no_grad():
            end = log_joint(model, batch, (z - move).nan_to_num())  # a program may refuse what is not a number
        # To second order: log p at the end is log p - ∇log p · move - ½ curvature.
        along = flat(gradient * move).sum(1)
        curvature = 2 * (log_density.detach() - end.log_likelihood - end.log_prior + along)
        # Of what is no more than rounding nothing can be said.
        rounding = 100 * torch.finfo(curvature.dtype).eps * log_density.detach().abs()
        curvature = torch.where(curvature.abs() < rounding, 0, curvature)
        part = self._part(state.step, flat(path_gradient * move).sum(1), curvature, move / scale, noise)
        # Where the gradient is that of one stiff direction, it says little of the curvature of single dimensions.
        log_scale = self._narrowed(state, self._shrunk(excess, state.step, part.abs()), widest)
        # Not finite where the gradient is not, so that the guard sees it behind the bounds.
        mean = state.mean - _by_sequence(part, move) * move + 0 * path_gradient
        new = VIState(state.sequence_ids, state.step + 1, state.num_skipped, mean, log_scale, noise)
        return new, StepInfo((log_q - log_density).detach())

    def absorb(self, state: VIState, evidence: BlockEvidence, prior: TorchDistribution) -> VIState:
        """One step of natural gradients with a block, which counts as much as its share says.

        The mean moves by at most σ (root mean square over the dimensions) from where forgetting leaves it.
        """
        memory = self.memory if evidence.is_new else 1.0
        gradient, z = evidence.share * evidence.gradient, evidence.z
        prior_mean, prior_scale = moments(prior)
        prior_precision, scale = prior_scale.square().reciprocal(), state.log_scale.exp()
        of_prior = (1 - memory) * prior_precision
        before = memory / scale.square() + of_prior
        start = state.mean + of_prior / before * (prior_mean - state.mean)
        curvature = gradient * (z - state.mean) / scale.square()
        # Each block is the first one for q, which has the posterior before it in the place of the prior.
        number = torch.ones_like(state.step)
        shared = _by_sequence(flat(curvature).mean(1) * self._shrinkage(number, curvature), curvature)
        # What is noise in the curvature may also be negative, or it would add up.
        precision = (before + self._shrunk(curvature, number)).maximum(prior_precision)
        move = (gradient - shared * (z - start)) / precision
        length = flat(before * move.square()).mean(1).sqrt()
        mean = start - move / _by_sequence(length.clamp(min=1), move)
        log_scale = -0.5 * precision.log()
        return VIState(state.sequence_ids, state.step + 1, state.num_skipped, mean, log_scale, state.noise)

    def _part(self, step: Tensor, slope: Tensor, curvature: Tensor, move: Tensor, noise: Tensor) -> Tensor:
        """How much of a move to make, [B].

        Args:
            step: the number of the step, [B].
            slope: how fast the objective falls at first along the move, from one draw, [B].
            curvature: along the move, [B].
            move: in units of σ, [B, *event_shape].
            noise: ε, [B, *event_shape].
        """
        if self.num_steps == 1:
            # No mirrored draw will take out the noise along the move. Its curvature does.
            square = flat(move.square()).sum(1).clamp(min=torch.finfo(move.dtype).tiny)
            slope = slope - (curvature / square - 1) * flat(move * noise).sum(1)
        part = self._step_sizes(step).to(slope) / self.learning_rate * slope / curvature
        # No way at all to where there is no density.
        return torch.where(curvature > 0, part.clamp(-1, 1), 1).where(~curvature.isnan(), 0)

    def _subsampled(self, state: VIState, batch: Batch, rng: Noise) -> Any:
        """The batch, weighted on every stride-th position only."""
        if self.stride == 1:
            return batch
        if not hasattr(batch, "every"):
            raise ValueError("a stride needs a batch with a method `every`, as TokenBatch has it")
        first = rng.uniform("positions", state.sequence_ids, state.step)
        return batch.every(self.stride, (first * self.stride).long())

    def _narrowed(self, state: VIState, excess: Tensor, widest: Tensor) -> Tensor:
        """log σ after a step whose curvature is above the precision by this excess; not wider than the prior."""
        step_size = _by_sequence(self._step_sizes(state.step).to(excess), excess)
        change = (step_size * excess * (2 * state.log_scale).exp()).clamp(-1, 1)
        return (state.log_scale - 0.5 * change).minimum(widest)

    def _shrunk(self, excess: Tensor, step: Tensor, belief: Tensor | None = None) -> Tensor:
        """The excess of every dimension, shrunk towards the mean over all dimensions, and less so in later steps.

        Args:
            belief: how much of what the dimensions say beyond their mean is believed, from 0 to 1, [B]. None: all.
        """
        mean = _by_sequence(flat(excess).mean(1), excess)
        kept = 1 - self._shrinkage(step, excess)
        return mean + _by_sequence(kept if belief is None else kept * belief, excess) * (excess - mean)

    def _shrinkage(self, step: Tensor, excess: Tensor) -> Tensor:
        """λ of the steps with these numbers, [B]."""
        num_dims = excess[0].numel()
        return num_dims / (num_dims + DIMENSIONS_A_STEP * step.to(excess))

    def _step_sizes(self, step: Tensor) -> Tensor:
        """ρ of the steps with these numbers, [B]."""
        progress = (step / max(1, self.num_steps)).clamp(max=1)
        return self.learning_rate * (1 + (math.pi * progress).cos()) / 2

    def mean(self, state: VIState) -> Tensor:
        """μ, [B, *event_shape]."""
        return state.mean

    @entry()
    def distribution(self, state: VIState, rng: Noise, purpose: str = "distribution") -> TorchDistribution:
        """q(z), batch_shape [B]; each draw of the object that is returned uses new noise, which no step has seen."""
        return normal(state.mean, state.log_scale.exp(), fresh_noise(state, state.mean, rng, purpose))

    def guide(self, model: Model, state: VIState, batch: Batch, rng: Noise) -> Guide:
        """q(z), drawn afresh."""
        return guide_of(self.distribution(state, rng, purpose="guide"))

    def posterior(self, state: VIState, num_samples: int, rng: Noise) -> Posterior:
        """Independent draws from q: one chain."""
        q = self.distribution(state, rng, purpose="posterior")
        return Posterior(q.sample((1, num_samples)), state.sequence_ids)


def _by_sequence(values: Tensor, like: Tensor) -> Tensor:
    """Values of [B], with as many dimensions as [B, *event_shape]."""
    return values.view(-1, *[1] * (like.dim() - 1))

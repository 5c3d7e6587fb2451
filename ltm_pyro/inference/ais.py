"""Annealed importance sampling of log p(x), forwards and backwards (Neal 2001; Grosse, Ancha & Roy 2016).

From q(z) to p(x, z) along log f_β = (1 - β) log q(z) + β log p(x, z), in M temperatures 0 = β_0 < … < β_M = 1:

    forwards    z_0 ~ q,         log w = Σ_m (β_m - β_{m-1}) U(z_{m-1}),   z_m ~ T_{β_m}(· | z_{m-1}),   E[w] = p(x)
    backwards   z ~ p(z | x),    the same sum along the path run the other way,                          E[1/w] = 1/p(x)

with U(z) = log p(x, z) - log q(z) and T_β a step of Hamiltonian Monte Carlo (`leapfrog.py`) that leaves f_β invariant.
So -log of the mean of w is, in expectation, at least -log p(x); and the log of the mean of 1/w at most. The backward
side needs an exact draw of the posterior: on data simulated from the model, that is the z that made x.

Temperatures and step sizes are fitted to each sequence by a pilot run with randomness of its own, and then frozen:
tuned on the very chains that are scored, E[w] = p(x) would no longer hold.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor

from ltm_pyro.inference.base import Batch, Model, frozen, ids_of, log_joint, moments
from ltm_pyro.inference.noise import Noise
from ltm_pyro.inference.schemes.leapfrog import like_events, transition
from ltm_pyro.inference.schemes.lowrank import units_of
from ltm_pyro.inference.surroundings import entry, normal_tensors
from ltm_pyro.inference.weights import ImportanceWeights

TARGET_ACCEPTANCE = 0.8
"""The acceptance that the step sizes are fitted to (Beskos et al. 2013 find 0.65 best in the limit of many
dimensions)."""
ADAPTATION_RATE = 0.5
"""The change of the log step size for each unit of missed acceptance."""


@dataclass(frozen=True)
class AnnealingPlan:
    """Temperatures and step sizes, fixed before the chains that are scored."""

    betas: Tensor
    """[M + 1, B]: from 0 to 1."""
    step_sizes: Tensor
    """[M + 1, B]: the length of a leapfrog, in units in which q is round."""
    num_leapfrogs: int
    """The number of leapfrogs in a transition."""
    num_chains: int
    """C, the number of chains of each sequence, which are run side by side."""


@dataclass(frozen=True)
class AnnealedWeights(ImportanceWeights):
    """The weights of C chains that were run forwards."""

    acceptance: Tensor
    """[B]: mean acceptance of the transitions; nan if M = 1, where there are none."""


@dataclass(frozen=True)
class _AnnealedDensity:
    """log f_β and its gradient at z."""

    z: Tensor
    """[C, B, *event_shape]."""
    beta: Tensor
    """[C, B]."""
    log_joint: Tensor
    """[C, B]: log p(x, z)."""
    log_q: Tensor
    """[C, B]: log q(z)."""
    gradient_joint: Tensor
    """[C, B, *event_shape]: ∇_z log p(x, z)."""
    gradient_q: Tensor
    """[C, B, *event_shape]: ∇_z log q(z)."""

    @property
    def log_ratio(self) -> Tensor:
        """U(z)."""
        return self.log_joint - self.log_q

    @property
    def log_density(self) -> Tensor:
        """log f_β(z)."""
        return (1 - self.beta) * self.log_q + self.beta * self.log_joint

    @property
    def gradient(self) -> Tensor:
        """∇_z log f_β(z)."""
        beta = like_events(self.beta, self.z)
        return (1 - beta) * self.gradient_q + beta * self.gradient_joint


@entry()
def pilot(
    model: Model,
    batch: Batch,
    q: TorchDistribution,
    rng: Noise,
    num_temperatures: int = 100,
    num_leapfrogs: int = 5,
    num_chains: int = 8,
) -> AnnealingPlan:
    """Fit temperatures and step sizes to every sequence.

    A first run along a sigmoid schedule measures the spread of U at every temperature; the temperatures are then placed
    so that each adds the same part of it. A second run fits the step sizes to them.

    Args:
        q: where the chains start, batch_shape [B]. Its covariance is also the shape of the steps. Every draw
            from it must use new noise, as those of a scheme's `distribution` do.
        rng: the noise of the transitions.
        num_temperatures: M.
        num_chains: C, also for the run that is scored.

    Raises:
        ValueError: if q has no standard deviation.
    """
    mean, _ = moments(q)
    ramp = torch.linspace(-4, 4, num_temperatures + 1, dtype=mean.dtype, device=mean.device).sigmoid()
    betas = ((ramp - ramp[0]) / (ramp[-1] - ramp[0]))[:, None].expand(-1, len(batch))
    start = 0.5 * q.event_shape.numel() ** -0.25
    step_sizes = torch.full_like(betas, start)
    with frozen(model, batch) as batch:
        for number in range(2):
            plan = AnnealingPlan(betas, step_sizes, num_leapfrogs, num_chains)
            at = _start(model, batch, q, plan)
            step_size, fitted, spreads = step_sizes[1], [step_sizes[1]], []
            for m in range(1, num_temperatures + 1):
                spreads.append(at.log_ratio.std(0))
                at, acceptance = _transition(model, batch, q, plan, at, m, rng, f"ais-pilot-{number}", step_size)
                step_size = step_size * ((acceptance.mean(0) - TARGET_ACCEPTANCE) * ADAPTATION_RATE).exp()
                fitted.append(step_size)
            step_sizes = torch.stack(fitted)
            if number == 0:
                spreads.append(spreads[-1])
                new_betas = _equal_shares(betas, torch.stack(spreads))
                step_sizes = _interpolate(betas, step_sizes, new_betas)
                betas = new_betas
    return AnnealingPlan(betas, step_sizes, num_leapfrogs, num_chains)


@entry()
def forward_ais(model: Model, batch: Batch, q: TorchDistribution, plan: AnnealingPlan, rng: Noise) -> AnnealedWeights:
    """Run chains from q to the posterior: E[w] = p(x)."""
    last = len(plan.betas) - 1
    with frozen(model, batch) as batch:
        at = _start(model, batch, q, plan)
        log_weights = torch.zeros_like(at.log_joint, dtype=torch.float64)
        acceptance_sum = torch.zeros_like(log_weights[0])
        for m in range(1, last + 1):
            log_weights += (plan.betas[m] - plan.betas[m - 1]) * at.log_ratio
            if m < last:
                at, acceptance = _transition(model, batch, q, plan, at, m, rng, "ais-forward", plan.step_sizes[m])
                acceptance_sum += acceptance.mean(0)
    return AnnealedWeights(log_weights.cpu(), (acceptance_sum / (last - 1)).cpu())


@dataclass(frozen=True)
class ReverseWeights:
    """The weights of C chains that were run backwards."""

    log_weights: Tensor
    """[C, B] float64: log w, with E[1/w] = 1/p(x)."""
    acceptance: Tensor
    """[B]: mean acceptance of the transitions; nan if M = 1, where there are none."""

    @property
    def nats(self) -> Tensor:
        """[B]: log of the mean of 1/w, in expectation a lower bound on -log p(x)."""
        return -ImportanceWeights(-self.log_weights).nats


@entry()
def reverse_ais(
    model: Model, batch: Batch, q: TorchDistribution, plan: AnnealingPlan, z: Tensor, rng: Noise
) -> ReverseWeights:
    """Run chains from exact draws of the posterior back to q: E[1/w] = 1/p(x).

    Args:
        z: one draw of p(z | x) for each sequence, [B, *event_shape], of which q and the plan know nothing.
    """
    last = len(plan.betas) - 1
    with frozen(model, batch) as batch:
        z = normal_tensors(z)
        at = _evaluate(model, batch, q, z.expand(plan.num_chains, *z.shape), plan.betas[-1])
        log_weights = torch.zeros_like(at.log_joint, dtype=torch.float64)
        acceptance_sum = torch.zeros_like(log_weights[0])
        for m in range(last, 0, -1):
            if m < last:
                at, acceptance = _transition(model, batch, q, plan, at, m, rng, "ais-reverse", plan.step_sizes[m])
                acceptance_sum += acceptance.mean(0)
            log_weights += (plan.betas[m] - plan.betas[m - 1]) * at.log_ratio
    return ReverseWeights(log_weights.cpu(), (acceptance_sum / (last - 1)).cpu())


def _start(model: Model, batch: Batch, q: TorchDistribution, plan: AnnealingPlan) -> _AnnealedDensity:
    """Draws from q, [C, B, *event_shape], which are new in every call."""
    return _evaluate(model, batch, q, q.sample((plan.num_chains,)), plan.betas[0])


def _evaluate(model: Model, batch: Batch, q: TorchDistribution, z: Tensor, beta: Tensor) -> _AnnealedDensity:
    with torch.enable_grad():
        z = z.detach().requires_grad_()
        joint = log_joint(model, batch, z, num_sample_dims=1)
        log_p, log_q = joint.log_likelihood + joint.log_prior, q.log_prob(z)
        (gradient_joint,) = torch.autograd.grad(log_p.sum(), z)
        (gradient_q,) = torch.autograd.grad(log_q.sum(), z)
    log_p, log_q = log_p.detach(), log_q.detach()
    return _AnnealedDensity(z.detach(), beta.expand_as(log_p), log_p, log_q, gradient_joint, gradient_q)


def _transition(
    model: Model,
    batch: Batch,
    q: TorchDistribution,
    plan: AnnealingPlan,
    start: _AnnealedDensity,
    m: int,
    rng: Noise,
    purpose: str,
    step_size: Tensor,
) -> tuple[_AnnealedDensity, Tensor]:
    """A Hamiltonian Monte Carlo step at temperature m, and its acceptance, [C, B]."""
    ids = ids_of(batch)
    steps = torch.full_like(ids, m)
    beta = plan.betas[m].expand_as(start.beta)
    momentum = rng.normal(purpose, ids, steps, q.event_shape, (plan.num_chains,), like=start.z)
    uniform = rng.uniform(f"{purpose}-accept", ids, steps, (plan.num_chains,))
    return transition(
        dataclasses.replace(start, beta=beta),
        lambda z: _evaluate(model, batch, q, z, beta),
        step_size,
        units_of(q),
        plan.num_leapfrogs,
        momentum,
        uniform,
    )


def _equal_shares(betas: Tensor, spreads: Tensor) -> Tensor:
    """Temperatures, [M + 1, B], between which the integral of the spread over β is the same."""
    # A tenth of the mean everywhere, so that no stretch is left without temperatures.
    spreads = spreads + 0.1 * spreads.mean(0)
    areas = (betas[1:] - betas[:-1]) * (spreads[1:] + spreads[:-1]) / 2
    cumulative = torch.cat([torch.zeros_like(areas[:1]), areas.cumsum(0)])
    shares = torch.linspace(0, 1, len(betas), dtype=betas.dtype, device=betas.device)[:, None]
    new = _interpolate(cumulative / cumulative[-1], betas, shares.expand_as(betas))
    new[0], new[-1] = 0.0, 1.0
    return new


def _interpolate(x: Tensor, y: Tensor, at: Tensor) -> Tensor:
    """Piecewise linear in the columns of [N, B] tensors; x rises along them."""
    right = torch.searchsorted(x.T.contiguous(), at.T.contiguous()).T.clamp(1, len(x) - 1)
    x0, x1 = x.gather(0, right - 1), x.gather(0, right)
    y0, y1 = y.gather(0, right - 1), y.gather(0, right)
    return y0 + (y1 - y0) * ((at - x0) / (x1 - x0).clamp(min=1e-12)).clamp(0, 1)

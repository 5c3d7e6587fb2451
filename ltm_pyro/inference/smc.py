"""Sequential Monte Carlo over the blocks of a text: an unbiased estimate of p(x), and a code at the same time.

K particles z_k ~ p(z) with weights W_k read a text block by block (Chopin 2002, Biometrika 89, 539):

    p̂(b_i | x_<) = Σ_k W_k p(b_i | z_k, x_<),      W_k ← W_k p(b_i | z_k, x_<) / p̂(b_i | x_<)

Where few particles have most of the weight, they are drawn anew in proportion to it; then each takes some steps of
Hamiltonian Monte Carlo that leave p(z | x_≤i) invariant. The product of all p̂ has the expectation p(x) (Del Moral 2004,
theorem 7.4.2), so -Σ log p̂ is in expectation an upper bound on -log p(x). Each p̂ is also a distribution of the block
that is fixed before the block is seen. So the same number is the length of a code.

The step sizes of a block are fitted by a pilot run with noise of its own, which has read nothing behind that block.
Fitted to the particles that are scored, the estimate would no longer be unbiased.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ltm_pyro.inference.base import Model, frozen, ids_of, infer, log_joint, log_likelihood, require_full_weights
from ltm_pyro.inference.noise import Noise
from ltm_pyro.inference.schemes.leapfrog import like_events, transition
from ltm_pyro.inference.schemes.lowrank import units_of
from ltm_pyro.inference.schemes.prior import PRIOR
from ltm_pyro.inference.streaming import BlockedBatch, block_of, num_positions
from ltm_pyro.inference.surroundings import entry

NUM_MOVES = 4
"""The steps of Hamiltonian Monte Carlo after each block."""
TARGET_ACCEPTANCE = 0.8
"""The acceptance that the step sizes are fitted to."""
ADAPTATION_RATE = 0.5
"""The change of the log step size for each unit of missed acceptance."""


@dataclass(frozen=True)
class Particles:
    """What sequential Monte Carlo says of a batch."""

    block_nats: Tensor
    """[number of blocks, B] float64: -log p̂ of each block; 0 for a block that is all padding."""
    effective_sample_size: Tensor
    """[B] float64: the smallest effective sample size of the weights after any block, from 1 to K."""
    step_sizes: Tensor
    """[number of blocks, NUM_MOVES, B]: the length of a leapfrog in each move, in standard deviations of the prior."""

    @property
    def nats(self) -> Tensor:
        """[B]: -log of the estimate of p(x)."""
        return self.block_nats.sum(0)


@dataclass(frozen=True)
class _LogJoint:
    """log p(x_≤, z) and its gradient at z, [C, B, *event_shape]."""

    z: Tensor
    log_density: Tensor
    gradient: Tensor


@entry()
def smc(
    model: Model, batch: BlockedBatch, block_size: int, num_particles: int, num_leapfrogs: int, rng: Noise
) -> Particles:
    """Estimate p(x) of each text, after a pilot run that fits the step sizes.

    Args:
        block_size: the number of positions in a block.
        num_particles: K.
        num_leapfrogs: leapfrogs in each step of Hamiltonian Monte Carlo.

    Raises:
        ValueError: if a position weighs anything but 0 or 1, or there is no position in a block or no particle.
    """
    if block_size < 1 or num_particles < 1:
        raise ValueError(f"needs a position in a block and a particle, not {block_size} and {num_particles}")
    require_full_weights(batch)
    pilot = _run(model, batch, block_size, num_particles, num_leapfrogs, rng, "smc-pilot", None)
    return _run(model, batch, block_size, num_particles, num_leapfrogs, rng, "smc", pilot.step_sizes)


@torch.no_grad()
def _run(
    model: Model,
    batch: BlockedBatch,
    block_size: int,
    num_particles: int,
    num_leapfrogs: int,
    rng: Noise,
    purpose: str,
    step_sizes: Tensor | None,
) -> Particles:
    """One run; without step sizes they follow the acceptance."""
    prior = PRIOR.distribution(infer(PRIOR, model, batch.cut(0), rng), rng, purpose)
    z = prior.sample((num_particles,))
    units = units_of(prior)
    starts = range(0, num_positions(batch), block_size)
    log_weights = torch.zeros(num_particles, len(batch), dtype=torch.float64)
    block_nats = torch.zeros(len(starts), len(batch), dtype=torch.float64)
    fitted = z.new_zeros(len(starts), NUM_MOVES, len(batch))
    ids = ids_of(batch)
    smallest = torch.full((len(batch),), float(num_particles), dtype=torch.float64)
    step_size = z.new_full((len(batch),), 0.5 * z[0, 0].numel() ** -0.25)
    for number, start in enumerate(starts):
        block = block_of(model, batch, start, start + block_size)
        before = log_weights.logsumexp(0)
        with frozen(model, block) as block:
            log_probs = torch.stack([log_likelihood(model, block, one).double().cpu() for one in z])
        log_weights = log_weights + log_probs
        block_nats[number] = before - log_weights.logsumexp(0)
        # If no particle allows the text, that stays so: its nats are infinite, whatever follows.
        log_weights = torch.where(log_weights.logsumexp(0) == -torch.inf, 0.0, log_weights)
        size = log_weights.softmax(0).square().sum(0).reciprocal()
        smallest = torch.minimum(smallest, size)
        if start + block_size >= num_positions(batch):
            break
        steps = torch.full_like(ids, number)
        uniform = rng.uniform(f"{purpose}-draw", ids, steps).double().cpu()
        chosen, log_weights = _drawn(log_weights, uniform, size < num_particles / 2)
        z = z.gather(0, like_events(chosen.to(z.device), z).expand_as(z))
        read = batch.cut(start + block_size)
        with frozen(model, read) as read:
            at = _evaluate(model, read, z)
            for move in range(NUM_MOVES):
                if step_sizes is not None:
                    step_size = step_sizes[number, move]
                fitted[number, move] = step_size
                moved = torch.full_like(ids, number * NUM_MOVES + move)
                shape = (num_particles,)
                momentum = rng.normal(f"{purpose}-momentum", ids, moved, z.shape[2:], shape, like=z)
                accept = rng.uniform(f"{purpose}-accept", ids, moved, shape)
                at, acceptance = transition(
                    at,
                    lambda z, read=read: _evaluate(model, read, z),  # type: ignore[misc]
                    step_size,
                    units,
                    num_leapfrogs,
                    momentum,
                    accept,
                )
                step_size = step_size * ((acceptance.mean(0) - TARGET_ACCEPTANCE) * ADAPTATION_RATE).exp()
            z = at.z
    return Particles(block_nats, smallest, fitted)


def _drawn(log_weights: Tensor, uniform: Tensor, is_due: Tensor) -> tuple[Tensor, Tensor]:
    """Which particles go on, [K, B], and their log weights: by systematic resampling of the texts for which it is due.

    Args:
        log_weights: [K, B].
        uniform: [B], from [0, 1).
        is_due: [B]; the particles of other texts stay as they are, with their weights.
    """
    num_particles = len(log_weights)
    order = torch.arange(num_particles)[:, None]
    ends = log_weights.softmax(0).cumsum(0)
    places = (order + uniform) / num_particles
    drawn = torch.searchsorted(ends.T.contiguous(), places.T.contiguous(), right=True).T.clamp(max=num_particles - 1)
    chosen = torch.where(is_due, drawn, order)
    return chosen, torch.where(is_due, 0.0, log_weights)


def _evaluate(model: Model, batch: BlockedBatch, z: Tensor) -> _LogJoint:
    with torch.enable_grad():
        z = z.detach().requires_grad_()
        joint = log_joint(model, batch, z, num_sample_dims=1)
        log_density = joint.log_likelihood + joint.log_prior
        (gradient,) = torch.autograd.grad(log_density.sum(), z)
    return _LogJoint(z.detach(), log_density.detach(), gradient)

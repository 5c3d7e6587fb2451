"""The gold standard on a small z: Pyro's own No-U-Turn sampler, one sequence and one chain after the other.

It is not a scheme: what NUTS fits (step size, masses, the depth of its tree) is hidden in Pyro's kernel instead of
being a state of values, its paths differ in length from sequence to sequence, and it draws from torch's global
generator. It runs the program by Pyro's own machinery, so that the schemes can be compared with a sampler that shares
no code with them.
"""

from __future__ import annotations

import numpy as np
import torch
from pyro.infer import MCMC, NUTS
from torch import Tensor

from ltm_pyro.inference.base import LATENT, Batch, IndexedBatch, Model, frozen, ids_of
from ltm_pyro.inference.posterior import Posterior
from ltm_pyro.inference.surroundings import entry


@entry()
def nuts(model: Model, batch: IndexedBatch, num_chains: int, num_warmup: int, num_draws: int, seed: int) -> Posterior:
    """Draw from p(z | x) by the No-U-Turn sampler (Hoffman & Gelman 2014), with a mass for each dimension.

    The draws of a sequence depend on the seed and its id, not on its batch. Pyro's parameter store and torch's global
    generator are afterwards as they were.

    Args:
        num_warmup: the number of steps in which step size and masses are fitted, and which are not kept.
        num_draws: the number of draws of each chain.

    Returns:
        samples of [num_chains, num_draws, B, *event_shape].
    """
    sequences = []
    # By name: torch warns of several devices that were not asked for.
    with torch.random.fork_rng(range(torch.cuda.device_count())):
        for index, sequence_id in enumerate(ids_of(batch).tolist()):
            chains = [
                _chain(model, batch[index : index + 1], num_warmup, num_draws, [seed, sequence_id, chain])
                for chain in range(num_chains)
            ]
            sequences.append(torch.stack(chains))
    return Posterior(torch.cat(sequences, dim=2), ids_of(batch))


def _chain(model: Model, batch: Batch, num_warmup: int, num_draws: int, seeds: list[int]) -> Tensor:
    """[num_draws, 1, *event_shape]."""
    torch.manual_seed(int(np.random.SeedSequence(seeds).generate_state(1)[0]))
    kernel = NUTS(model)  # type: ignore[no-untyped-call]  # Pyro's, as below
    mcmc = MCMC(kernel, num_samples=num_draws, warmup_steps=num_warmup, disable_progbar=True)  # type: ignore[no-untyped-call]
    with frozen(model, batch) as batch:
        mcmc.run(batch)
    draws: Tensor = mcmc.get_samples()[LATENT]  # type: ignore[no-untyped-call]
    return draws.detach()

"""The prequential code: every block of a text is predicted with z inferred from the tokens before it.

`prequential` takes the mean over draws of z as they are, `weighted` the mean by how well they explain what was read.
"""

from __future__ import annotations

from typing import Any

from pyro.distributions import TorchDistribution

from ltm_pyro.evaluation.estimators.base import BlockNats, Estimate, Estimator, EstimatorSettings, Meaning
from ltm_pyro.evaluation.inferred import Inferred, density_of
from ltm_pyro.inference import Noise, PosteriorScheme
from ltm_pyro.inference.prequential import Density, Watch, prequential
from ltm_pyro.models import LatentThoughtModel, TokenBatch

LARGEST_BLOCK = 64
"""The largest block, where no size is given [tokens]."""


def estimate(inferred: Inferred, settings: EstimatorSettings, watch: Watch | None = None) -> Estimate:
    limit = inferred.inference.scheme.num_draws
    num_samples = settings.num_samples if limit is None else limit
    return _estimate(inferred, settings, num_samples, inferred.inference.name, watch=watch)


def estimate_weighted(inferred: Inferred, settings: EstimatorSettings) -> Estimate:
    inference = inferred.inference

    def density(
        scheme: PosteriorScheme, state: Any, model: LatentThoughtModel, read: TokenBatch, rng: Noise
    ) -> TorchDistribution:
        used, fitted = density_of(scheme, state, model, read, rng, inference.gaussian)
        return used.distribution(fitted, rng, "weighted")

    return _estimate(inferred, settings, settings.num_samples, inference.z_from, density)


def _estimate(
    inferred: Inferred,
    settings: EstimatorSettings,
    num_samples: int,
    z_from: str,
    density: Density | None = None,
    watch: Watch | None = None,
) -> Estimate:
    inference, block_size = inferred.inference, block_size_of(inferred, settings)
    code = prequential(
        inferred.model,
        inferred.batch,
        inference.scheme,
        block_size,
        num_samples,
        inferred.rng,
        is_streaming=inference.block_size is not None,
        density=density,
        watch=watch,
    )
    return Estimate(code.nats, z_from, num_samples, by_block=BlockNats(block_size, code.block_nats))


def block_size_of(inferred: Inferred, settings: EstimatorSettings) -> int:
    """The size of a block: the one that is asked for, that of training, or a part of a sequence."""
    default = inferred.inference.block_size or max(1, min(LARGEST_BLOCK, inferred.model.config.length // 4))
    return settings.block_size or default


PREQUENTIAL = Estimator(estimate, "every block predicted from the tokens before it, a code length", Meaning.CODE_LENGTH)
WEIGHTED = Estimator(
    estimate_weighted,
    "as prequential, with draws weighted by how well they explain the tokens before a block; at a cost that grows with "
    "the square of the length",
    Meaning.CODE_LENGTH,
)

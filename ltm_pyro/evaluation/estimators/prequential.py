"""The prequential code: every block of a text is predicted with z inferred from the tokens before it.

`prequential` takes the mean over draws of z as they are, `weighted` the mean by how well they explain what was read.
"""

from __future__ import annotations

from typing import Any

from pyro.distributions import TorchDistribution

from ltm_pyro.evaluation.estimators.base import BlockNats, Estimate, Estimator, EstimatorSettings, Meaning
from ltm_pyro.evaluation.inferred import Inferred, density_of
from ltm_pyro.inference import Noise, PosteriorScheme
from ltm_pyro.inference.prequential import Density, Prequential, prequential
from ltm_pyro.models import LatentThoughtModel, TokenBatch

LARGEST_BLOCK = 64
"""The largest block, where no size is given [tokens]."""


def estimate(inferred: Inferred, settings: EstimatorSettings) -> Estimate:
    return estimate_of(code_of(inferred, settings), inferred, settings)


def estimate_of(code: Prequential, inferred: Inferred, settings: EstimatorSettings) -> Estimate:
    """The figure `prequential` of a code that :func:`code_of` has given."""
    return _estimate(code, inferred, settings, inferred.inference.name)


def estimate_weighted(inferred: Inferred, settings: EstimatorSettings) -> Estimate:
    inference = inferred.inference

    def density(
        scheme: PosteriorScheme, state: Any, model: LatentThoughtModel, read: TokenBatch, rng: Noise
    ) -> TorchDistribution:
        used, fitted = density_of(scheme, state, model, read, rng, inference.gaussian)
        return used.distribution(fitted, rng, "weighted")

    return _estimate(code_of(inferred, settings, density), inferred, settings, inference.z_from)


def code_of(
    inferred: Inferred, settings: EstimatorSettings, density: Density | None = None, by_token: bool = False
) -> Prequential:
    """The prequential code of the texts of a batch, with as many draws as the settings say or the scheme has.

    Args:
        density: see :func:`~ltm_pyro.inference.prequential.prequential`; with it the scheme's own draws are not used.
        by_token: whether to give the part of each token too.
    """
    inference, limit = inferred.inference, inferred.inference.scheme.num_draws
    return prequential(
        inferred.model,
        inferred.batch,
        inference.scheme,
        block_size_of(inferred, settings),
        settings.num_samples if limit is None or density is not None else limit,
        inferred.rng,
        is_streaming=inference.block_size is not None,
        density=density,
        by_token=by_token,
    )


def _estimate(code: Prequential, inferred: Inferred, settings: EstimatorSettings, z_from: str) -> Estimate:
    by_block = BlockNats(block_size_of(inferred, settings), code.block_nats)
    return Estimate(code.nats, z_from, code.num_samples, by_block=by_block)


def block_size_of(inferred: Inferred, settings: EstimatorSettings) -> int:
    """The size of a block: the one that is asked for, that of training, or a part of a sequence."""
    default = inferred.inference.block_size or max(1, min(LARGEST_BLOCK, inferred.model.config.length // 4))
    return settings.block_size or default


USES = ("num_samples", "block_size")

PREQUENTIAL = Estimator(
    estimate, "every block predicted from the tokens before it, a code length", Meaning.CODE_LENGTH, uses=USES
)
WEIGHTED = Estimator(
    estimate_weighted,
    "as prequential, with draws weighted by how well they explain the tokens before a block; at a cost that grows with "
    "the square of the length",
    Meaning.CODE_LENGTH,
    uses=USES,
)

"""The prequential code: every block of a text is predicted with z inferred from the tokens before it."""

from __future__ import annotations

from ltm_pyro.evaluation.estimators.base import BlockNats, Estimate, Estimator, EstimatorSettings, Meaning
from ltm_pyro.evaluation.inferred import Inferred
from ltm_pyro.inference.prequential import prequential

LARGEST_BLOCK = 64
"""The largest block, where no size is given [tokens]."""


def estimate(inferred: Inferred, settings: EstimatorSettings) -> Estimate:
    inference = inferred.inference
    limit = inference.scheme.num_draws
    num_samples = settings.num_samples if limit is None else limit
    default = inference.block_size or max(1, min(LARGEST_BLOCK, inferred.model.config.length // 4))
    block_size = settings.block_size or default
    code = prequential(
        inferred.model,
        inferred.batch,
        inference.scheme,
        block_size,
        num_samples,
        inferred.rng,
        is_streaming=inference.block_size is not None,
    )
    return Estimate(code.nats, inference.name, num_samples, by_block=BlockNats(block_size, code.block_nats))


PREQUENTIAL = Estimator(estimate, "every block predicted from the tokens before it, a code length", Meaning.CODE_LENGTH)

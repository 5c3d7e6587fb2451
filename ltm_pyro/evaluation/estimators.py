"""The figures for -log p(x), by name: one function each, from a batch of texts to nats for each of them.

To add one: write a function like those below and give it a line in ESTIMATORS. `python -m ltm_pyro.evaluate` then has
it as `--estimators NAME`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pyro.distributions import TorchDistribution
from torch import Tensor

from ltm_pyro.config import NO_INFERENCE, TrainConfig, scheme_of
from ltm_pyro.inference import PRIOR, Noise, PosteriorScheme, ais, bounds, infer
from ltm_pyro.inference.prequential import prequential
from ltm_pyro.inference.schemes.adam_vi import AdamVI
from ltm_pyro.inference.schemes.vi import VI
from ltm_pyro.inference.weights import ImportanceWeights
from ltm_pyro.models import LatentThoughtModel, TokenBatch

GAUSSIAN_STEPS = 16
"""Steps in which the scales of the Gaussian around a point or draws are fitted."""


LARGEST_BLOCK = 64
"""Of prequential, where no size is given [tokens]."""


@dataclass(frozen=True)
class EstimatorSettings:
    """What an estimate costs, and how close it comes."""

    num_samples: int = 64
    """Draws of z for each text (elbo, iwae), or for each block (prequential).
    A scheme of points or chains gives all draws that it has."""
    block_size: int | None = None
    """prequential: positions that are predicted from one inference [tokens].
    Default: a quarter of a sequence, but at most 64."""
    num_temperatures: int = 100
    """ais: temperatures between q and the posterior."""
    num_leapfrogs: int = 5
    """ais: leapfrogs from one temperature to the next."""
    num_chains: int = 8
    """ais: chains of each text."""

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            least = 2 if name == "num_chains" else 1
            if value is not None and value < least:
                raise ValueError(f"{name} must be at least {least}, not {value}")


@dataclass(frozen=True)
class Inference:
    """How z of a text is inferred."""

    name: str
    """What to call it."""
    scheme: PosteriorScheme
    gaussian: VI
    """Fits the scales of a Gaussian around the points or draws of a scheme without a density, so that there is a q."""

    @property
    def posterior(self) -> str:
        """What q is."""
        return self.name if self.scheme.has_density else f"a Gaussian around {self.name}"

    @classmethod
    def without(cls) -> Inference:
        """No inference: z from the prior."""
        return cls("the prior", PRIOR, PRIOR)


def inference_of(config: TrainConfig, inference: str | None = None, fast_steps: int | None = None) -> Inference:
    """How z is inferred for a figure: by the config's scheme, or by another one with the config's settings for it.

    Args:
        inference: another scheme.
        fast_steps: another number of steps than the config's.

    Raises:
        InputError: as :func:`scheme_of`.
    """
    name = inference or config.inference
    if name == NO_INFERENCE:
        return Inference.without()
    scheme = scheme_of(config, name, fast_steps)
    if scheme.has_density and not scheme.loss_is_bound:
        name += " fitted to reused noise"
    return Inference(name, scheme, dataclasses.replace(config.schemes["vi"], num_steps=GAUSSIAN_STEPS, stride=1))


class Inferred:
    """A batch and the posteriors of its texts, which are inferred when a figure first asks for them.

    Args:
        state: of the scheme, where the posteriors have been inferred already.
    """

    def __init__(
        self, model: LatentThoughtModel, batch: TokenBatch, inference: Inference, rng: Noise, state: Any = None
    ) -> None:
        self.model = model
        self.batch = batch
        self.inference = inference
        self.rng = rng
        self._state = state

    @functools.cached_property
    def _fitted(self) -> tuple[PosteriorScheme, Any]:
        scheme, model, batch, rng = self.inference.scheme, self.model, self.batch, self.rng
        state = infer(scheme, model, batch, rng) if self._state is None else self._state
        if scheme.has_density:
            return scheme, state
        return bounds.gaussian_around(scheme, state, model, batch, rng, self.inference.gaussian)

    def q(self, purpose: str = "distribution") -> TorchDistribution:
        """q(z), batch_shape [B], whose draws use noise that no step has seen; the same draws for the same purpose."""
        scheme, state = self._fitted
        return scheme.distribution(state, self.rng, purpose)


@dataclass(frozen=True)
class Scores:
    """An estimate of -log p(x) for each of B texts; every tensor is [B] float64."""

    nats: Tensor
    posterior: str | None
    """What z was drawn from; None of a model without z."""
    num_samples: int
    """Draws of z, or chains, for each text."""
    rate: Tensor | None = None
    """KL(q ‖ p), the part of an ELBO that pays for z [nats]."""
    variance: Tensor | None = None
    """The squared Monte Carlo standard error of `nats`; None where the figure has no such error."""
    effective_sample_size: Tensor | None = None
    """Of importance weights, from 1 to `num_samples`."""
    pareto_k: Tensor | None = None
    """Shape of the tail of importance weights; above 0.7 they are not to be trusted."""


def elbo(inferred: Inferred, settings: EstimatorSettings) -> Scores:
    estimate = bounds.elbo(inferred.model, inferred.batch, inferred.q(), settings.num_samples)
    return Scores(
        estimate.nelbo,
        inferred.inference.posterior,
        estimate.num_samples,
        rate=estimate.kl,
        variance=estimate.monte_carlo_standard_error.square(),
    )


def iwae(inferred: Inferred, settings: EstimatorSettings) -> Scores:
    weights = bounds.iwae(inferred.model, inferred.batch, inferred.q(), settings.num_samples)
    return dataclasses.replace(_of_weights(weights, inferred.inference.posterior), pareto_k=weights.pareto_k)


def annealed(inferred: Inferred, settings: EstimatorSettings) -> Scores:
    q = inferred.q("annealing")
    plan = annealing_plan(inferred, q, settings)
    weights = ais.forward_ais(inferred.model, inferred.batch, q, plan, inferred.rng)
    return _of_weights(weights, f"{inferred.inference.posterior}, annealed")


def annealing_plan(inferred: Inferred, q: TorchDistribution, settings: EstimatorSettings) -> ais.AnnealingPlan:
    """Temperatures and step sizes of the texts, from a pilot whose randomness no scored chain sees."""
    return ais.pilot(
        inferred.model,
        inferred.batch,
        q,
        inferred.rng,
        settings.num_temperatures,
        settings.num_leapfrogs,
        settings.num_chains,
    )


def _of_weights(weights: ImportanceWeights, posterior: str) -> Scores:
    return Scores(
        weights.nats,
        posterior,
        len(weights.log_weights),
        variance=weights.monte_carlo_standard_error.square(),
        effective_sample_size=weights.effective_sample_size,
    )


def predictive(inferred: Inferred, settings: EstimatorSettings) -> Scores:
    inference = inferred.inference
    limit = inference.scheme.num_draws
    num_samples = settings.num_samples if limit is None else limit
    block_size = settings.block_size or max(1, min(LARGEST_BLOCK, inferred.model.config.length // 4))
    code = prequential(inferred.model, inferred.batch, inference.scheme, block_size, num_samples, inferred.rng)
    return Scores(code.nats, inference.name, num_samples)


def reused_noise(inferred: Inferred, settings: EstimatorSettings) -> Scores:
    scheme = AdamVI(num_steps=inferred.inference.scheme.num_steps, noise="reused")
    state = infer(scheme, inferred.model, inferred.batch, inferred.rng)
    estimate = bounds.reused_noise(inferred.model, inferred.batch, scheme, state)
    return Scores(estimate.nelbo, "adamvi fitted to reused noise", 1, rate=estimate.kl)


def exact(inferred: Inferred, settings: EstimatorSettings) -> Scores:
    """-log p(x) itself, of a model without z: with nothing to draw, the ELBO of the prior is no estimate."""
    estimate = bounds.elbo(inferred.model, inferred.batch, inferred.q(), num_samples=1)
    return Scores(estimate.nelbo, None, 1, rate=estimate.kl)


@dataclass(frozen=True)
class Estimator:
    """One kind of figure."""

    score: Callable[[Inferred, EstimatorSettings], Scores]
    meaning: str
    """What the figure is to -log p(x), in a word or two."""
    is_valid: bool
    """Whether it is an upper bound on -log p(x) in expectation, or the length of a code."""


ESTIMATORS = {
    "elbo": Estimator(elbo, "upper bound", is_valid=True),
    "iwae": Estimator(iwae, "upper bound", is_valid=True),
    "ais": Estimator(annealed, "upper bound", is_valid=True),
    "prequential": Estimator(predictive, "code length", is_valid=True),
    "reused-noise": Estimator(reused_noise, "NOT A BOUND", is_valid=False),
}
"""The figures of a model with z."""

EXACT = Estimator(exact, "exact", is_valid=True)
"""The figure of a model without."""

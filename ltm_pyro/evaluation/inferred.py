"""How z of a text is inferred for a figure, and the resulting posteriors of a batch."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pyro.distributions import TorchDistribution

from ltm_pyro.config import NO_INFERENCE, TrainConfig, scheme_of, settings_of
from ltm_pyro.inference import PRIOR, DensityScheme, Noise, PosteriorScheme, bounds, has_density, infer
from ltm_pyro.inference.diagnostics import HIGHEST_R_HAT, diverged, mixing
from ltm_pyro.inference.export import evaluate_draws
from ltm_pyro.inference.schemes.adam_vi import AdamVI
from ltm_pyro.inference.schemes.vi import VI
from ltm_pyro.models import LatentThoughtModel, TokenBatch

GAUSSIAN_STEPS = 16
"""Steps in which the scales of the Gaussian around a point or around draws are fitted."""
GAUSSIAN = VI(num_steps=GAUSSIAN_STEPS)
REUSED_NOISE = AdamVI(noise="reused")


@dataclass(frozen=True)
class Inference:
    """How z of a text is inferred."""

    name: str
    """The name of the scheme, as tables show it."""
    scheme: PosteriorScheme
    gaussian: VI = GAUSSIAN
    """Fits the scales of a Gaussian around the points or draws of a scheme without a density, so that there is a q."""
    reused: AdamVI = REUSED_NOISE
    """Fits q to a single noise, for the figure of the reference implementation; the number of steps is the scheme's."""
    block_size: int | None = None
    """For prequential: the tokens in a block, where z is inferred from one block after another as in training; None
    where it is inferred for each block anew."""

    @property
    def z_from(self) -> str:
        """What q is: the distribution that a bound draws z from."""
        return self.name if self.scheme.has_density else f"a Gaussian around {self.name}"

    @classmethod
    def from_prior(cls) -> Inference:
        """No inference: z is drawn from the prior. It is also the only one of a model without z."""
        return cls("the prior", PRIOR)

    def with_settings(self, **settings: int) -> Inference:
        """The same inference with other settings of its scheme."""
        return dataclasses.replace(self, scheme=dataclasses.replace(self.scheme, **settings))


def inference_of(config: TrainConfig, inference: str | None = None, fast_steps: int | None = None) -> Inference:
    """How z is inferred for a figure: by the scheme of a run, or by another one with the run's settings for it.

    Args:
        inference: the name of another scheme.
        fast_steps: another number of steps than the run's.

    Raises:
        InputError: if the scheme needs what the model does not have; see :func:`scheme_of`.
    """
    name = config.inference if inference is None else inference
    if name == NO_INFERENCE:
        return Inference.from_prior()
    scheme = scheme_of(config, name, fast_steps)
    if scheme.has_density and not scheme.loss_is_bound:
        name += " fitted to reused noise"
    # Every position of a text counts in the fit of a Gaussian, also where the run's own steps skip some.
    gaussian = dataclasses.replace(settings_of(config, VI), num_steps=GAUSSIAN_STEPS, stride=1)
    reused = dataclasses.replace(settings_of(config, AdamVI), noise="reused")
    return Inference(name, scheme, gaussian, reused, config.objective.block_size)


def inferences_of(config: TrainConfig, names: Sequence[str], fast_steps: Sequence[int]) -> list[Inference]:
    """The ways in which z of a run is inferred, without repetitions; a model without z has only one.

    Args:
        names: the names of schemes; if there are none, that of the run.
        fast_steps: numbers of steps; if there are none, that of the run.

    Raises:
        InputError: if one of them needs what the run does not have.
    """
    if config.inference == NO_INFERENCE:
        return [Inference.from_prior()]
    steps = fast_steps or (config.fast_steps,)
    ways = itertools.product(names or (config.inference,), steps)
    return list(dict.fromkeys(inference_of(config, name, number) for name, number in ways))


def held_at_start(config: TrainConfig) -> Inference:
    """The same run without thinking at test time: z stays where inference starts, before anything of a text is read.

    Where z is inferred block by block, that is the run's scheme without steps. A scheme with an encoder, which thinks
    without any step, has draws from the prior instead, and so has a run whose z is inferred from a text at once.
    """
    block_size = config.objective.block_size
    if block_size is not None and not scheme_of(config).needs_encoder:
        return inference_of(config, fast_steps=0)
    return dataclasses.replace(Inference.from_prior(), block_size=block_size)


@dataclass(frozen=True)
class ChainHealth:
    """How the chains of a batch of texts are."""

    num_diverged: int
    """Texts on which a chain has diverged."""
    num_unmixed: int | None
    """Texts on which they have not mixed; None where too few draws are kept to say, or a chain has diverged."""


class Inferred:
    """A batch and the posteriors of its texts, which are inferred when a figure first asks for them.

    Args:
        state: the state of the scheme, where the posteriors have been inferred already.
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
    def _fitted(self) -> tuple[DensityScheme, Any]:
        """A scheme with a density, and its state."""
        scheme, model, batch, rng = self.inference.scheme, self.model, self.batch, self.rng
        self._state = infer(scheme, model, batch, rng) if self._state is None else self._state
        return density_of(scheme, self._state, model, batch, rng, self.inference.gaussian)

    @functools.cached_property
    def chains(self) -> ChainHealth | None:
        """How the chains are that z comes from; None where it does not, or has not been inferred of whole texts."""
        scheme, state = self.inference.scheme, self._state
        if not scheme.has_chains or state is None or scheme.num_draws is None:
            return None
        posterior = scheme.posterior(state, scheme.num_draws, self.rng)
        terms = evaluate_draws(posterior, self.model, self.batch)
        num_diverged = int(diverged(posterior, terms, self.model, self.batch, self.rng).sum())
        # Numbers of a chain that has diverged are too large for sums of their squares.
        found = None if num_diverged else mixing(posterior)
        num_unmixed = None if found is None else int((~(found.largest_r_hat <= HIGHEST_R_HAT)).sum())
        return ChainHealth(num_diverged, num_unmixed)

    def q(self, purpose: str = "distribution") -> TorchDistribution:
        """q(z), batch_shape [B]. Its draws use noise that no step has seen; they are the same for the same purpose."""
        scheme, state = self._fitted
        return scheme.distribution(state, self.rng, purpose)


def density_of(
    scheme: PosteriorScheme, state: Any, model: LatentThoughtModel, batch: TokenBatch, rng: Noise, gaussian: VI
) -> tuple[DensityScheme, Any]:
    """A scheme with a density, and its state: this one, or a Gaussian that `gaussian` fits around points or draws."""
    if has_density(scheme):
        return scheme, state
    return bounds.gaussian_around(scheme, state, model, batch, rng, gaussian)

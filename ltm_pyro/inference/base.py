"""The protocol of a posterior scheme, and `infer`, which runs one.

The model is any Pyro program `model(batch)` with a latent site "z" under one plate named "sequences", at dim -1, and
observed sites. The batch is any object with `len` and `sequence_ids` ([B] int64). Nothing else is known of
either, so the schemes are tested on models whose posterior has a closed form.

A scheme is a frozen dataclass of its settings. Its state is a value: a frozen dataclass of detached tensors whose
leading dimension is the sequence. It can be indexed, stored, permuted and joined; nothing about a local posterior
lives in Pyro's parameter store, and no randomness is hidden (see `noise.py`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, Self

import pyro
import torch
from pyro import poutine
from pyro.distributions import TorchDistribution
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from ltm_pyro.inference.noise import Noise
from ltm_pyro.inference.posterior import Posterior

LATENT = "z"
PLATE = "sequences"

Model = Callable[..., Any]
Guide = Callable[..., None]


class Batch(Protocol):
    """What inference asks of a batch."""

    sequence_ids: Tensor

    def __len__(self) -> int: ...


@dataclass(frozen=True)
class State:
    """What every scheme's state holds. The leading dimension of every field is the sequence."""

    sequence_ids: Tensor
    """[B] int64: names the noise of each sequence."""
    step: Tensor
    """[B] int64: steps taken, skipped ones included."""
    num_skipped: Tensor
    """[B] int64: steps whose outcome was not finite, and which left the sequence as it was."""

    def __len__(self) -> int:
        return len(self.sequence_ids)

    def __getitem__(self, index: slice | Tensor) -> Self:
        """The state of the sequences that the index selects."""
        return dataclasses.replace(self, **{name: value[index] for name, value in vars(self).items()})


def first_fields(batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """The fields of `State` before the first step."""
    return batch.sequence_ids, torch.zeros_like(batch.sequence_ids), torch.zeros_like(batch.sequence_ids)


@dataclass(frozen=True)
class StepInfo:
    """What a step saw, per sequence; never a mean over the batch."""

    objective: Tensor
    """[B], nats: the estimate of what the scheme lowers, at the state the step started from."""
    acceptance: Tensor | None = None
    """[B]: the probability with which the proposals were accepted, mean over chains; None where nothing is refused."""


class PosteriorScheme(Protocol):
    """Posterior inference of z, one file a scheme; `SCHEMES` lists them.

    Every method works on all B sequences at once, and no sequence influences another.
    """

    has_density: ClassVar[bool]
    """Whether q is a distribution with a density over z, as an ELBO needs; false for points and draws."""
    has_chains: ClassVar[bool]
    """Whether draws are those of Markov chains, with settings `num_chains` and `num_kept`."""
    needs_encoder: ClassVar[bool]
    """Whether it takes a program with a method `encode`, which proposes a posterior without any step."""
    loss_is_bound: bool
    """Whether the negative ELBO at a draw of `guide` is, in expectation, an upper bound on -log p(x)."""
    num_steps: int
    """T, the steps that `infer` takes."""

    @property
    def num_draws(self) -> int | None:
        """Different draws that `posterior` has after `infer`; None where it has as many as are asked for."""
        ...

    @property
    def num_gradients(self) -> int:
        """Gradients of the log joint that `infer` takes for each sequence, those of all its chains and of a warm-up."""
        ...

    def init(self, model: Model, batch: Batch, rng: Noise, warm: Tensor | None = None) -> Any:
        """The state to start from: at the prior, or at z = `warm` ([B, *event_shape])."""
        ...

    def step(self, model: Model, state: Any, batch: Batch, rng: Noise) -> tuple[Any, StepInfo]:
        """One step for every sequence. Reads the model's weights, and leaves their `.grad` alone."""
        ...

    def guide(self, model: Model, state: Any, batch: Batch, rng: Noise) -> Guide:
        """The posterior as a Pyro guide with the one site "z", for a slow step; each call draws anew.

        Args:
            batch: what z was inferred from, which may be less than what the slow step is taken on.
        """
        ...

    def posterior(self, state: Any, num_samples: int, rng: Noise) -> Posterior:
        """Draws [chain, draw, B, *event_shape], chains times draws being `num_samples`, from noise no step has seen."""
        ...

    def mean(self, state: Any) -> Tensor:
        """Mean of the posterior, [B, *event_shape]."""
        ...

    def distribution(self, state: Any, rng: Noise, purpose: str = "distribution") -> TorchDistribution:
        """q(z), batch_shape [B], whose draws use noise no step has seen. Only a scheme that has a density has it.

        Args:
            purpose: whose noise: draws for one purpose have nothing to do with those for another.
        """
        ...


def require_positive(settings: Any, *names: str) -> None:
    """Check the settings of a scheme.

    Raises:
        ValueError: if one of those named is not a positive number.
    """
    for name in names:
        value = getattr(settings, name)
        if not 0 < value < math.inf:
            raise ValueError(f"{name} must be positive, not {value}")


def require_full_weights(batch: Batch) -> None:
    """Check that every position counts fully or not at all: otherwise a figure would be one of something else.

    Raises:
        ValueError: if a position weighs anything but 0 or 1.
    """
    weights = getattr(batch, "weights", None)
    if weights is not None and not ((weights == 0) | (weights == 1)).all():
        raise ValueError("a figure needs position weights of 0 and 1")


def infer(
    scheme: PosteriorScheme,
    model: Model,
    batch: Batch,
    rng: Noise,
    warm: Tensor | None = None,
    watch: Callable[[Any, StepInfo | None], None] | None = None,
) -> Any:
    """Infer z of every sequence: `scheme.init`, then `scheme.num_steps` steps with the weights frozen.

    A sequence whose step has an outcome that is not finite keeps its state, and counts it in `num_skipped`.

    Args:
        rng: `BatchNoise`, or `SequenceNoise` for a result that does not depend on batch-mates.
        warm: where to start instead of the prior, [B, *event_shape].
        watch: called with the state and what the step saw: at the start (None) and after every step.

    Returns:
        the scheme's state.
    """
    with frozen(model):
        if scheme.num_steps:
            batch = prepared(model, batch)
        state = scheme.init(model, batch, rng, warm)
        if watch is not None:
            watch(state, None)
        for _ in range(scheme.num_steps):
            proposed, info = scheme.step(model, state, batch, rng)
            state = keep_finite(state, proposed)
            if watch is not None:
                watch(state, info)
    return state


def keep_finite(state: State, proposed: State) -> Any:
    """The proposed state; for the sequences in which it is not finite, the old one with the skip counted."""
    floats = {name: value for name, value in vars(proposed).items() if value.is_floating_point()}
    finite = torch.stack([value.isfinite().unsqueeze(-1).flatten(1).all(1) for value in floats.values()]).all(0)
    if finite.all():
        return proposed
    kept = {
        name: torch.where(finite.view(-1, *[1] * (value.dim() - 1)), value, getattr(state, name))
        for name, value in floats.items()
    }
    return dataclasses.replace(proposed, **kept, num_skipped=state.num_skipped + (~finite).to(state.num_skipped))


@contextlib.contextmanager
def frozen(model: Model) -> Iterator[None]:
    """Within the block a module's weights get no gradient, and Pyro's global parameter store sees none of them.

    A model that is a plain function reads its parameters from that store, as always.
    """
    if not isinstance(model, torch.nn.Module):
        yield
        return
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    training = [module for module in model.modules() if module.training]
    try:
        for weight in weights:
            weight.requires_grad_(False)
        for module in training:
            module.training = False  # Pyro warns of weights without gradient in a module that is training.
        with pyro.get_param_store().scope():
            yield
    finally:
        for weight in weights:
            weight.requires_grad_(True)
        for module in training:
            module.training = True


def prepared(model: Model, batch: Batch) -> Any:
    """The batch with what does not depend on z computed once, if the program has a method `prepare(batch)` for that.

    To be used while the weights are frozen, and then dropped.
    """
    prepare = getattr(model, "prepare", None)
    return batch if prepare is None else prepare(batch)


def latent_prior(model: Model, batch: Batch) -> TorchDistribution:
    """p(z) for every sequence, batch_shape [B]: what the program says at site "z", without running the rest of it.

    Raises:
        ValueError: if the program has no such site under exactly the plate "sequences", or another latent before it.
    """
    try:
        poutine.escape(model, escape_fn=_is_latent)(batch)
    except poutine.runtime.NonlocalExit as found:
        site = found.site
    else:
        raise ValueError(f'the model has no latent site "{LATENT}"')
    if site["name"] != LATENT:
        raise ValueError(f'the only latent site must be "{LATENT}", but the model has "{site["name"]}"')
    plates = [(plate.name, plate.dim) for plate in site["cond_indep_stack"]]
    if plates != [(PLATE, -1)]:
        raise ValueError(f'site "{LATENT}" must stand under one plate, "{PLATE}" at dim -1, not under {plates}')
    if site["cond_indep_stack"][0].full_size != len(batch):
        raise ValueError(f'the plate "{PLATE}" must not subsample: it would scale the density of a local variable')
    return site["fn"]


def _is_latent(site: Any) -> bool:
    return not site["is_observed"] and not site_is_subsample(site)


@dataclass(frozen=True)
class LogJoint:
    """The log joint density of texts and thoughts, in nats."""

    log_likelihood: Tensor
    """log p(x | z), [*sample_shape, B]."""
    log_prior: Tensor
    """log p(z), [*sample_shape, B]."""
    prior: TorchDistribution
    """p(z) itself, batch_shape [*sample_shape, B]."""


def log_joint(model: Model, batch: Batch, z: Tensor, num_sample_dims: int = 0) -> LogJoint:
    """Evaluate the program at z, [*sample_shape, B, *event_shape], where sample_shape has `num_sample_dims` dimensions.

    The terms are sums over all that the program observes: a mean over tokens would give the posterior a wrong
    temperature.

    Raises:
        ValueError: if the program has a latent site other than "z".
    """
    with contextlib.ExitStack() as stack:
        for dim, size in enumerate(reversed(z.shape[:num_sample_dims])):
            stack.enter_context(pyro.plate(f"draws_{dim}", size, dim=-2 - dim))
        trace = poutine.trace(poutine.condition(model, data={LATENT: z})).get_trace(batch)
    trace.compute_log_prob()
    latent = trace.nodes[LATENT]
    log_likelihood = torch.zeros_like(latent["log_prob"])
    for name, site in trace.nodes.items():
        if site["type"] != "sample" or name == LATENT or site_is_subsample(site):
            continue
        if not site["is_observed"]:
            raise ValueError(f'the only latent site must be "{LATENT}", but the model has "{name}"')
        if site["log_prob"].shape != log_likelihood.shape:
            shapes = f"{list(site['log_prob'].shape)}, not {list(log_likelihood.shape)}"
            raise ValueError(f'observed site "{name}" must have one density a sequence, but has {shapes}')
        log_likelihood = log_likelihood + site["log_prob"]
    return LogJoint(log_likelihood, latent["log_prob"], latent["fn"])

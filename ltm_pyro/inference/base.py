"""The protocol of a posterior scheme, and `infer`, which runs one.

The model is any Pyro program `model(batch)` with a latent site "z" under one plate named "sequences", at dim -1, and
observed sites. The prior at site "z" is any distribution over real numbers that can be drawn from and that has a
density, of any event shape; `unconstrained` (supports.py) makes such a program of one whose z is positive, in an
interval or on a simplex. The batch is any object with `len`, as a tensor; its `sequence_ids` ([B] int64) name the noise
of its sequences, and without them they are 0 … B - 1. Nothing else is assumed of either, so the schemes are tested on
models whose posterior is known exactly.

A scheme is a frozen dataclass of its settings. Its state is a value: a frozen dataclass of detached tensors whose
leading dimension is the sequence. It can be indexed, stored, permuted and joined. Nothing about a local posterior is
kept in Pyro's parameter store, and no randomness is hidden (see `noise.py`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import (
    Any,
    ClassVar,
    Literal,
    Protocol,
    Self,
    TypeGuard,
    TypeVar,
    cast,
    get_args,
    get_origin,
    get_type_hints,
    overload,
)

import pyro
import torch
from pyro import poutine
from pyro.distributions import TorchDistribution
from pyro.poutine.util import site_is_subsample
from torch import Tensor
from torch.distributions import Distribution, Independent, Normal, constraints, kl_divergence

from ltm_pyro.errors import require_number, require_whole
from ltm_pyro.inference.noise import Noise
from ltm_pyro.inference.posterior import Posterior
from ltm_pyro.inference.surroundings import entry, normal_tensors

LATENT = "z"
PLATE = "sequences"

Model = Callable[..., Any]
Guide = Callable[..., None]


class Batch(Protocol):
    """What inference asks of a batch. It may also name its sequences: see :func:`ids_of`."""

    def __len__(self) -> int: ...


def ids_of(batch: Batch) -> Tensor:
    """[B] int64: names the noise of each sequence. The batch's `sequence_ids` if it has them, else 0 … B - 1."""
    ids: Tensor | None = getattr(batch, "sequence_ids", None)
    return torch.arange(len(batch)) if ids is None else ids


class IndexedBatch(Batch, Protocol):
    """A batch from which sequences can be selected."""

    def __getitem__(self, index: slice | Tensor, /) -> Any: ...


B = TypeVar("B", bound=Batch)


@dataclass(frozen=True)
class State:
    """What the state of every scheme holds. The leading dimension of every field is the sequence.

    All fields are on the device of z: a step that copied its counters there would wait for the device.
    """

    sequence_ids: Tensor
    """[B] int64: names the noise of each sequence."""
    step: Tensor
    """[B] int64: the number of steps taken, skipped ones included."""
    num_skipped: Tensor
    """[B] int64: the number of steps whose outcome was not finite, and which left the sequence as it was."""

    def __init_subclass__(cls) -> None:
        # Before `dataclass` gives each class one that prints all of its numbers.
        cls.__repr__ = State.__repr__  # type: ignore[method-assign]

    def __repr__(self) -> str:
        shapes = ", ".join(f"{name} {list(value.shape)}" for name, value in vars(self).items())
        return f"{type(self).__name__}({shapes})"

    def __len__(self) -> int:
        return len(self.sequence_ids)

    def __getitem__(self, index: slice | Tensor) -> Self:
        """The state of the sequences that the index selects."""
        return dataclasses.replace(self, **{name: value[index] for name, value in vars(self).items()})

    def detached(self) -> Self:
        """The same numbers without gradient."""
        return dataclasses.replace(self, **{name: value.detach() for name, value in vars(self).items()})

    @classmethod
    def join(cls, states: Sequence[Self]) -> Self:
        """One state of the sequences of several, in their order. They may stand at different steps."""
        return cls(**{name: torch.cat([getattr(state, name) for state in states]) for name in vars(states[0])})


def first_fields(batch: Batch, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The fields of `State` before the first step, on the device of z."""
    ids = ids_of(batch).to(z.device)
    return ids, torch.zeros_like(ids), torch.zeros_like(ids)


@dataclass(frozen=True)
class StepInfo:
    """What a step computed of each sequence. Nothing here is a mean over the batch."""

    objective: Tensor
    """[B], nats: the estimate of what the scheme lowers, at the state that the step started from."""
    acceptance: Tensor | None = None
    """[B]: the probability with which the proposals were accepted, averaged over chains; None if the scheme accepts
    every move."""


class PosteriorScheme(Protocol):
    """A scheme of posterior inference of z. Each has a file of its own; `SCHEMES` lists them.

    Every method works on all B sequences at once, and no sequence influences another. The first sentence of a scheme's
    docstring is its help text. What other code must know of a scheme is stated by the attributes here, so that
    nothing has to ask for its class.
    """

    __dataclass_fields__: ClassVar[dict[str, dataclasses.Field[Any]]]

    has_density: ClassVar[bool]
    """Whether q is a distribution with a density over z, which an ELBO needs. If so, the scheme is a
    :class:`DensityScheme`; if not, it infers points or draws."""
    has_chains: ClassVar[bool]
    """Whether its draws are those of Markov chains. If so, the scheme is a :class:`ChainScheme`."""
    can_absorb: ClassVar[bool]
    """Whether its posterior can take in a text block by block, from one gradient a block. If so, the scheme is a
    :class:`StreamingScheme`."""
    needs_encoder: ClassVar[bool]
    """Whether it needs a program with a method `encode`, which proposes a posterior without any step."""

    @property
    def loss_is_bound(self) -> bool:
        """Whether the negative ELBO at a draw of `guide` is, in expectation, an upper bound on -log p(x)."""
        ...

    @property
    def num_steps(self) -> int:
        """T, the number of steps that `infer` takes."""
        ...

    @property
    def num_draws(self) -> int | None:
        """The number of different draws that `posterior` has after `infer`; None if it has as many as are asked for."""
        ...

    @property
    def num_gradients(self) -> int:
        """The number of gradients of the log joint that `infer` takes for each sequence, over all its chains and
        including a warm-up."""
        ...

    def init(self, model: Model, batch: Batch, rng: Noise, warm: Tensor | None = None) -> Any:
        """The state to start from: at the prior, or at z = `warm` ([B, *event_shape])."""
        ...

    def step(self, model: Model, state: Any, batch: Batch, rng: Noise) -> tuple[Any, StepInfo]:
        """Take one step for every sequence. It reads the model's weights and leaves their `.grad` alone."""
        ...

    def guide(self, model: Model, state: Any, batch: Batch, rng: Noise) -> Guide:
        """The posterior as a Pyro guide with the one site "z", for a slow step. Each call draws anew.

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


class DensityScheme(PosteriorScheme, Protocol):
    """A scheme whose q has a density."""

    def distribution(self, state: Any, rng: Noise, purpose: str = "distribution") -> TorchDistribution:
        """q(z), batch_shape [B], whose draws use noise that no step has seen.

        Args:
            purpose: names the noise. Draws for one purpose are independent of those for another.
        """
        ...


class ChainScheme(PosteriorScheme, Protocol):
    """A scheme of Markov chains. Both numbers are settings, which `dataclasses.replace` changes."""

    @property
    def num_chains(self) -> int:
        """The number of chains of each sequence."""
        ...

    @property
    def num_kept(self) -> int:
        """The number of draws that each chain keeps."""
        ...


@dataclass(frozen=True, eq=False)
class BlockEvidence:
    """What one gradient says of a block of each text."""

    z: Tensor
    """[B, *event_shape]: a draw of the scheme's `guide`."""
    gradient: Tensor
    """[B, *event_shape]: the gradient of -log p(block | z) with respect to z there."""
    share: float
    """How much the block counts now, from 0 to 1. It may be read again later, to count for the rest."""
    is_new: bool
    """Whether nothing of this block has been absorbed before."""


class StreamingScheme(PosteriorScheme, Protocol):
    """A scheme whose posterior can take in a text block by block, in memory that does not grow."""

    def absorb(self, state: Any, evidence: BlockEvidence, prior: TorchDistribution) -> Any:
        """The posterior after one more block, or a part of one.

        Args:
            prior: p(z), batch_shape [B].
        """
        ...


class StreamingEncoderScheme(StreamingScheme, DensityScheme, Protocol):
    """A streaming scheme with an encoder, which reads a block before any gradient of it is absorbed."""

    def propose(self, model: Model, state: Any, block: Batch) -> Any:
        """What the encoder makes of the posterior before a block and the block; with the encoder's gradient."""
        ...


def has_density(scheme: PosteriorScheme) -> TypeGuard[DensityScheme]:
    """Whether the scheme states that it has a density, in a form that type checkers understand."""
    return scheme.has_density


def has_chains(scheme: PosteriorScheme) -> TypeGuard[ChainScheme]:
    """Whether the scheme states that it has chains, in a form that type checkers understand."""
    return scheme.has_chains


def can_absorb(scheme: PosteriorScheme) -> TypeGuard[StreamingScheme]:
    """Whether the scheme states that it can absorb, in a form that type checkers understand."""
    return scheme.can_absorb


def absorbs_by_encoder(scheme: PosteriorScheme) -> TypeGuard[StreamingEncoderScheme]:
    """Whether the scheme states that it can absorb and needs an encoder, in a form that type checkers understand."""
    return scheme.can_absorb and scheme.needs_encoder


def require_settings(settings: Any, *positive: str) -> None:
    """Check all settings of a scheme, a dataclass, by the types of its fields.

    A whole number is none below 0, another number is not a text, and a `Literal` is one of its values. What else a
    setting must be, such as the number of chains at least 1, is for the scheme to say.

    Args:
        positive: names of the numbers that must be above 0.

    Raises:
        ValueError: if one of them cannot be used.
    """
    scheme: Any = type(settings)  # type checkers do not know that a class can be a key
    for name, kind in _kinds_of_settings(scheme).items():
        value = getattr(settings, name)
        if kind is int:
            require_whole(name, value, 0)
        elif kind is float:
            require_number(name, value)
        elif get_origin(kind) is Literal and value not in get_args(kind):
            raise ValueError(f"{name} must be one of {', '.join(map(str, get_args(kind)))}, not {value!r}")
    require_positive(settings, *positive)


@functools.cache
def _kinds_of_settings(scheme: type[Any]) -> dict[str, Any]:
    """The types of the fields of a scheme; they are resolved once, which takes longer than a step of a small model."""
    hints = get_type_hints(scheme)
    return {field.name: hints[field.name] for field in dataclasses.fields(scheme)}


def require_positive(settings: Any, *names: str) -> None:
    """Check settings that are numbers.

    Raises:
        ValueError: if one of those named is not a positive number.
    """
    for name in names:
        value = getattr(settings, name)
        if not 0 < value < math.inf:
            raise ValueError(f"{name} must be positive, not {value}")


def require_texts(batch: Batch) -> None:
    """Check that a batch has a sequence.

    Raises:
        ValueError: if it has none.
    """
    if not len(batch):
        raise ValueError("the batch is empty: give at least one sequence")


def require_full_weights(batch: Batch) -> None:
    """Check that there is something to score, and that every position of it counts fully or not at all: otherwise a
    figure would be that of something else.

    Raises:
        ValueError: if the batch is empty, or a position weighs anything but 0 or 1.
    """
    require_texts(batch)
    weights = getattr(batch, "weights", None)
    if weights is not None and not ((weights == 0) | (weights == 1)).all():
        raise ValueError("a figure needs position weights of 0 and 1")


@entry()
def infer(
    scheme: PosteriorScheme,
    model: Model,
    batch: Batch,
    rng: Noise,
    warm: Tensor | None = None,
    watch: Callable[[Any, StepInfo | None], None] | None = None,
) -> Any:
    """Infer z of every sequence: `scheme.init`, then `scheme.num_steps` steps, with the weights frozen.

    If the outcome of a step is not finite for a sequence, that sequence keeps its state and counts the step in
    `num_skipped`.

    Args:
        rng: `BatchNoise`, or `SequenceNoise` for a result that does not depend on batch-mates.
        warm: where to start instead of the prior, [B, *event_shape].
        watch: called with the state and the step's info, at the start (with None) and after every step.

    Returns:
        the scheme's state.

    Raises:
        ValueError: if the batch is empty, or the scheme's number of steps is not a whole number of at least 0.
    """
    require_texts(batch)
    require_whole("num_steps", scheme.num_steps, 0)  # again here, for schemes of others that do not check it
    with contextlib.ExitStack() as stack:
        batch, warm = normal_tensors(batch), normal_tensors(warm)
        if scheme.num_steps:
            batch = stack.enter_context(frozen(model, batch))
        else:  # there is nothing to precompute for
            stack.enter_context(frozen(model))
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
    """The proposed state; for sequences in which it is not finite, the old one with the skipped step counted."""
    # What the step has left as it was is known to be finite.
    floats = {
        name: value
        for name, value in vars(proposed).items()
        if value.is_floating_point() and value is not getattr(state, name)
    }
    if not floats:
        return proposed
    finite = torch.stack([_is_finite(value) for value in floats.values()]).all(0)
    # On a device the host would wait for the answer.
    if finite.device.type == "cpu" and finite.all():
        return proposed
    kept = {
        name: torch.where(finite.view(-1, *[1] * (value.dim() - 1)), value, getattr(state, name))
        for name, value in floats.items()
    }
    return dataclasses.replace(proposed, **kept, num_skipped=state.num_skipped + (~finite).to(state.num_skipped))


def _is_finite(value: Tensor) -> Tensor:
    """Whether all numbers of each sequence are finite, [B]; without a copy of them.

    By the largest and the smallest, which are NaN if any number is: `isfinite` on all of them, and their norm of order
    infinity, take ten times as long on a CPU.
    """
    if not value.numel():
        return value.new_ones(len(value), dtype=torch.bool)
    numbers = flat(value)
    return numbers.amax(1).isfinite() & numbers.amin(1).isfinite()


def flat(values: Tensor, num_outer: int = 1) -> Tensor:
    """All numbers of an event in one dimension, of which a single number is one: [*outer, *event] to [*outer, d].

    Args:
        num_outer: the number of dimensions before those of the event.
    """
    return values.unsqueeze(-1).flatten(num_outer)


@overload
def frozen(model: Model) -> AbstractContextManager[None]: ...


@overload
def frozen(model: Model, batch: B) -> AbstractContextManager[B]: ...


def frozen(model: Model, batch: Batch | None = None) -> AbstractContextManager[Any]:
    """Freeze the model's weights, and precompute what does not depend on z.

        with frozen(model, batch) as batch:
            log_joint(model, batch, z)

    Within the block a module's weights get no gradient, and Pyro's global parameter store sees none of them. A model
    that is a plain function reads its parameters from that store, as always. Other threads that infer wait until the
    block ends, and torch's inference mode is left (see `surroundings.py`).

    Args:
        batch: what the program is to be run on. Without it, nothing is precomputed.

    Yields:
        the batch to use in the block, and only there: what `model.precompute(batch)` returns if the program has such a
        method, and otherwise the batch as it is.
    """
    return _frozen(model, batch)


@contextlib.contextmanager
def _frozen(model: Model, batch: Batch | None) -> Iterator[Batch | None]:
    with entry(), _frozen_weights(model):
        batch = normal_tensors(batch)
        precompute = getattr(model, "precompute", None)
        yield batch if batch is None or precompute is None else precompute(batch)


@contextlib.contextmanager
def _frozen_weights(model: Model) -> Iterator[None]:
    if not isinstance(model, torch.nn.Module):
        yield
        return
    # One that was made in torch's inference mode could not be given its gradient back.
    weights = [weight for weight in model.parameters() if weight.requires_grad and not weight.is_inference()]
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


@entry()
def latent_prior(model: Model, batch: Batch) -> TorchDistribution:
    """p(z) of every sequence, batch_shape [B]: the distribution at site "z", without running the rest of the program.

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
    return cast(TorchDistribution, site["fn"])


def _is_latent(site: Any) -> bool:
    return not site["is_observed"] and not site_is_subsample(site)


def is_independent_normal(distribution: Distribution) -> bool:
    """Whether it is a Gaussian whose dimensions are independent."""
    base = distribution.base_dist if isinstance(distribution, Independent) else distribution
    return isinstance(base, Normal)


def moments(prior: TorchDistribution) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of p(z) in each dimension, [B, *event_shape], without gradient.

    Raises:
        ValueError: if the distribution has none, as a Cauchy distribution, or cannot state them; or if it is not one
            over all real numbers.
    """
    require_real(prior)
    try:
        mean, stddev = prior.mean.detach(), prior.stddev.detach()
    except NotImplementedError:
        has_moments = False
    else:
        # A Gaussian has them, and the check would wait for the device.
        has_moments = is_independent_normal(prior) or bool((mean.isfinite() & stddev.isfinite()).all())
    if not has_moments:
        raise ValueError(f"{prior} has no mean and standard deviation to start from and to scale steps by")
    return mean, stddev


def is_real(support: constraints.Constraint) -> bool:
    """Whether a support is all real numbers, in any number of dimensions."""
    while inner := getattr(support, "base_constraint", None):  # of dimensions that are independent, or of a mixture
        support = inner
    return support is constraints.real


def require_real(prior: TorchDistribution) -> None:
    """Check that p(z) has a density over all real numbers, where gradients can move z.

    A distribution that does not state its support is taken at its word that it has a density there.

    Raises:
        ValueError: if it is discrete, or constrained.
    """
    try:
        support = prior.support
    except NotImplementedError:
        return
    if support is None:
        return
    if support.is_discrete:
        raise ValueError(f'site "{LATENT}" is discrete ({support}), and has no gradient to infer it by: sum over it')
    if not is_real(support):
        raise ValueError(
            f'site "{LATENT}" is constrained ({support}): infer it in the program '
            "ltm_pyro.inference.unconstrained(model), which has it on the real numbers"
        )


def exact_kl(q: TorchDistribution, prior: TorchDistribution) -> Tensor | None:
    """KL(q ‖ p) in closed form, in nats, of batch_shape; None if torch and Pyro know none for these distributions."""
    try:
        return kl_divergence(q, prior)
    except NotImplementedError:
        return None


def kl(q: TorchDistribution, prior: TorchDistribution, z: Tensor) -> Tensor:
    """KL(q ‖ p) in nats, of batch_shape.

    In closed form if there is one; otherwise its unbiased estimate log q(z) - log p(z) at one draw.

    Args:
        z: a draw of q, [*batch_shape, *event_shape], by the reparametrisation of q if a gradient is to be taken.
    """
    exact = exact_kl(q, prior)
    return q.log_prob(z) - prior.log_prob(z) if exact is None else exact


@dataclass(frozen=True)
class LogJoint:
    """The log joint density of texts and thoughts, in nats."""

    log_likelihood: Tensor
    """log p(x | z), [*sample_shape, B]."""
    log_prior: Tensor
    """log p(z), [*sample_shape, B]."""
    prior: TorchDistribution
    """p(z) itself, batch_shape [*sample_shape, B]."""


@entry()
def log_joint(model: Model, batch: Batch, z: Tensor, num_sample_dims: int = 0) -> LogJoint:
    """Evaluate the program at z, [*sample_shape, B, *event_shape], where sample_shape has `num_sample_dims` dimensions.

    The terms are sums over all that the program observes: a mean over tokens would give the posterior a wrong
    temperature.

    Raises:
        ValueError: if the program has a latent site other than "z".
    """
    trace = _trace_at(model, batch, z, num_sample_dims)
    trace.compute_log_prob(lambda name, _: name == LATENT)
    latent = trace.nodes[LATENT]
    return LogJoint(_log_likelihood(trace), latent["log_prob"], cast(TorchDistribution, latent["fn"]))


@entry()
def log_likelihood(model: Model, batch: Batch, z: Tensor) -> Tensor:
    """log p(x | z) alone, [B], for z of [B, *event_shape]; the errors are those of :func:`log_joint`."""
    return _log_likelihood(_trace_at(model, batch, z, 0))


def _trace_at(model: Model, batch: Batch, z: Tensor, num_sample_dims: int) -> poutine.Trace:
    """The program run at z."""
    with contextlib.ExitStack() as stack:
        for dim, size in enumerate(reversed(z.shape[:num_sample_dims])):
            stack.enter_context(pyro.plate(f"draws_{dim}", size, dim=-2 - dim))
        return poutine.trace(poutine.condition(model, data={LATENT: z})).get_trace(batch)


def _log_likelihood(trace: poutine.Trace) -> Tensor:
    """The sum of the log densities of all observed sites of a trace."""
    trace.compute_log_prob(lambda name, _: name != LATENT)
    # Pyro's types do not know that this node is a sample site with a distribution and a value.
    latent: Any = trace.nodes[LATENT]
    total: Tensor = latent["value"].new_zeros(latent["fn"].batch_shape)
    for name, site in trace.nodes.items():
        if site["type"] != "sample" or name == LATENT or site_is_subsample(site):
            continue
        if not site["is_observed"]:
            raise ValueError(f'the only latent site must be "{LATENT}", but the model has "{name}"')
        if site["log_prob"].shape != total.shape:
            shapes = f"{list(site['log_prob'].shape)}, not {list(total.shape)}"
            raise ValueError(f'observed site "{name}" must have one density a sequence, but has {shapes}')
        total = total + site["log_prob"]
    return total

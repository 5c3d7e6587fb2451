"""Amortised inference: a diagonal Gaussian q(z) per sequence, which the program's encoder proposes from the text.

    q(z|x) = N(μ_φ(x), σ_φ(x)²)

(Kingma & Welling 2014, arXiv 1312.6114), which T steps of `adamvi` may then refine (Kim et al. 2018, arXiv 1802.02550).
The encoder's weights φ are weights of the program, and the slow step trains them with the others on the same negative
ELBO. Its gradient passes through the refinement as if that were a translation of μ and log σ, without second
derivatives (as in the first-order approximation of Finn, Abbeel & Levine 2017, arXiv 1703.03400, section 5.2); at T = 0
it is exact.

Where a text is read block by block, the encoder proposes each posterior from the one before it and the newest block,

    q_i = N(μ_φ(q_{i-1}, b_i), σ_φ(q_{i-1}, b_i)²)

(amortised variational filtering: Marino et al. 2018, arXiv 1811.05090). T gradients then move its mean, as `map` moves
its point. The encoder is trained by the loss of the next block, through one proposal: q_{i-1} is a constant to it.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar

from pyro.distributions import TorchDistribution
from torch import Tensor

from ltm_pyro.inference.base import Batch, BlockEvidence, Guide, Model, StepInfo, require_settings
from ltm_pyro.inference.guides import fresh_noise, guide_of, normal
from ltm_pyro.inference.noise import Noise
from ltm_pyro.inference.posterior import Posterior
from ltm_pyro.inference.schemes.adam_vi import AdamVI, AdamVIState
from ltm_pyro.inference.schemes.block_step import block_step


@dataclass(frozen=True)
class AmortizedState(AdamVIState):
    mean_squares: Tensor
    """[B]: the mean square of the gradients of the blocks that were absorbed, summed over them."""


@dataclass(frozen=True)
class Amortized:
    """A Gaussian with independent dimensions, proposed by an encoder and refined by steps of adamvi.

    The program has a method `encode(batch)`, which returns mean and log scale of q, [B, *event_shape] each; to read a
    text block by block, it takes those of the posterior before the block too, `encode(block, mean, log_scale)`. For
    `pyro.infer.SVI` to train its weights, the method must register them with Pyro, as the program does with its own
    (`pyro.module`, or `pyro.nn.pyro_method` if the program is a `PyroModule`).
    """

    num_steps: int = 0
    """The number of steps of refinement for each sequence (T)."""
    learning_rate: float = 0.1
    """The step size of Adam for the mean [units of z, whose prior has scale 1] and for the log scale, as in adamvi.
    It is used where z of a text is inferred at once."""
    epsilon: float = 0.2
    """Adam's epsilon [nats per unit of z], as in adamvi; where z of a text is inferred at once."""
    block_step: float = 0.3
    """The distance that a block moves the mean on average beyond what the encoder proposes, as in map.
    It is used with --infer-from past and at least one fast step."""

    has_density: ClassVar[bool] = True
    has_chains: ClassVar[bool] = False
    can_absorb: ClassVar[bool] = True
    needs_encoder: ClassVar[bool] = True
    loss_is_bound: ClassVar[bool] = True
    num_draws: ClassVar[None] = None

    def __post_init__(self) -> None:
        require_settings(self, "learning_rate", "epsilon", "block_step")

    @property
    def num_gradients(self) -> int:
        """One gradient a step of refinement; the encoder takes none."""
        return self.num_steps

    @property
    def _refinement(self) -> AdamVI:
        return AdamVI(self.num_steps, self.learning_rate, self.epsilon)

    def init(self, model: Model, batch: Batch, rng: Noise, warm: Tensor | None = None) -> AmortizedState:
        """The Gaussian that the encoder proposes; with `warm`, only its scale.

        Raises:
            ValueError: if the program has no encoder.
        """
        mean, log_scale = _encode(model, batch)
        start = self._refinement.init(model, batch, rng, mean if warm is None else warm)
        fields = vars(start) | {"log_scale": log_scale.detach().clone()}
        return AmortizedState(**fields, mean_squares=start.mean.new_zeros(len(start)))

    def step(self, model: Model, state: AmortizedState, batch: Batch, rng: Noise) -> tuple[AmortizedState, StepInfo]:
        return self._refinement.step(model, state, batch, rng)

    def propose(self, model: Model, state: AmortizedState, block: Batch) -> AmortizedState:
        """The Gaussian that the encoder makes of the present one and a block, with the encoder's gradient.

        Raises:
            ValueError: if the program has no encoder, or one that cannot go on from a posterior.
        """
        mean, log_scale = _encode(model, block, state.mean, state.log_scale)
        return dataclasses.replace(state, mean=mean, log_scale=log_scale)

    def absorb(self, state: AmortizedState, evidence: BlockEvidence, prior: TorchDistribution) -> AmortizedState:
        """A step of the mean against the gradient, of length `block_step` on average over the blocks."""
        mean, mean_squares = block_step(state.mean, state.mean_squares, state.step, evidence, self.block_step)
        return dataclasses.replace(state, step=state.step + 1, mean=mean, mean_squares=mean_squares)

    def mean(self, state: AmortizedState) -> Tensor:
        """μ, [B, *event_shape]."""
        return self._refinement.mean(state)

    def distribution(self, state: AmortizedState, rng: Noise, purpose: str = "distribution") -> TorchDistribution:
        """q(z), batch_shape [B]; each draw of the object that is returned uses new noise, which no step has seen."""
        return self._refinement.distribution(state, rng, purpose)

    def guide(self, model: Model, state: AmortizedState, batch: Batch, rng: Noise) -> Guide:
        """q(z), drawn afresh; its mean and log scale have the gradient of the encoder's proposal."""
        draw = fresh_noise(state, state.mean, rng, "guide")

        # In the guide and not before it, so that Pyro is told of the encoder's weights where it looks for them.
        def guide(*args: object, **kwargs: object) -> None:
            mean, log_scale = _encode(model, batch)
            mean = _with_gradient_of(mean, state.mean)
            log_scale = _with_gradient_of(log_scale, state.log_scale)
            guide_of(normal(mean, log_scale.exp(), draw))()

        return guide

    def posterior(self, state: AmortizedState, num_samples: int, rng: Noise) -> Posterior:
        """Independent draws from q: one chain."""
        return self._refinement.posterior(state, num_samples, rng)


def _encode(model: Model, batch: Batch, *before: Tensor) -> tuple[Tensor, Tensor]:
    encode = getattr(model, "encode", None)
    if encode is None:
        raise ValueError("amortized needs a model with an encoder: a method `encode(batch)`, mean and log scale of z")
    mean, log_scale = encode(batch, *before)
    return mean, log_scale


def _with_gradient_of(proposed: Tensor, refined: Tensor) -> Tensor:
    """The refined value, whose derivative with respect to the proposed one is taken to be 1."""
    return refined + (proposed - proposed.detach())

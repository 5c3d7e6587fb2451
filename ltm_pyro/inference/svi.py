"""The slow step: stochastic variational inference of the weights, whatever scheme inferred z.

    β ← optimiser(β, ∇_β Σ_b [KL(q_b ‖ p) - E_{z ~ q_b} log p_β(x_b | z)] / number of predicted tokens)

The estimate and its gradient are Pyro's (`pyro.infer.TraceMeanField_ELBO`), with the scheme's guide; without clipping,
accumulation and normalisation a step by AdamW is `pyro.infer.SVI.step`, bit for bit.
"""

from __future__ import annotations

import contextlib
import math
from dataclasses import dataclass, replace
from typing import Any, Literal

import pyro
import torch
from pyro import poutine
from pyro.infer import TraceMeanField_ELBO
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ltm_pyro.inference.base import LATENT, Batch, Guide, Model, kl, log_likelihood, require_settings
from ltm_pyro.inference.muon import Muon
from ltm_pyro.inference.surroundings import entry, normal_tensors

Number = Any
"""A number of Python, or a tensor of no dimension."""


@dataclass(frozen=True)
class OptimizerConfig:
    """The optimiser of the weights, and its learning rate: warm-up, then a cosine to the final rate."""

    learning_rate: float = 2e-3
    """The highest learning rate."""
    final_learning_rate: float = 2e-4
    """The learning rate of the last step."""
    warmup_steps: int = 50
    """The number of slow steps in which the learning rate rises from 0 to its highest value."""
    beta_1: float = 0.9
    """The decay of the mean of the gradients: AdamW's first moment, and Muon's momentum."""
    beta_2: float = 0.95
    """The decay of AdamW's second moment."""
    weight_decay: float = 0.1
    """The weight decay of matrices. Norms and the parameters of a learned prior do not decay."""
    max_gradient_norm: float = 1.0
    """The largest norm of the gradient of all weights together. A larger gradient is scaled down to it."""
    algorithm: Literal["adamw", "muon"] = "adamw"
    """The optimiser.
    adamw: AdamW.
    muon: Muon for the matrices of layers, and AdamW for the rest. It reaches a loss in fewer steps."""

    def __post_init__(self) -> None:
        require_settings(self, "learning_rate")
        if self.learning_rate > 1:
            raise ValueError(f"learning_rate must be at most 1, not {self.learning_rate}")
        if not self.max_gradient_norm > 0:
            raise ValueError(f"max_gradient_norm must be positive, not {self.max_gradient_norm}")
        for name in ("final_learning_rate", "warmup_steps", "weight_decay"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must not be negative, but is {getattr(self, name)}")
        for name in ("beta_1", "beta_2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 0 and below 1, not {getattr(self, name)}")


@dataclass(frozen=True)
class SlowLoss:
    """What a slow step saw, summed over sequences. The sum of two is that of all their sequences.

    On a device the numbers that it computes stay there as tensors of no dimension, until `on_host` waits for them.
    """

    nelbo: Number = 0.0
    """The estimate of the negative ELBO, in nats. Where q has no density (a point, a draw): the negative log joint."""
    kl: Number = 0.0
    """KL(q ‖ p), in nats; its estimate at the draw of z where there is no closed form. Where q has no density:
    -log p(z)."""
    num_tokens: int = 0
    """The number of predicted tokens."""
    num_bytes: int = 0
    """The bytes of the texts."""
    num_skipped_fast_steps: Number = 0
    """Fast steps of single sequences that were left out because a value was not finite."""
    num_unusable: Number = 0
    """Micro-batches in which no sequence could take any fast step."""

    @property
    def nll(self) -> Number:
        """-E_q log p(x | z), in nats."""
        return self.nelbo - self.kl

    def __add__(self, other: SlowLoss) -> SlowLoss:
        return SlowLoss(*(getattr(self, name) + getattr(other, name) for name in vars(self)))

    def on_host(self) -> SlowLoss:
        """The same numbers as numbers of Python, in one wait for the device."""
        tensors = {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}
        if not tensors:
            return self
        values = torch.stack(list(tensors.values())).tolist()
        return replace(self, **{name: _of_field(name, value) for name, value in zip(tensors, values, strict=True)})


def _of_field(name: str, value: float) -> Number:
    return int(value) if name.startswith("num_") else value


def as_number(value: Tensor) -> Number:
    """A tensor of no dimension as a number of Python where that takes no wait for a device, and else in float64."""
    return value.item() if value.device.type == "cpu" else value.detach().double()


@entry()
@torch.enable_grad()
def elbo_backward(model: Model, guide: Guide, batch: Batch, num_tokens: float) -> SlowLoss:
    """Add the gradient of the negative ELBO per token to the weights' `.grad`.

    Args:
        num_tokens: what the summed loss is divided by: the predicted tokens of all batches that share one update.
    """
    batch = normal_tensors(batch)
    # In a store of its own: the global one would hold on to these weights, and confuse them with another model's.
    with pyro.get_param_store().scope():
        traced_model, traced_guide = poutine.trace(model), poutine.trace(guide)
        nelbo = TraceMeanField_ELBO().differentiable_loss(traced_model, traced_guide, batch)  # type: ignore[no-untyped-call]
    # Pyro's types do not know that the nodes of a trace are sample sites with values.
    latent: Any = traced_guide.trace.nodes[LATENT]
    prior: Any = traced_model.trace.nodes[LATENT]
    with torch.no_grad():
        divergence = kl(latent["fn"], prior["fn"], latent["value"]).sum()
    (nelbo / num_tokens).backward()
    return SlowLoss(as_number(nelbo), as_number(divergence))


@entry()
@torch.enable_grad()
def predict_backward(model: Model, z: Tensor, batch: Batch, num_tokens: float) -> tuple[SlowLoss, Tensor]:
    """Add the gradient of -log p(x | z) per token to the weights' `.grad`.

    Args:
        z: [B, *event_shape]. If it has a gradient itself, that is added too: so an encoder is trained that made it.
        num_tokens: what the summed loss is divided by, as in :func:`elbo_backward`.

    Returns:
        the loss, and its gradient with respect to z, [B, *event_shape], in nats per unit of z.
    """
    z, batch = normal_tensors(z), normal_tensors(batch)
    if z.requires_grad:
        z.retain_grad()
    else:
        z = z.detach().requires_grad_()
    with pyro.get_param_store().scope():  # for the reason given above
        nll = -log_likelihood(model, batch, z).sum()
    torch.autograd.backward(nll / num_tokens)
    if z.grad is None:  # the program does not read z
        return SlowLoss(as_number(nll)), torch.zeros_like(z)
    return SlowLoss(as_number(nll)), z.grad.mul_(num_tokens)


def accumulating(synchronised: Model) -> contextlib.AbstractContextManager[None]:
    """A block whose gradients are added up in each process, and averaged in the next backward pass after it."""
    return synchronised.no_sync() if isinstance(synchronised, DistributedDataParallel) else contextlib.nullcontext()


class WeightOptimizer:
    """AdamW or Muon, with one global gradient clip and a schedule that is a pure function of the step."""

    def __init__(self, model: nn.Module, config: OptimizerConfig, num_steps: int) -> None:
        self.config = config
        self.num_steps = num_steps
        self.gradient_norm = math.nan
        """The norm of the gradient of the last update, before it was clipped."""
        self.weights = [weight for weight in model.parameters() if weight.requires_grad]
        prior = getattr(model, "prior", None)
        of_prior = set(prior.parameters()) if isinstance(prior, nn.Module) else set()
        # Matrices decay; norms and the parameters of a learned prior do not.
        decays = {weight: weight.dim() == 2 and weight not in of_prior for weight in self.weights}
        groups: list[dict[str, Any]] = [
            {"params": [w for w in self.weights if decays[w]], "weight_decay": config.weight_decay},
            {"params": [w for w in self.weights if not decays[w]], "weight_decay": 0.0},
        ]
        settings: dict[str, Any] = {"lr": config.learning_rate, "betas": (config.beta_1, config.beta_2)}
        if config.algorithm == "muon":
            # A row of an embedding is a vector of its own: it learns when its token occurs.
            tables = {module.weight for module in model.modules() if isinstance(module, nn.Embedding)}
            matrices = [weight for weight in groups[0]["params"] if weight not in tables]
            groups[0]["params"] = [weight for weight in groups[0]["params"] if weight in tables]
            # Layers that are several maps in one product say so.
            stacks = {getattr(module, "weight", None): getattr(module, "num_maps", 1) for module in model.modules()}
            for num_maps in sorted({stacks.get(weight, 1) for weight in matrices}):
                of_size = [weight for weight in matrices if stacks.get(weight, 1) == num_maps]
                groups.append({"params": of_size, "weight_decay": config.weight_decay, "num_maps": num_maps})
            self.algorithm: torch.optim.Optimizer = Muon(groups, **settings)
        else:
            self.algorithm = torch.optim.AdamW(groups, **settings)

    def learning_rate(self, step: int) -> float:
        """The rate of the slow step with this number, counted from 0."""
        config = self.config
        if step < config.warmup_steps:
            return config.learning_rate * (step + 1) / config.warmup_steps
        progress = min(1.0, (step - config.warmup_steps + 1) / max(1, self.num_steps - config.warmup_steps))
        cosine = (1 + math.cos(math.pi * progress)) / 2
        return config.final_learning_rate + (config.learning_rate - config.final_learning_rate) * cosine

    @entry()
    def update(self, step: int, is_usable: bool = True) -> bool:
        """Apply the gradients that have been accumulated, and clear them.

        Args:
            is_usable: false leaves them out.

        Returns:
            whether they were applied: usable, and finite. If not, weights and moments are left as they were.
        """
        # Where weights are split between processes, it is the norm of all their parts, the same in each process.
        self.gradient_norm = nn.utils.clip_grad_norm_(self.weights, self.config.max_gradient_norm).item()
        is_usable = is_usable and math.isfinite(self.gradient_norm)
        if is_usable:
            for group in self.algorithm.param_groups:
                group["lr"] = self.learning_rate(step)
            self.algorithm.step()
        self.discard()
        return is_usable

    def discard(self) -> None:
        """Clear the gradients that have been accumulated."""
        self.algorithm.zero_grad()

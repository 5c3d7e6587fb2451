"""Figures over many texts: total nats over total tokens, with what they mean and whether they are valid."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch

from ltm_pyro.inference import Noise, bounds, infer
from ltm_pyro.inference.bounds import Elbo
from ltm_pyro.inference.vi import VI
from ltm_pyro.models import TokenBatch

GAUSSIAN_STEPS = 16
"""Steps in which the scales of the Gaussian around a point or draws are fitted."""


@dataclass
class HeldOut:
    """The negative ELBO of a set of texts: an upper bound on -log p(x), in expectation over the draws of z."""

    posterior: str
    """What z was drawn from."""
    num_samples: int
    """Draws of z for each text."""
    nll: float = 0.0
    """-E_q log p(x | z), the distortion [nats, all texts]."""
    kl: float = 0.0
    """KL(q ‖ p), the rate [nats, all texts]."""
    variance: float = 0.0
    """Of `nll`, over the draws of z [nats squared]."""
    num_tokens: int = 0
    """Predicted tokens, end-of-text included."""
    num_bytes: int = 0
    """Bytes of the texts."""
    num_sequences: int = 0

    def add(self, estimate: Elbo, batch: TokenBatch) -> None:
        """Count the texts of a batch in."""
        self.nll += estimate.nll.sum().item()
        self.kl += estimate.kl.sum().item()
        self.variance += estimate.monte_carlo_standard_error.square().sum().item()
        self.num_tokens += int(batch.weights.sum().item())
        self.num_bytes += int(batch.num_bytes.sum())
        self.num_sequences += len(batch)

    @property
    def bits_per_byte(self) -> float:
        """The bound; its nats include every end-of-text, its bytes are those of the text."""
        return (self.nll + self.kl) / math.log(2) / self.num_bytes

    def record(self) -> dict[str, Any]:
        """The figures under the names of `metrics.jsonl`."""
        return {
            "split": "validation",
            "estimator": "elbo",
            "posterior": self.posterior,
            "num_samples": self.num_samples,
            "valid_bound": True,
            **per_token(self.nll, self.kl, self.num_tokens, self.num_bytes),
            "monte_carlo_standard_error": math.sqrt(self.variance) / self.num_tokens,
            "num_tokens": self.num_tokens,
            "num_sequences": self.num_sequences,
        }


def per_token(nll: float, kl: float, num_tokens: int, num_bytes: int) -> dict[str, float]:
    """Figures of an ELBO whose two parts are given in nats, summed over all texts."""
    nelbo = nll + kl
    return {
        "nelbo_nats_per_token": nelbo / num_tokens,
        "nll_nats_per_token": nll / num_tokens,
        "kl_nats_per_token": kl / num_tokens,
        "bits_per_byte": nelbo / math.log(2) / num_bytes,
        # A bound this loose has no perplexity worth a float.
        "perplexity": math.exp(min(nelbo / num_tokens, 700.0)),
    }


def held_out_elbo(
    model: Callable[..., Any],
    batches: Iterable[TokenBatch],
    scheme: Any,
    name: str,
    num_samples: int,
    rng: Noise,
    gaussian: VI,
) -> HeldOut:
    """The bound of a scheme's posteriors, each inferred from its whole text and scored with noise the fit never saw.

    Args:
        scheme: where it has no density, the bound is that of a Gaussian around its points or draws.
        name: what to call the scheme.
        num_samples: draws of z for each text.
        gaussian: how the scales of such a Gaussian are fitted.
    """
    total = HeldOut(name if scheme.has_density else f"gaussian around {name}", num_samples)
    for batch in batches:
        state, q_scheme = infer(scheme, model, batch, rng), scheme
        if not scheme.has_density:
            q_scheme, state = bounds.gaussian_around(scheme, state, model, batch, rng, gaussian)
        total.add(bounds.elbo(model, batch, q_scheme.distribution(state, rng), num_samples), batch)
    return total


def order_zero_bits_per_byte(texts: Iterable[str]) -> float:
    """Entropy of the bytes of the texts, each taken alone: what a model without any context could reach."""
    counts = torch.zeros(256, dtype=torch.float64)
    for text in texts:
        counts += torch.bincount(torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8), minlength=256)
    probabilities = counts[counts > 0] / counts.sum()
    return -(probabilities * probabilities.log2()).sum().item()

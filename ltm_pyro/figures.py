"""Figures over many texts: total nats over total tokens, with what they mean and whether they are valid."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

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
    fast_steps: int
    """T, the steps in which that was inferred."""
    num_samples: int
    """Draws of z for each text."""
    nll: float = 0.0
    """-E_q log p(x | z), the distortion [nats, all texts]."""
    kl: float = 0.0
    """KL(q ‖ p), the rate [nats, all texts]."""
    variance: float = 0.0
    """Of `nll`, over the draws of z [nats squared]."""
    num_bytes: int = 0
    """Bytes of the texts."""
    num_sequences: int = 0
    documents: dict[int, tuple[float, int]] = field(default_factory=dict)
    """(nats, predicted tokens) of each document, of which several sequences may come."""

    @property
    def num_tokens(self) -> int:
        """Predicted tokens, end-of-text included."""
        return sum(num_tokens for _, num_tokens in self.documents.values())

    def add(self, estimate: Elbo, batch: TokenBatch, document_ids: Tensor) -> None:
        """Count the texts of a batch in; `document_ids` [B] says which of them belong together."""
        self.nll += estimate.nll.sum().item()
        self.kl += estimate.kl.sum().item()
        self.variance += estimate.monte_carlo_standard_error.square().sum().item()
        self.num_bytes += int(batch.num_bytes.sum())
        self.num_sequences += len(batch)
        rows = zip(document_ids.tolist(), estimate.nelbo.tolist(), batch.weights.sum(1).tolist(), strict=True)
        for document, nats, num_tokens in rows:
            before = self.documents.get(document, (0.0, 0))
            self.documents[document] = (before[0] + nats, before[1] + int(num_tokens))

    @property
    def standard_error(self) -> float | None:
        """Of the nats per token as an estimate for other documents like these; unknown from a single one.

        The usual error of a ratio of two totals (Cochran 1977, eq. 6.4).
        """
        count = len(self.documents)
        if count < 2:
            return None
        ratio = (self.nll + self.kl) / self.num_tokens
        residuals = sum((nats - ratio * num_tokens) ** 2 for nats, num_tokens in self.documents.values())
        return math.sqrt(count / (count - 1) * residuals) / self.num_tokens

    def record(self) -> dict[str, Any]:
        """The figures under the names of `metrics.jsonl`."""
        return {
            "estimator": "elbo",
            "posterior": self.posterior,
            "fast_steps": self.fast_steps,
            "num_samples": self.num_samples,
            "valid_bound": True,
            **per_token(self.nll, self.kl, self.num_tokens, self.num_bytes),
            "monte_carlo_standard_error": math.sqrt(self.variance) / self.num_tokens,
            "standard_error": self.standard_error,
            "num_tokens": self.num_tokens,
            "num_sequences": self.num_sequences,
        }

    def __str__(self) -> str:
        record = self.record()
        in_bytes = ""
        if self.num_bytes:
            kl_bits = self.kl / math.log(2) / self.num_bytes
            in_bytes = f"at most {record['bits_per_byte']:.3f} bits/byte, of which KL {kl_bits:.3f}; "
        error = "" if self.standard_error is None else f" ± {self.standard_error:.3f} (over documents)"
        return (
            f"z from {self.posterior}: {in_bytes}{record['nelbo_nats_per_token']:.3f}{error} nats/token "
            f"[ELBO, T = {self.fast_steps}, {self.num_sequences} texts, {self.num_samples} draws]"
        )


def per_token(nll: float, kl: float, num_tokens: int, num_bytes: int) -> dict[str, float | None]:
    """Figures of an ELBO whose two parts are given in nats, summed over all texts; None where one does not exist."""
    nelbo = nll + kl
    return {
        "nelbo_nats_per_token": nelbo / num_tokens,
        "nll_nats_per_token": nll / num_tokens,
        "kl_nats_per_token": kl / num_tokens,
        "bits_per_byte": nelbo / math.log(2) / num_bytes if num_bytes else None,
        "perplexity": math.exp(nelbo / num_tokens) if nelbo / num_tokens < 700 else None,
    }


def held_out_elbo(
    model: Callable[..., Any],
    batches: Iterable[TokenBatch],
    document_ids: Tensor,
    scheme: Any,
    name: str,
    num_samples: int,
    rng: Noise,
    gaussian: VI,
) -> HeldOut:
    """The bound of a scheme's posteriors, each inferred from its whole text and scored with noise the fit never saw.

    Args:
        document_ids: the document of each sequence id.
        scheme: where it has no density, the bound is that of a Gaussian around its points or draws.
        name: what to call the scheme.
        num_samples: draws of z for each text.
        gaussian: how the scales of such a Gaussian are fitted.
    """
    posterior = name if scheme.has_density else f"a Gaussian around {name}"
    total = HeldOut(posterior, scheme.num_steps, num_samples)
    for batch in batches:
        state, q_scheme = infer(scheme, model, batch, rng), scheme
        if not scheme.has_density:
            q_scheme, state = bounds.gaussian_around(scheme, state, model, batch, rng, gaussian)
        estimate = bounds.elbo(model, batch, q_scheme.distribution(state, rng), num_samples)
        total.add(estimate, batch, document_ids[batch.sequence_ids])
    return total


def order_zero_bits_per_byte(texts: Iterable[str]) -> float:
    """Entropy of the bytes of the texts, each taken alone: what a model without any context could reach."""
    counts = torch.zeros(256, dtype=torch.float64)
    for text in texts:
        counts += torch.from_numpy(np.bincount(np.frombuffer(text.encode(), dtype=np.uint8), minlength=256))
    probabilities = counts[counts > 0] / counts.sum()
    return (probabilities * (1 / probabilities).log2()).sum().item()

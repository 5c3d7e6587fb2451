"""What a comparison of schemes finds, and its table."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.distributions import Independent, kl_divergence

from ltm_pyro.evaluation.figures import Figure
from ltm_pyro.evaluation.inferred import Inferred
from ltm_pyro.evaluation.report import number_text, print_rows, tail_text
from ltm_pyro.inference import Posterior
from ltm_pyro.inference.base import frozen, latent_prior
from ltm_pyro.inference.diagnostics import HIGHEST_R_HAT, Mixing
from ltm_pyro.inference.export import DrawTerms


@dataclass(frozen=True)
class SlotKL:
    """How much each slot of z says: KL of the marginals of q from the prior, summed over a slot's dimensions."""

    nats: Tensor
    """[L, S]: mean over the sequences."""
    is_estimate: bool
    """Whether it was estimated from draws of q, since it has no closed form."""


@torch.no_grad()
def kl_per_slot(inferred: Inferred, num_samples: int) -> SlotKL | None:
    """The KL of each slot; None where the dimensions of the prior are not independent, so that no slot has one alone.

    The marginal of each number of z under q is a Gaussian.

    Args:
        num_samples: draws of z where the KL has no closed form.
    """
    q = inferred.q("kl per slot")
    marginals: TorchDistribution = dist.Normal(q.mean, q.stddev)
    with frozen(inferred.model):
        prior = latent_prior(inferred.model, inferred.batch)
    while isinstance(prior, Independent):
        prior = prior.base_dist
    if prior.event_shape:
        return None
    try:
        kl, is_estimate = kl_divergence(marginals, prior), False
    except NotImplementedError:
        z = q.sample(torch.Size([num_samples]))
        kl, is_estimate = (marginals.log_prob(z) - prior.log_prob(z)).mean(0), True
    return SlotKL(kl.sum(-1).mean(0).cpu(), is_estimate)


@dataclass(frozen=True)
class Comparison:
    """What a scheme gave for B sequences, and at what cost."""

    name: str
    """The name of the scheme."""
    num_gradients: int
    """Gradient evaluations for each sequence, all chains together."""
    gaussian_gradients: int
    """Additional ones, for the Gaussian around points or draws; 0 if the scheme has a density."""
    seconds: float
    """Time of inference, for all sequences together."""
    bound: Figure
    """The ELBO of q: the scheme's own, or the Gaussian around its point or draws."""
    weights: Figure
    """The importance weights of that q."""
    posterior: Posterior
    """Draws of the scheme itself."""
    q: TorchDistribution | None
    """What they were drawn from, where that has a density."""
    terms: DrawTerms
    """What the model says of those draws."""
    has_chains: bool
    """Whether they come from Markov chains."""
    mixing: Mixing | None
    """How well chains have mixed; None for other schemes, and where too few draws are kept to say."""
    acceptance: float | None
    """Share of the proposals that were accepted in the second half of the steps; None where none can be refused."""
    objective: str
    """What each step estimates. Optimisers lower it; chains sample, and lower it only at first."""
    objectives: Tensor
    """[T, B]: the estimates, in nats per token; for chains, the mean over them."""
    curve: list[tuple[int, float, float | None]]
    """The bound at budgets up to the whole, each from a separate run: gradient evaluations, including those of the
    Gaussian, nats per token, and their Monte Carlo error, where it is known."""
    kl_per_slot: SlotKL | None
    """How much each slot says; None where the prior does not tell slots apart."""

    @property
    def num_diverged(self) -> int:
        """Texts on which a chain has diverged: it is where no posterior can be, and what comes of it is no figure."""
        return self.bound.num_diverged

    @property
    def r_hat(self) -> float | None:
        """The largest R̂ over all numbers of z and all sequences."""
        return None if self.mixing is None else self.mixing.largest_r_hat.max().item()

    @property
    def has_kl(self) -> bool:
        """Whether the KL means something: around the mean of chains that have not mixed it is Monte Carlo error."""
        return not self.has_chains or (not self.num_diverged and self.r_hat is not None and self.r_hat <= HIGHEST_R_HAT)

    @property
    def mark(self) -> str:
        """What the name of the scheme is marked with in the table: nothing where all is well."""
        if self.num_diverged:
            return " (DIVERGED)"
        return "" if self.has_kl else " (NOT MIXED)"

    @property
    def remark(self) -> str | None:
        """What is to be said of its chains, and what can be done; None where all is well."""
        num_texts = len(self.posterior.sequence_ids)
        if self.num_diverged:
            return (
                f"{self.name} has diverged on {self.num_diverged} of {num_texts} pieces: its steps are too long for "
                "the curvature there, and its figures are left out. Set a smaller step size in training's "
                f"--{self.name}.step-size, give it --{self.name}.vi-steps and --{self.name}.vi-rank, or take a scheme "
                "that refuses such steps: mala or hmc."
            )
        if self.has_kl:
            return None
        why = "it keeps too few draws for R̂" if self.r_hat is None else f"R̂ is {self.r_hat:.2f}"
        return f"{self.name} has not mixed ({why}): its draws are not yet the posterior's. Give it more --gradients."

    def record(self) -> dict[str, Any]:
        """The line of the table, as in `comparison.json`."""
        bound = self.bound.record()
        sizes = self.mixing.effective_sample_size if self.mixing is not None and self.has_kl else None
        # The same as the sum over the sequences by the gradients of all of them.
        per_gradient = None if sizes is None else sizes.mean().item() / self.num_gradients
        return {
            "inference": self.name,
            "gradients_per_sequence": self.num_gradients,
            "gradients_of_gaussian": self.gaussian_gradients,
            "inference_seconds": self.seconds,
            **bound,
            "kl_nats_per_token": bound["kl_nats_per_token"] if self.has_kl else None,
            **{key: self.weights.record()[key] for key in ("pareto_k", "heavy_tailed")},
            "num_diverged": self.num_diverged,
            "num_draws": self.posterior.samples.shape[:2].numel(),
            "effective_sample_size": None if sizes is None else sizes.median().item(),
            "effective_sample_size_per_gradient": per_gradient,
            "effective_sample_size_per_second": None if sizes is None else sizes.sum().item() / self.seconds,
            "r_hat": None if self.num_diverged else self.r_hat,
            "acceptance": self.acceptance,
            "bound_by_gradients": self.curve,
        }


EXPLANATIONS = {
    "gradients": "evaluations for each sequence, all chains together, + those for a Gaussian around a point or draws",
    "bound": (
        "-ELBO in nats/token ± Monte Carlo error, an upper bound on -log p(x); for map and chains that of a Gaussian "
        "around the point or around the mean of the draws"
    ),
    "KL": "KL(q ‖ p), the part of the bound that pays for z, in nats/token; omitted for chains that have not mixed",
    "k̂": (
        "tail shape of the importance weights of that q, median over texts, and the share of texts whose k̂ is too high "
        "for the weights to be trusted, since q is far from the posterior"
    ),
    "ESS": (
        "effective sample size of a number of z (larger than the number of draws where they alternate), median over z "
        "and texts, and per gradient and second of all texts; omitted for chains that have not mixed"
    ),
    "R̂": "the largest over all numbers of z; above 1.01 chains have not mixed well, above 1.1 they count as not mixed",
    "accepted": "the share of proposals that were accepted in the second half of the steps",
}
"""What the columns of the table mean."""


def print_table(results: list[Comparison]) -> None:
    """The table: with lines on a terminal, as Markdown elsewhere."""
    rows = []
    for result in results:
        record = result.record()
        size = record["effective_sample_size"]
        error = record["monte_carlo_standard_error"]
        rows.append(
            {
                "inference": result.name + result.mark,
                "T": str(record["fast_steps"]),
                "gradients": f"{result.num_gradients} + {result.gaussian_gradients}".removesuffix(" + 0"),
                "seconds": number_text(result.seconds, 1),
                "bound": number_text(record["nats_per_token"], 4, error),
                "valid": "" if result.num_diverged else "yes" if record["valid_bound"] else "NOT A BOUND",
                "KL": number_text(record["kl_nats_per_token"], 4),
                "k̂": tail_text(record),
                "ESS": "" if size is None else f"{size:.1f} of {record['num_draws']}",
                "ESS/gradient": number_text(record["effective_sample_size_per_gradient"], 4),
                "ESS/second": number_text(record["effective_sample_size_per_second"], 2),
                "R̂": number_text(record["r_hat"], 3),
                "accepted": number_text(record["acceptance"], 2),
            }
        )
    print_rows(rows, ("inference", "valid"), EXPLANATIONS)
    for result in results:
        if result.has_chains:
            num_chains, num_kept = result.posterior.samples.shape[:2]
            print(f"\n{result.name}: {num_chains} chains of each text, with the last {num_kept} draws of each kept.")
    for result in results:
        if result.remark is not None:
            print(f"\n{result.remark}")

"""Figures over many texts: total nats over total tokens, with what they mean and whether they are valid."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import tiktoken
from torch import Tensor

from ltm_pyro.data import Documents, byte_counts
from ltm_pyro.evaluation.estimators import ESTIMATORS, BlockNats, Estimate, EstimatorSettings, Meaning, of_models
from ltm_pyro.evaluation.inferred import ChainHealth, Inference, Inferred
from ltm_pyro.inference import Noise
from ltm_pyro.inference.weights import highest_pareto_k
from ltm_pyro.models import LatentThoughtModel, TokenBatch


@dataclass(frozen=True)
class Document:
    """The part of a document that was scored."""

    nats: float = 0.0
    """-log p(x) of its sequences."""
    num_tokens: int = 0
    """Predicted tokens, end-of-text included."""
    num_bytes: int = 0
    """Bytes of its text."""


@dataclass(frozen=True)
class Place:
    """A block of positions, over all texts."""

    nats: float = 0.0
    """-log p of the block given what stands before it, summed over texts."""
    num_tokens: int = 0
    """Predicted tokens of it."""

    def __add__(self, other: Place) -> Place:
        return Place(self.nats + other.nats, self.num_tokens + other.num_tokens)


LEFT_OUT = (
    "nats_per_token",
    "nelbo_nats_per_token",
    "nll_nats_per_token",
    "kl_nats_per_token",
    "bits_per_byte",
    "bits_per_byte_standard_error",
    "perplexity",
    "monte_carlo_standard_error",
    "standard_error",
    "effective_sample_size",
    "pareto_k",
    "heavy_tailed",
)
"""What is None in the record of a figure whose chains have diverged: the numbers say nothing of the model."""


@dataclass
class Figure:
    """-log p(x) of a set of texts, by one estimator."""

    estimator: str
    """The name of the estimator in ESTIMATORS."""
    fast_steps: int
    """T, the steps in which z was inferred."""
    z_from: str | None = None
    """What z was drawn from; None for a model without z."""
    num_samples: int = 0
    """Draws of z, or chains, for each text."""
    kl: float | None = None
    """KL(q ‖ p) of all texts [nats]; None where the figure has no such part."""
    variance: float | None = None
    """Variance of the nats of all texts over the draws of z [nats squared]; None where there are no draws."""
    num_sequences: int = 0
    """Sequences that were scored."""
    documents: dict[int, Document] = field(default_factory=dict)
    """The documents by id; several sequences of one may have been scored."""
    effective_sample_sizes: list[float] = field(default_factory=list)
    """The effective sample size of each sequence's importance weights, where the figure has any."""
    pareto_ks: list[float] = field(default_factory=list)
    """The shape of the tail of each sequence's importance weights, where the figure has any."""
    num_diverged: int = 0
    """Texts on which a chain that z comes from has diverged: their nats say nothing of the model."""
    num_unmixed: int | None = 0
    """Texts on which the chains that z comes from have not mixed; None where they keep too few draws to say."""
    places: dict[int, Place] = field(default_factory=dict)
    """The blocks of positions by their first position, where the figure has such parts."""

    @property
    def nats(self) -> float:
        """-log p(x) of all texts."""
        return sum(document.nats for document in self.documents.values())

    @property
    def num_tokens(self) -> int:
        """Predicted tokens, end-of-text included."""
        return sum(document.num_tokens for document in self.documents.values())

    @property
    def num_bytes(self) -> int:
        """Bytes of the texts."""
        return sum(document.num_bytes for document in self.documents.values())

    @property
    def is_valid(self) -> bool:
        """Whether it is an upper bound on -log p(x) in expectation, a code length, or exact; and finite."""
        return ESTIMATORS[self.estimator].is_valid and math.isfinite(self.nats)

    def add(self, estimate: Estimate, batch: TokenBatch, document_ids: Tensor) -> None:
        """Add the texts of a batch; `document_ids` [B] says which of them belong together."""
        self.z_from = estimate.z_from
        self.num_samples = estimate.num_samples
        self.num_sequences += len(batch)
        self.kl = _sum(self.kl, _total(estimate.kl))
        self.variance = _sum(self.variance, _total(estimate.variance))
        if estimate.effective_sample_size is not None:
            self.effective_sample_sizes += estimate.effective_sample_size.tolist()
        if estimate.pareto_k is not None:
            self.pareto_ks += estimate.pareto_k.tolist()
        if estimate.by_block is not None:
            self._add_places(estimate.by_block, batch)
        num_tokens = batch.weights.sum(1).long().tolist()
        rows = zip(document_ids.tolist(), estimate.nats.tolist(), num_tokens, batch.num_bytes.tolist(), strict=True)
        for document_id, *parts in rows:
            self._add_document(document_id, Document(*parts))

    def add_chains(self, chains: ChainHealth) -> None:
        """Add how the chains are that z of a batch comes from."""
        self.num_diverged += chains.num_diverged
        known = None not in (self.num_unmixed, chains.num_unmixed)
        self.num_unmixed = (self.num_unmixed or 0) + (chains.num_unmixed or 0) if known else None

    def join(self, other: Figure) -> None:
        """Add what the same estimator found for other texts, or for other sequences of the same documents."""
        if other.num_sequences:
            self.z_from, self.num_samples = other.z_from, other.num_samples
        self.num_sequences += other.num_sequences
        self.add_chains(ChainHealth(other.num_diverged, other.num_unmixed))
        self.kl = _sum(self.kl, other.kl)
        self.variance = _sum(self.variance, other.variance)
        self.effective_sample_sizes += other.effective_sample_sizes
        self.pareto_ks += other.pareto_ks
        for document_id, document in other.documents.items():
            self._add_document(document_id, document)
        for first, place in other.places.items():
            self.places[first] = self.places.get(first, Place()) + place

    def _add_places(self, by_block: BlockNats, batch: TokenBatch) -> None:
        size = by_block.block_size
        for number, nats in enumerate(by_block.nats.sum(1).tolist()):
            first = number * size
            num_tokens = int(batch.weights[:, first : first + size].sum())
            if num_tokens:
                self.places[first] = self.places.get(first, Place()) + Place(nats, num_tokens)

    def _add_document(self, document_id: int, part: Document) -> None:
        before = dataclasses.astuple(self.documents.get(document_id, Document()))
        after = (old + new for old, new in zip(before, dataclasses.astuple(part), strict=True))
        self.documents[document_id] = Document(*after)

    @property
    def standard_error(self) -> float | None:
        """Standard error of the nats per token as an estimate for other documents like these; None for a single one."""
        documents = self.documents.values()
        return ratio_error([(document.nats, document.num_tokens) for document in documents])

    @property
    def bits_per_byte_standard_error(self) -> float | None:
        """Standard error of the bits per byte as an estimate for other documents like these; None for a single one."""
        documents = self.documents.values()
        return ratio_error([(document.nats / math.log(2), document.num_bytes) for document in documents])

    @property
    def heavy_tailed(self) -> float | None:
        """The share of texts whose importance weights have too heavy a tail for the error of their mean to be known: k̂
        above what so many draws allow. None where k̂ is not known of any text."""
        known = [k for k in self.pareto_ks if not math.isnan(k)]
        limit = highest_pareto_k(self.num_samples) if known else math.nan
        return sum(k > limit for k in known) / len(known) if known else None

    def record(self) -> dict[str, Any]:
        """The figures under the names of `metrics.jsonl` and of JSON reports."""
        heavy, variance = self.heavy_tailed, self.variance
        # Where the tail of a text's weights is too heavy, their variance says too little, and so would the error.
        is_known = variance is not None and not math.isnan(variance) and not heavy
        error = math.sqrt(variance) / self.num_tokens if variance is not None and is_known else None
        record = {
            "estimator": self.estimator,
            "posterior": self.z_from,
            "fast_steps": self.fast_steps,
            "num_samples": self.num_samples,
            "valid_bound": self.is_valid,
            "nats_per_token": self.nats / self.num_tokens,
            **per_token(self.nats, self.kl, self.num_tokens, self.num_bytes),
            "monte_carlo_standard_error": error,
            "standard_error": self.standard_error,
            "bits_per_byte_standard_error": self.bits_per_byte_standard_error,
            "effective_sample_size": _median(self.effective_sample_sizes),
            "pareto_k": _median(self.pareto_ks),
            "heavy_tailed": heavy,
            "num_tokens": self.num_tokens,
            "num_bytes": self.num_bytes,
            "num_sequences": self.num_sequences,
            "num_documents": len(self.documents),
        }
        return record | dict.fromkeys(LEFT_OUT) if self.num_diverged else record

    def by_position(self) -> list[dict[str, Any]]:
        """The nats per token of each block of positions: how the figure changes along a text. Empty if it has none."""
        return [
            {"first": first, "num_tokens": place.num_tokens, "nats_per_token": place.nats / place.num_tokens}
            for first, place in sorted(self.places.items())
        ]

    @property
    def chains(self) -> str | None:
        """What is to be said of the chains that z comes from; None where all is well, or there are none."""
        if self.num_diverged:
            return f"chains have diverged on {self.num_diverged} of {_count(self.num_sequences, 'piece')}"
        if self.num_unmixed is None:
            return "chains keep too few draws to say whether they have mixed"
        if self.num_unmixed:
            return f"chains have not mixed on {self.num_unmixed} of {_count(self.num_sequences, 'piece')}"
        return None

    def __str__(self) -> str:
        if self.num_diverged:
            return f"z from {self.z_from}: no figure [{self.estimator}, T = {self.fast_steps}, {self.chains}]"
        record = self.record()
        in_bytes = ""
        if self.num_bytes:
            at_most = "at most " if ESTIMATORS[self.estimator].meaning is Meaning.UPPER_BOUND else ""
            in_bytes = f"{at_most}{record['bits_per_byte']:.3f} bits/byte"
            if self.kl is not None and self.z_from is not None:
                in_bytes += f", of which KL {self.kl / math.log(2) / self.num_bytes:.3f}"
            in_bytes += "; "
        error = "" if self.standard_error is None else f" ± {self.standard_error:.3f} (over documents)"
        figure = f"{in_bytes}{record['nats_per_token']:.3f}{error} nats/token"
        pieces = _count(self.num_sequences, "piece")
        if self.z_from is None:
            return f"no z: {figure} [{self.estimator}, {pieces}]"
        draws = _count(self.num_samples, "draw")
        warning = ("" if self.is_valid else ", NOT A BOUND") + (f", {self.chains}" if self.chains else "")
        return f"z from {self.z_from}: {figure} [{self.estimator}, T = {self.fast_steps}, {pieces}, {draws}{warning}]"


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'s' * (number != 1)}"


def _total(values: Tensor | None) -> float | None:
    return None if values is None else values.sum().item()


def _sum(*parts: float | None) -> float | None:
    known = [part for part in parts if part is not None]
    return sum(known) if known else None


def _median(values: list[float]) -> float | None:
    known = [value for value in values if not math.isnan(value)]  # infinity counts: those are the worst texts
    return float(np.median(known)) if known else None


def ratio_error(documents: Sequence[tuple[float, float]]) -> float | None:
    """Standard error of Σ y / Σ x over documents (y, x) as an estimate for other documents like these.

    By the jackknife, which leaves out one document after another (Cochran 1977, section 6.17). Its square is right on
    average also where a few documents have most of the text. None where no document can be left out.
    """
    count = len(documents)
    y, x = (sum(column) for column in zip(*documents, strict=True)) if documents else (0, 0)
    if count < 2 or any(size >= x for _, size in documents):
        return None
    deviations = [(y - own) / (x - size) - y / x for own, size in documents]
    return math.sqrt((count - 1) / count * sum(deviation**2 for deviation in deviations))


def difference(figure: Figure, reference: Figure) -> tuple[float, float | None]:
    """Bits per byte of a figure less those of another one on the same texts, and the standard error over documents.

    Raises:
        ValueError: if they are not of the same documents, or those have no bytes.
    """
    sizes = [{key: document.num_bytes for key, document in each.documents.items()} for each in (figure, reference)]
    if sizes[0] != sizes[1] or not figure.num_bytes:
        raise ValueError("only figures of the same texts can be compared")
    pairs = [
        ((document.nats - reference.documents[key].nats) / math.log(2), document.num_bytes)
        for key, document in figure.documents.items()
    ]
    return sum(bits for bits, _ in pairs) / figure.num_bytes, ratio_error(pairs)


def per_token(nats: float, kl: float | None, num_tokens: int, num_bytes: int) -> dict[str, float | None]:
    """Figures of -log p(x), given in nats and summed over all texts; None where one does not exist.

    Args:
        kl: the part of the nats that pays for z; None where they are no ELBO.
    """
    return {
        "nelbo_nats_per_token": None if kl is None else nats / num_tokens,
        "nll_nats_per_token": None if kl is None else (nats - kl) / num_tokens,
        "kl_nats_per_token": None if kl is None else kl / num_tokens,
        "bits_per_byte": nats / math.log(2) / num_bytes if num_bytes else None,
        "perplexity": perplexity(nats, num_tokens),
    }


def perplexity(nats: float, count: int) -> float | None:
    """The perplexity of each of so many tokens or words; None where it is too large for a number, or there is none."""
    return math.exp(nats / count) if count and nats / count < 700 else None


def score(
    model: LatentThoughtModel,
    batches: Iterable[TokenBatch],
    document_ids: Tensor,
    estimators: Iterable[str],
    inference: Inference,
    settings: EstimatorSettings,
    rng: Noise,
) -> list[Figure]:
    """Figures of the texts in the batches, one for each estimator.

    A model without z has the figures of such models, whichever are asked for: it has nothing to estimate. Nothing
    depends on the order of the texts or on how they are batched, except for rounding.

    Args:
        document_ids: the document of each sequence id.
        estimators: names of figures of models with z.
        inference: how z is inferred from each text, or for `prequential` from the tokens before a block.
        rng: makes the noise of a text its own, as `SequenceNoise` does.
    """
    used = {name: ESTIMATORS[name] for name in estimators} if model.config.num_slots else of_models(with_z=False)
    figures = {name: Figure(name, inference.scheme.num_steps) for name in used}
    for batch in batches:
        inferred = Inferred(model, batch, inference, rng)
        for name, estimator in used.items():
            estimate = estimator.estimate(inferred, settings)
            figures[name].add(estimate, batch, document_ids[batch.sequence_ids.cpu()])
            # A figure of blocks infers z for each of them, and from less than these chains have read.
            if estimate.by_block is None and inferred.chains is not None:
                figures[name].add_chains(inferred.chains)
    return list(figures.values())


def chosen_sequences(num_sequences: int, num_chosen: int, num_validation: int = 0) -> npt.NDArray[np.int64]:
    """The sequences that are scored: drawn from all of them, and the same every time, so that runs can be compared.

    Args:
        num_validation: the number of sequences asked for in validation. Those of :func:`validation_sequences` are left
            out, since a checkpoint may have been chosen by them.
    """
    reserved = min(num_validation, num_sequences // 2)
    return _in_order(num_sequences)[: num_sequences - reserved][:num_chosen]


def validation_sequences(num_sequences: int, num_validation: int) -> npt.NDArray[np.int64]:
    """The sequences that validation scores during training: at most half of all, and a single one if there is no other.

    They are the last ones in the order in which others are chosen to be scored.
    """
    return _in_order(num_sequences)[-max(1, min(num_validation, num_sequences // 2)) :]


def _in_order(num_sequences: int) -> npt.NDArray[np.int64]:
    return np.random.Generator(np.random.Philox(key=[0, 0])).permutation(num_sequences)


def order_zero_bits_per_byte(documents: Documents, encoding: tiktoken.Encoding) -> float:
    """Entropy of the bytes of the texts, each taken alone: what a model without any context could reach.

    Raises:
        InputError: a file of the corpus is damaged.
    """
    counts = byte_counts(documents, encoding)
    probabilities = counts[counts > 0] / counts.sum()
    return float((probabilities * np.log2(1 / probabilities)).sum())

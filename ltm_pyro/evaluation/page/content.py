"""What the page shows of a run: its curves, figures, samples, the KL of its slots, and the nats of each token."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ltm_pyro.config import NO_INFERENCE, scheme_of
from ltm_pyro.evaluation import figures
from ltm_pyro.evaluation.by_token import code_by_token
from ltm_pyro.evaluation.comparison import SlotKL, kl_per_slot
from ltm_pyro.evaluation.estimators import ESTIMATORS, EstimatorSettings, Meaning, of_models
from ltm_pyro.evaluation.estimators.prequential import block_size_of
from ltm_pyro.evaluation.figures import Figure
from ltm_pyro.evaluation.inferred import Inference, Inferred, held_at_start, inference_of
from ltm_pyro.evaluation.report import ScoredRun
from ltm_pyro.inference import PRIOR, SequenceNoise
from ltm_pyro.models import TokenBatch
from ltm_pyro.runs.continuation import infer_thoughts
from ltm_pyro.runs.trained import TrainedModel

CODE = "prequential"
"""The figure that is shown token by token."""
NUM_SAMPLES = 3
"""The texts that each model writes."""
SAMPLE_TOKENS = 400
"""The most tokens that it writes of each."""
BLOCKS_OF_WHOLE = 8
"""The blocks of a sequence where z is not inferred block by block, but anew for each: so many take as long as inferring
z of 3.5 sequences."""


@dataclass(frozen=True, eq=False)
class CodedText:
    """A sequence, and what a run says of each of its tokens."""

    tokens: list[int]
    """Its T tokens, without padding."""
    nats: Tensor
    """[T] float64: -log p of each token given those before it; its z was inferred from whole blocks before it."""
    held: Tensor | None
    """[T] float64: the same with z held where inference starts; None where nothing is inferred."""


@dataclass(frozen=True, eq=False)
class RunContent:
    """What the page shows of a run."""

    run: ScoredRun
    inference: Inference
    """How its z is inferred."""
    metrics: list[dict[str, Any]]
    """The lines of its `metrics.jsonl`; none where there is no such file."""
    figures: list[Figure]
    """The figures with z inferred as the run was trained."""
    held: Figure | None
    """The code length with z held where inference starts; None where nothing is inferred."""
    texts: list[CodedText]
    """The sequences, in the order in which they were scored."""
    block_size: int
    """The tokens that are predicted from one inference of z."""
    pairing: tuple[object, ...]
    """Equal for runs that were scored on the same sequences."""
    samples: list[str]
    """Texts from the model."""
    slots: SlotKL | None
    """The KL of each layer and slot; None where it has no meaning."""
    no_slots: str
    """Why there is no KL, where there is none: what stands after the name of the run."""

    @property
    def has_z(self) -> bool:
        """Whether it is a model with z."""
        return self.run.trained.config.inference != NO_INFERENCE

    @property
    def is_streaming(self) -> bool:
        """Whether z is inferred from one block after another, as in training."""
        return self.inference.block_size is not None

    @property
    def all_figures(self) -> list[Figure]:
        """The figures, those without thinking last."""
        return [*self.figures, *([self.held] if self.held else [])]

    @property
    def code(self) -> Figure:
        """The figure whose parts the tokens' nats are: the code length, or for a model without z the exact figure."""
        return next(figure for figure in self.figures if figure.estimator == CODE or self._is_exact(figure))

    @property
    def thinking(self) -> tuple[float, float | None] | None:
        """What thinking changes the code length by [bits/byte], and its standard error over documents; None where there
        is nothing to compare, no byte, or no number."""
        if self.held is None or not self.held.num_bytes or not (self.code.is_valid and self.held.is_valid):
            return None
        return figures.difference(self.code, self.held)

    def difference_from(self, first: RunContent, figure: Figure) -> tuple[float, float | None] | None:
        """Bits per byte of a figure of this run less the same one of another run, or less that one's exact figure, and
        the standard error, paired over documents. None where there is none, or not of the same text.

        The code length with z held is the same figure only as that with z held.
        """
        if first is self or first.pairing != self.pairing or not figure.num_bytes:
            return None
        for other in first.all_figures:
            is_same = other.estimator == figure.estimator and (other is first.held) == (figure is self.held)
            if (is_same or self._is_exact(other)) and other.is_valid and figure.is_valid:
                return figures.difference(figure, other)
        return None

    @staticmethod
    def _is_exact(figure: Figure) -> bool:
        return ESTIMATORS[figure.estimator].meaning is Meaning.EXACT


def content_of(
    run: ScoredRun,
    metrics: list[dict[str, Any]],
    batches: Iterable[TokenBatch],
    estimators: Sequence[str],
    settings: EstimatorSettings,
    seed: int,
) -> RunContent:
    """Score the texts, and look at z and at what the model writes.

    Args:
        metrics: the lines of the run's `metrics.jsonl`.
        batches: the sequences to score, at least one.
        estimators: names of figures of models with z; `prequential` is added where it is not among them. A model
            without z has its exact figure instead.
    """
    trained = run.trained
    inference, held = inference_of(trained.config), held_at_start(trained.config)
    rng, has_z = SequenceNoise(seed), trained.config.inference != NO_INFERENCE
    thinks = has_z and (inference.scheme.num_steps > 0 or inference.scheme.needs_encoder)
    names = [name for name in dict.fromkeys(estimators) if name != CODE] if has_z else list(of_models(with_z=False))
    found = {name: Figure(name, inference.scheme.num_steps) for name in names}
    code, code_held = (Figure(CODE, way.scheme.num_steps) for way in (inference, held))
    no_slots = _why_no_slots(trained, inference)
    texts: list[CodedText] = []
    slots: list[tuple[int, SlotKL | None]] = []
    for batch in batches:
        inferred = Inferred(trained.model, batch, inference, rng)
        documents = run.packed.document_ids[batch.sequence_ids.cpu()]
        for name, figure in found.items():
            figure.add(ESTIMATORS[name].estimate(inferred, settings), batch, documents)
        if not no_slots:
            slots.append((len(batch), kl_per_slot(inferred, settings.num_samples)))
        of_code = _settings_of_code(inferred, settings)
        estimate, nats = code_by_token(inferred, of_code)
        code.add(estimate, batch, documents)
        nats_held = None
        if thinks:
            # As many draws of z, so that the first block, which nothing is inferred from, is scored by the same ones.
            alike = dataclasses.replace(of_code, num_samples=estimate.num_samples)
            estimate, nats_held = code_by_token(Inferred(trained.model, batch, held, rng), alike)
            code_held.add(estimate, batch, documents)
        for row, size in enumerate(batch.weights.sum(1).long().tolist()):
            tokens = batch.tokens[row, :size].tolist()
            texts.append(CodedText(tokens, nats[row, :size], None if nats_held is None else nats_held[row, :size]))
    if not no_slots and slots[0][1] is None:
        no_slots = "has a prior that does not tell slots apart, so that none has a KL divergence of its own"
    return RunContent(
        run=run,
        inference=inference,
        metrics=metrics,
        figures=[*found.values(), *([code] if has_z else [])],
        held=code_held if code_held.num_sequences else None,
        texts=texts,
        block_size=of_code.block_size or 0,
        pairing=run.pairing(code.num_sequences),
        samples=samples_of(trained, inference, seed),
        slots=None if no_slots else _mean(slots),
        no_slots=no_slots,
    )


def _settings_of_code(inferred: Inferred, settings: EstimatorSettings) -> EstimatorSettings:
    """The settings with the size of a block."""
    num_positions = inferred.batch.tokens.shape[1]
    if not inferred.model.config.num_slots:  # there is nothing to infer between blocks
        return dataclasses.replace(settings, num_samples=1, block_size=num_positions)
    if inferred.inference.block_size is None and settings.block_size is None:
        return dataclasses.replace(settings, block_size=max(1, math.ceil(num_positions / BLOCKS_OF_WHOLE)))
    return dataclasses.replace(settings, block_size=block_size_of(inferred, settings))


def _why_no_slots(trained: TrainedModel, inference: Inference) -> str:
    """Why the KL of a slot has no meaning, known before anything is inferred; empty if it has one."""
    if trained.config.inference == NO_INFERENCE:
        return "has no z"
    if inference.block_size is not None:
        return "infers z block by block to predict what follows, so that its z is no summary of a whole text"
    if not inference.scheme.has_density:
        return f"finds points or draws by {inference.name}, which have no density and so no KL divergence"
    return ""


def _mean(slots: list[tuple[int, SlotKL | None]]) -> SlotKL:
    """The mean over the sequences of several batches."""
    known = [(size, slot) for size, slot in slots if slot is not None]
    total = torch.stack([size * slot.nats for size, slot in known]).sum(0)
    return SlotKL(total / sum(size for size, _ in known), any(slot.is_estimate for _, slot in known))


def samples_of(trained: TrainedModel, inference: Inference, seed: int) -> list[str]:
    """The beginnings of texts that the model writes, each with z as it is before anything of a text is read."""
    scheme = PRIOR if inference.block_size is None else scheme_of(trained.config)
    z = infer_thoughts(trained, [[]] * NUM_SAMPLES, scheme, 1, SequenceNoise(seed))
    generator = torch.Generator(trained.device).manual_seed(seed)
    length = min(trained.config.model.length, SAMPLE_TOKENS)
    return trained.decode(trained.model.generate(z[:, 0], length, generator=generator))

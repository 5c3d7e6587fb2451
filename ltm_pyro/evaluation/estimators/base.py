"""What a figure for -log p(x) is: a function from a batch of texts to nats for each of them, and what it states."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum

from torch import Tensor

from ltm_pyro.errors import require_whole
from ltm_pyro.evaluation.inferred import Inferred


@dataclass(frozen=True)
class EstimatorSettings:
    """What an estimate costs, and how close it comes."""

    num_samples: int = 64
    """Draws of z for each text (elbo, iwae), or for each block (prequential).
    A scheme of points or chains gives all draws that it has."""
    block_size: int | None = None
    """prequential, weighted, smc: positions that are predicted from one inference [tokens].
    Default: as the run was trained (--infer-from past), else a quarter of a sequence, but at most 64."""
    num_temperatures: int = 100
    """ais: temperatures between q and the posterior."""
    num_leapfrogs: int = 5
    """ais: leapfrogs from one temperature to the next; smc: in each move of a particle."""
    num_chains: int = 8
    """ais: chains of each text; smc: particles."""

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value is not None:
                require_whole(name, value, 2 if name == "num_chains" else 1)


@dataclass(frozen=True)
class BlockNats:
    """-log p of each block of positions of B texts, given what stands before it."""

    block_size: int
    """The number of positions in a block."""
    nats: Tensor
    """[number of blocks, B] float64; 0 for a block that is all padding."""


@dataclass(frozen=True)
class Estimate:
    """An estimate of -log p(x) for each of B texts; every tensor is [B] float64."""

    nats: Tensor
    """The estimate."""
    z_from: str | None
    """What z was drawn from; None for a model without z."""
    num_samples: int
    """Draws of z, or chains, for each text."""
    kl: Tensor | None = None
    """KL(q ‖ p), the part of an ELBO that pays for z [nats]."""
    variance: Tensor | None = None
    """The squared Monte Carlo standard error of `nats`; None where the figure has no such error."""
    effective_sample_size: Tensor | None = None
    """The effective sample size of importance weights, from 1 to `num_samples`."""
    pareto_k: Tensor | None = None
    """The shape of the tail of importance weights; above 0.7 they are not to be trusted."""
    by_block: BlockNats | None = None
    """The parts of `nats` that belong to successive blocks of positions; None where the figure has no such parts."""


class Meaning(Enum):
    """What a figure is to -log p(x); the value is what tables print."""

    UPPER_BOUND = "upper bound"
    """An upper bound on it, in expectation over the draws."""
    CODE_LENGTH = "code length"
    """The length of a code for the text, valid whatever the quality of inference; no bound on it."""
    EXACT = "exact"
    """The number itself."""
    NOT_A_BOUND = "NOT A BOUND"
    """Neither, so that it must not be compared with the others."""


@dataclass(frozen=True)
class Estimator:
    """One kind of figure, and all that the commands, the tables and the plots need to know of it."""

    estimate: Callable[[Inferred, EstimatorSettings], Estimate]
    summary: str
    """What `--help` says of it."""
    meaning: Meaning
    uses: tuple[str, ...] = ()
    """The names of the settings that it depends on."""
    needs_z: bool = True
    """Whether it is a figure of models with z; the others are figures of models without."""

    @property
    def is_valid(self) -> bool:
        """Whether it is an upper bound on -log p(x) in expectation, the length of a code, or exact."""
        return self.meaning is not Meaning.NOT_A_BOUND

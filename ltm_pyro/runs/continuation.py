"""Texts that continue a prompt: z is inferred from the prompt, and the tokens are drawn one by one given z.

While a text is written, z may be inferred again from the prompt and the text so far. Where the model was trained to
read texts block by block, with a scheme that can absorb, z is inferred so here as well, and reading on costs the same
however long the text is.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ltm_pyro.inference import PRIOR, PosteriorScheme, SequenceNoise, can_absorb, infer
from ltm_pyro.inference.streaming import Stream
from ltm_pyro.models import Sampling, TokenBatch
from ltm_pyro.runs.trained import TrainedModel

Tokens = list[int]


def infer_thoughts(
    ltm: TrainedModel,
    prompts: Sequence[Tokens],
    scheme: PosteriorScheme,
    num_samples: int,
    rng: SequenceNoise,
    first_id: int = 0,
) -> Tensor:
    """Draws of z given each of P prompts, [P, num_samples, L, S, D].

    z of an empty prompt is drawn from the prior; block by block, from what the scheme starts at.

    With a scheme of chains, each draw is the last one of a chain of its own: there are as many chains as draws,
    whatever the settings of the scheme say.

    Args:
        prompts: the tokens of each prompt. Only the last `config.length` tokens of a longer prompt are read; block by
            block, all whole blocks of it.
        first_id: the sequence id of the first prompt; the others count on from it. The ids decide the noise.
    """
    if block_size_of(ltm, scheme) is not None:
        readers = [Reader(ltm, scheme, len(prompt), rng, first_id + row) for row, prompt in enumerate(prompts)]
        return torch.stack([reader.read(prompt, num_samples) for reader, prompt in zip(readers, prompts, strict=True)])
    length = ltm.config.model.length
    batch = ltm.token_batch([prompt[-length:] for prompt in prompts], first_id)
    z = _draws(ltm, batch, PRIOR, num_samples, rng)
    # Given nothing, the posterior is the prior, also for a scheme that would only find a point.
    given = torch.tensor([number for number, prompt in enumerate(prompts) if prompt], dtype=torch.int64)
    if len(given) and scheme is not PRIOR:
        z[given] = _draws(ltm, batch[given], _with_chains(scheme, num_samples), num_samples, rng)
    return z


def _with_chains(scheme: PosteriorScheme, num_chains: int) -> PosteriorScheme:
    if not scheme.has_chains:
        return scheme
    return dataclasses.replace(scheme, num_chains=num_chains, num_kept=1)


def _draws(
    ltm: TrainedModel, batch: TokenBatch, scheme: PosteriorScheme, num_samples: int, rng: SequenceNoise
) -> Tensor:
    posterior = scheme.posterior(infer(scheme, ltm.model, batch, rng), num_samples, rng)
    return posterior.samples.flatten(0, 1).transpose(0, 1).contiguous()


def block_size_of(ltm: TrainedModel, scheme: PosteriorScheme) -> int | None:
    """The tokens in a block, where z is inferred from one block after another; None where it is inferred at once.

    It is so only if the model was trained so: another has not learned to predict with z of a few blocks.
    """
    return ltm.config.objective.block_size if can_absorb(scheme) else None


class Reader:
    """z of a text that is read block by block while it grows, in whole blocks only, as in training.

    So the last tokens, fewer than a block, are not among those that z is inferred from. Reading on looks at no more of
    what was read before than the scheme's steps do, and costs the same however long the text is.

    Args:
        scheme: a scheme that can absorb, for a model that was trained to read block by block.
        longest: the most tokens that the text will ever have.
        sequence_id: decides the noise.

    Raises:
        ValueError: if z of the model is not inferred block by block.
    """

    def __init__(
        self, ltm: TrainedModel, scheme: PosteriorScheme, longest: int, rng: SequenceNoise, sequence_id: int
    ) -> None:
        block_size = block_size_of(ltm, scheme)
        if block_size is None:
            raise ValueError("z is not inferred block by block")
        self._block_size = block_size
        # With room for all of it, so that no token is copied again.
        self._tokens = torch.zeros(1, longest, dtype=torch.int64, device=ltm.device)
        self._weights = torch.ones(1, longest, device=ltm.device)
        self._num_tokens = 0
        self._id = torch.tensor([sequence_id])
        self._stream = Stream(scheme, ltm.model, self._so_far(), rng)

    def read(self, tokens: Tokens, num_samples: int = 1) -> Tensor:
        """Draws of z given the whole blocks of these tokens, [num_samples, L, S, D].

        Args:
            tokens: all of the text so far, which begins with those of the call before.
        """
        new = torch.tensor(tokens[self._num_tokens :], dtype=torch.int64)
        self._tokens[0, self._num_tokens : len(tokens)] = new
        self._num_tokens = len(tokens)
        self._stream.continued(self._so_far())
        while self._stream.num_read + self._block_size <= self._num_tokens:
            self._stream.read(self._block_size)
        return self._stream.posterior(num_samples).samples.flatten(0, 1)[:, 0]

    def _so_far(self) -> TokenBatch:
        tokens, weights = self._tokens[:, : self._num_tokens], self._weights[:, : self._num_tokens]
        return TokenBatch(tokens, weights, self._id, torch.zeros_like(self._id))


@dataclass(frozen=True)
class Rethinking:
    """Inferring z again while a text is being written."""

    every: int
    """The number of tokens from one inference to the next."""
    infer: Callable[[list[int], list[Tokens], int], Tensor]
    """A function of the numbers of B texts, of these texts with their prompts, and of how often z was inferred again
    before, to z [B, L, S, D]."""


@dataclass
class Continuation:
    """B texts that are being written, each after a prompt of its own and given a z of its own.

    Iterating over :meth:`write` writes them; `texts` and `z_BLSD` hold the state so far.
    """

    ltm: TrainedModel
    prompts: Sequence[Tokens]
    z_BLSD: Tensor
    """The z that each text is being written from; at the end, the last one."""
    sampling: Sampling
    generator: torch.Generator
    """The source of all draws of tokens, on the model's device."""
    texts: list[Tokens] = field(init=False)
    """The tokens of each text after its prompt, up to and including its end-of-text if it has one."""

    def __post_init__(self) -> None:
        self.z_BLSD = self.z_BLSD.clone()
        self.texts = [[] for _ in self.prompts]

    def write(self, max_new_tokens: int, rethinking: Rethinking | None = None) -> Iterator[tuple[int, int]]:
        """Write every text up to its end-of-text, or `max_new_tokens` tokens of it.

        Yields the number of a text and its next token, in turn for all texts that have not ended.
        """
        num_left, num_rethought = max_new_tokens, 0
        rows = list(range(len(self.texts)))
        while rows and num_left:
            num_tokens = num_left if rethinking is None else min(rethinking.every, num_left)
            yield from self._write(rows, num_tokens)
            num_left -= num_tokens
            rows = [row for row in rows if not self._has_ended(row)]
            if rethinking is not None and rows and num_left:
                self.z_BLSD[rows] = rethinking.infer(rows, self._with_prompts(rows), num_rethought)
                num_rethought += 1

    def _write(self, rows: list[int], num_tokens: int) -> Iterator[tuple[int, int]]:
        """Write at most `num_tokens` tokens of each text, without inferring z again."""
        so_far = self._with_prompts(rows)
        for tokens_B in self.ltm.model.stream(self.z_BLSD[rows], num_tokens, so_far, self.sampling, self.generator):
            for row, token in zip(rows, tokens_B.tolist(), strict=True):
                if not self._has_ended(row):
                    self.texts[row].append(token)
                    yield row, token

    def _with_prompts(self, rows: list[int]) -> list[Tokens]:
        return [[*self.prompts[row], *self.texts[row]] for row in rows]

    def _has_ended(self, row: int) -> bool:
        return self.texts[row][-1:] == [self.ltm.model.end_of_text]

    def finish(self, max_new_tokens: int, rethinking: Rethinking | None = None) -> list[Tokens]:
        """Write every text as :meth:`write` does, and return `texts`."""
        for _ in self.write(max_new_tokens, rethinking):
            pass
        return self.texts

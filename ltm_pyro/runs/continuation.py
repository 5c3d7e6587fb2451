"""Texts that continue a prompt: z is inferred from the prompt, and the tokens are drawn one by one given z.

`Writing` says which texts are to be written and how; the command `generate` and `ltm_pyro.load(…).generate` run it.

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

from ltm_pyro.config import NO_INFERENCE, scheme_of
from ltm_pyro.errors import InputError, require_whole
from ltm_pyro.inference import PRIOR, PosteriorScheme, SequenceNoise, can_absorb, infer
from ltm_pyro.inference.streaming import Stream
from ltm_pyro.models import Sampling, TokenBatch
from ltm_pyro.models.generation import AS_THE_MODEL_SAYS
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
    """The number of tokens from one inference to the next, at least 1."""
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

        Raises:
            ValueError: if a number of tokens is too small.
        """
        require_whole("max_new_tokens", max_new_tokens, 0)
        if rethinking is not None:
            require_whole("every", rethinking.every, 1)
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


@dataclass(frozen=True)
class Writing:
    """Texts that are to be written, `num_samples` after each prompt, and how: the same settings give the same texts.

    Raises:
        ValueError: if there is no prompt, or a setting is out of range.
    """

    ltm: TrainedModel
    scheme: PosteriorScheme
    """How z is inferred from a prompt."""
    prompts: Sequence[Tokens]
    """The tokens of each prompt; none of them for a new text."""
    num_samples: int = 1
    """Texts after each prompt, each given its own draw of z."""
    max_new_tokens: int | None = None
    """The most tokens that are written of each text; None for the length of the model's sequences."""
    sampling: Sampling = AS_THE_MODEL_SAYS
    """How each token is chosen."""
    rethink: int = 0
    """Tokens after which z is inferred again from the prompt and the text so far; 0 for never."""
    batch_size: int = 16
    """Texts that are written together. With the same seed, another one draws other texts."""
    seed: int = 0
    """The seed of all draws."""
    z: Tensor | None = None
    """The z to write from instead of inferring it, [1 or one for each prompt, L, S, D]."""

    def __post_init__(self) -> None:
        if not self.prompts:
            raise ValueError("there is no prompt: give at least one, which may be empty")
        least = {"num_samples": 1, "rethink": 0, "batch_size": 1, "seed": 0}
        for name, smallest in least.items():
            require_whole(name, getattr(self, name), smallest)
        if self.max_new_tokens is not None:
            require_whole("max_new_tokens", self.max_new_tokens, 0)

    @property
    def most_new_tokens(self) -> int:
        """The most tokens that are written of each text."""
        return self.ltm.config.model.length if self.max_new_tokens is None else self.max_new_tokens

    def parts(self) -> Iterator[tuple[Continuation, Rethinking | None]]:
        """The texts in parts of `batch_size`, the samples of a prompt one after another.

        Each part is to be written by its `write` or `finish`, with `most_new_tokens` and the rethinking that comes with
        it, before the next one is asked for: they share one source of draws.
        """
        rng = SequenceNoise(self.seed)
        generator = torch.Generator(self.ltm.device).manual_seed(self.seed)
        prompts = [prompt for prompt in self.prompts for _ in range(self.num_samples)]
        z = self._first_thoughts(rng)
        for start in range(0, len(prompts), self.batch_size):
            part = slice(start, start + self.batch_size)
            longest = max(map(len, prompts[part])) + self.most_new_tokens
            texts = Continuation(self.ltm, prompts[part], z[part], self.sampling, generator)
            yield texts, self._rethinking(rng, start, longest)

    def finish(self) -> list[Tokens]:
        """Write all texts: the tokens of each after its prompt, up to and including its end-of-text if it has one."""
        return [tokens for texts, again in self.parts() for tokens in texts.finish(self.most_new_tokens, again)]

    def _first_thoughts(self, rng: SequenceNoise) -> Tensor:
        """The z that each text begins with, [number of texts, L, S, D]."""
        if self.z is not None:
            return self.z.expand(len(self.prompts), -1, -1, -1).repeat_interleave(self.num_samples, 0)
        parts = [
            infer_thoughts(
                self.ltm, self.prompts[start : start + self.batch_size], self.scheme, self.num_samples, rng, start
            )
            for start in range(0, len(self.prompts), self.batch_size)
        ]
        return torch.cat(parts).flatten(0, 1)

    def _rethinking(self, rng: SequenceNoise, first_text: int, longest: int) -> Rethinking | None:
        """How z of texts is inferred again as they are written; None where it is not.

        Args:
            first_text: the number of the first of these texts among all that are written.
            longest: the most tokens that a text will have, with its prompt.
        """
        if not self.rethink:
            return None
        num_prompts = len(self.prompts)
        if block_size_of(self.ltm, self.scheme) is not None:
            readers: dict[int, Reader] = {}

            def read_on(rows: list[int], texts: list[Tokens], num_before: int) -> Tensor:
                for row in rows:
                    if row not in readers:
                        readers[row] = Reader(self.ltm, self.scheme, longest, rng, num_prompts + first_text + row)
                return torch.cat([readers[row].read(text) for row, text in zip(rows, texts, strict=True)])

            return Rethinking(self.rethink, read_on)

        def infer_again(rows: list[int], texts: list[Tokens], num_before: int) -> Tensor:
            # Sequence ids that neither the prompts nor an earlier inference had, so that the noise is fresh.
            first_id = num_prompts + num_prompts * self.num_samples * num_before + first_text
            return infer_thoughts(self.ltm, texts, self.scheme, 1, rng, first_id)[:, 0]

        return Rethinking(self.rethink, infer_again)


def scheme_of_prompts(
    ltm: TrainedModel, inference: str | None = None, fast_steps: int | None = None
) -> PosteriorScheme:
    """How z is inferred from a prompt: by the scheme of the run, or by another one with the run's settings for it.

    Args:
        inference: the name of another scheme; none for no inference, so that z is drawn from the prior.
        fast_steps: another number of steps than the run's.

    Raises:
        InputError: if there is no such scheme, it needs an encoder and the model has none, or the run took no fast step
            and no number of them is given.
    """
    if ltm.config.inference == NO_INFERENCE:
        return PRIOR
    scheme = scheme_of(ltm.config, inference, fast_steps)
    if fast_steps is None and not scheme.num_steps and not scheme.needs_encoder and scheme is not PRIOR:
        raise InputError(
            f"--inference {inference or ltm.config.inference}: {ltm.name} was trained with 0 fast steps; give "
            "--fast-steps"
        )
    return scheme

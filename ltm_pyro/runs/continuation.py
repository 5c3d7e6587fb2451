"""Texts that go on from a prompt: z inferred from it, then token by token, and z anew on the way where asked."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ltm_pyro.inference import PRIOR, PosteriorScheme, SequenceNoise, infer
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
    """Draws of z given each of P prompts, [P, num_samples, L, S, D], from its last `config.length` tokens.

    Args:
        first_id: the noise of the prompts is that of the sequences which are counted from here.
    """
    length = ltm.config.model.length
    batch = ltm.token_batch([prompt[-length:] for prompt in prompts], first_id)
    z = _draws(ltm, batch, PRIOR, num_samples, rng)
    # Nothing is inferred from nothing: there the posterior is the prior, also for a scheme that has but a point.
    given = torch.tensor([number for number, prompt in enumerate(prompts) if prompt], dtype=torch.int64)
    if len(given) and scheme is not PRIOR:
        z[given] = _draws(ltm, batch[given], scheme, num_samples, rng)
    return z


def _draws(
    ltm: TrainedModel, batch: TokenBatch, scheme: PosteriorScheme, num_samples: int, rng: SequenceNoise
) -> Tensor:
    posterior = scheme.posterior(infer(scheme, ltm.model, batch, rng), num_samples, rng)
    return posterior.samples.flatten(0, 1).transpose(0, 1).contiguous()


def write(
    ltm: TrainedModel,
    z_BLSD: Tensor,
    prompts: Sequence[Tokens],
    max_new_tokens: int,
    sampling: Sampling,
    generator: torch.Generator,
    rethink: Callable[[list[Tokens], int], Tensor],
    rethink_every: int,
    watch: Callable[[int], None],
) -> tuple[list[Tokens], Tensor]:
    """Continue B texts.

    Args:
        rethink: z of texts, [B, L, S, D], given what they are so far and how often z has been inferred anew before.
        rethink_every: tokens from one such inference to the next. 0: there is none.
        watch: called with every token of the first text.

    Returns:
        the tokens of each, up to and including its end-of-text if it has one, and the last z of each.
    """
    end = ltm.model.end_of_text
    z_BLSD, texts = z_BLSD.clone(), [list(prompt) for prompt in prompts]
    unfinished, num_left, num_rethought = list(range(len(texts))), max_new_tokens, 0
    while unfinished and num_left:
        num_tokens = min(rethink_every or num_left, num_left)
        so_far = [texts[row] for row in unfinished]
        for tokens_B in ltm.model.stream(z_BLSD[unfinished], num_tokens, so_far, sampling, generator):
            for row, token in zip(unfinished, tokens_B.tolist(), strict=True):
                has_ended = len(texts[row]) > len(prompts[row]) and texts[row][-1] == end
                if not has_ended:
                    texts[row].append(token)
                    if row == 0:
                        watch(token)
        num_left -= num_tokens
        unfinished = [row for row in unfinished if texts[row][-1] != end]
        if unfinished and num_left:
            z_BLSD[unfinished] = rethink([texts[row] for row in unfinished], num_rethought)
            num_rethought += 1
    return [text[len(prompt) :] for text, prompt in zip(texts, prompts, strict=True)], z_BLSD

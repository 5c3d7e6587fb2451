"""Writing texts token by token: the one loop of generation, and how a token is chosen.

A text may go on beyond the length that the model was trained on: positions count in self-attention by their differences
within the window alone, so none of them is new to it, and a token costs the same wherever it stands. But z was trained
to describe no more than `config.length` tokens.

Shapes: B texts, L layers, S slots, D width, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ltm_pyro.models.decoder import Decoder
from ltm_pyro.models.vector_products import logits_of_many_tokens


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen. Meaning and order are those of Hugging Face's transformers: repetition penalty,
    temperature, top-k, top-p. By default a token is a draw from the model's own distribution."""

    temperature: float = 1.0
    """Divides the logits. 0: always the most likely token."""
    top_k: int = 0
    """Draw among the k most likely tokens only. 0: among all."""
    top_p: float = 1.0
    """Draw among the fewest tokens that together are at least this probable. 1: among all."""
    repetition_penalty: float = 1.0
    """Divides the logits of tokens that prompt or text have already, where they are above 0, and multiplies them
    where they are below (Keskar et al. 2019). 1: no penalty."""

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < math.inf:
            raise ValueError(f"temperature must be at least 0, not {self.temperature}")
        if self.top_k < 0:
            raise ValueError(f"top_k must be at least 1, or 0 for all tokens, not {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be above 0 and at most 1, not {self.top_p}")
        if not 0 < self.repetition_penalty < math.inf:
            raise ValueError(f"repetition_penalty must be above 0, not {self.repetition_penalty}")
        if self.temperature == 0 and (self.top_k or self.top_p < 1):
            raise ValueError("temperature 0 takes the most likely token, and leaves nothing to top_k and top_p")

    def choose(self, logits_BV: Tensor, is_used_BV: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """The next token of each text, [B].

        Args:
            logits_BV: of the model.
            is_used_BV: which tokens prompt or text have already; read where there is a penalty.
            generator: on the device of the logits; None for torch's global one.
        """
        logits_BV = self._penalised(logits_BV.float(), is_used_BV)
        if self.temperature == 0:
            return logits_BV.argmax(-1)
        # By the inverse of the distribution function, with one random number: `torch.multinomial` takes one for every
        # token of the vocabulary. In float64, in which a uniform number times the total stays below the total.
        total_BV = self._warped(logits_BV).softmax(-1).cumsum(-1)
        uniform_B1 = torch.rand(len(total_BV), 1, dtype=torch.float64, device=total_BV.device, generator=generator)
        return torch.searchsorted(total_BV, uniform_B1 * total_BV[:, -1:], right=True).squeeze(-1)

    def _penalised(self, logits_BV: Tensor, is_used_BV: Tensor) -> Tensor:
        if self.repetition_penalty == 1:
            return logits_BV
        penalty = self.repetition_penalty
        return torch.where(is_used_BV, torch.where(logits_BV < 0, logits_BV * penalty, logits_BV / penalty), logits_BV)

    def _warped(self, logits_BV: Tensor) -> Tensor:
        """Logits of the tokens to draw from, float64, minus infinity elsewhere."""
        # Relative to the largest, which so stays 0 at temperatures however low.
        logits_BV = (logits_BV - logits_BV.amax(-1, keepdim=True)).double() / self.temperature
        if 0 < self.top_k < logits_BV.shape[-1]:
            least = logits_BV.topk(self.top_k).values[:, -1:]
            logits_BV = logits_BV.masked_fill(logits_BV < least, -torch.inf)
        if self.top_p < 1:
            sorted_BV, order_BV = logits_BV.sort(descending=True, stable=True)
            probs_BV = sorted_BV.softmax(-1)
            # A token is left out if those before it are enough. Before the first there are none.
            is_left_out_BV = (probs_BV.cumsum(-1) - probs_BV >= self.top_p).gather(-1, order_BV.argsort(-1))
            logits_BV = logits_BV.masked_fill(is_left_out_BV, -torch.inf)
        return logits_BV


@torch.no_grad()
def stream(
    decoder: Decoder,
    z_BLSD: Tensor,
    end_of_text: int,
    max_new_tokens: int,
    prompts: Sequence[Sequence[int]] | None = None,
    sampling: Sampling = Sampling(),
    generator: torch.Generator | None = None,
) -> Iterator[Tensor]:
    """Write B texts, one token of each at a time: [B] int64, end-of-text from where a text has ended on.

    It is over when all texts have ended, or after `max_new_tokens`.

    Args:
        z_BLSD: thought vectors of each text.
        prompts: what each text begins with, begin-of-text left out; None for nothing.
        generator: on the decoder's device; None for torch's global one, which `pyro.set_rng_seed` sets.

    Raises:
        ValueError: if there is not one prompt for each z.
    """
    prompts = [()] * len(z_BLSD) if prompts is None else prompts
    if len(prompts) != len(z_BLSD):
        raise ValueError(f"{len(prompts)} prompts need as many z, not {len(z_BLSD)}")
    if not max_new_tokens or not len(prompts):
        return
    device = z_BLSD.device
    is_used_BV = torch.zeros(len(prompts), decoder.vocab_size - 1, dtype=torch.bool, device=device)
    for is_used_V, prompt in zip(is_used_BV, prompts, strict=True):
        if prompt:
            is_used_V[list(prompt)] = True
    # What no layer can see from the end of the prompt need not be read.
    inputs = [[decoder.begin_of_text, *prompt][-decoder.reach :] for prompt in prompts]
    longest = max(map(len, inputs))
    inputs_BT = torch.tensor([row + [end_of_text] * (longest - len(row)) for row in inputs], device=device)
    num_inputs_B = torch.tensor([len(row) for row in inputs], device=device)
    hidden_BD, memory = decoder.read(inputs_BT, num_inputs_B, z_BLSD, max_new_tokens - 1)
    logits = logits_of_many_tokens(decoder, max_new_tokens)
    has_ended_B = torch.zeros(len(prompts), dtype=torch.bool, device=device)
    for num_left in reversed(range(max_new_tokens)):
        chosen_B = sampling.choose(logits(hidden_BD), is_used_BV, generator)
        tokens_B = chosen_B.masked_fill(has_ended_B, end_of_text)
        yield tokens_B
        has_ended_B |= tokens_B == end_of_text
        if not num_left or has_ended_B.all():
            return
        is_used_BV[torch.arange(len(prompts), device=device), tokens_B] = True
        hidden_BD = decoder.step(tokens_B, memory)


def generate(
    decoder: Decoder,
    z_BLSD: Tensor,
    end_of_text: int,
    max_new_tokens: int,
    prompts: Sequence[Sequence[int]] | None = None,
    sampling: Sampling = Sampling(),
    generator: torch.Generator | None = None,
) -> Tensor:
    """Texts, or what follows their prompts: [B, max_new_tokens] int64, filled with end-of-text behind their end.

    The arguments and errors are those of :func:`stream`.
    """
    tokens_BN = torch.full((len(z_BLSD), max_new_tokens), end_of_text, device=z_BLSD.device)
    texts = stream(decoder, z_BLSD, end_of_text, max_new_tokens, prompts, sampling, generator)
    for number, tokens_B in enumerate(texts):
        tokens_BN[:, number] = tokens_B
    return tokens_BN

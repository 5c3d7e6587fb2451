"""Writing texts token by token: the one loop of generation, and how a token is chosen.

A text may continue beyond the length that the model was trained on. Self-attention depends on differences of positions
within the window only, so no later position is new to it, and every token costs the same. But z was trained to describe
no more than `config.length` tokens.

The functions here take the thought vectors u. From z, `LatentThoughtModel.generate` and `LatentThoughtModel.stream`
write the same texts by the prior's map u = U(z).

Shapes: B texts, L layers, S slots, D width, V vocabulary.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ltm_pyro.errors import RunError, require_number, require_whole
from ltm_pyro.models.decoder import Decoder
from ltm_pyro.models.graphs import repeated
from ltm_pyro.models.vector_products import logits_of_many_tokens

DEVICE_STRETCH = 16
"""The number of tokens of each text that a device writes before the host looks at them, for which it must wait."""
LARGEST_PENALTY = 1000.0
"""Beyond it, and below its inverse, a penalised logit would leave the numbers that float32 has."""


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen. By default it is a draw from the model's own distribution.

    The settings mean what they mean in Hugging Face's transformers, and are applied in the same order: repetition
    penalty, temperature, top-k, top-p.
    """

    temperature: float = 1.0
    """Divides the logits. 0: always the most likely token."""
    top_k: int = 0
    """Draw among the k most likely tokens only. 0: among all."""
    top_p: float = 1.0
    """Draw among the fewest tokens that together are at least this probable. 1: among all."""
    repetition_penalty: float = 1.0
    """Makes tokens that prompt or text have already less likely (Keskar et al. 2019). 1: no penalty.
    It divides their logits where they are above 0, and multiplies them where they are below."""

    def __post_init__(self) -> None:
        for name in ("temperature", "top_p", "repetition_penalty"):
            require_number(name, getattr(self, name))
        if not 0 <= self.temperature < math.inf:
            raise ValueError(f"temperature must be at least 0, not {self.temperature}")
        require_whole("top_k", self.top_k, 0)
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be above 0 and at most 1, not {self.top_p}")
        if not 1 / LARGEST_PENALTY <= self.repetition_penalty <= LARGEST_PENALTY:
            raise ValueError(
                f"repetition_penalty must be from {1 / LARGEST_PENALTY:g} to {LARGEST_PENALTY:g}, not "
                f"{self.repetition_penalty}"
            )
        if self.temperature == 0 and (self.top_k or self.top_p < 1):
            raise ValueError("temperature 0 takes the most likely token, so it cannot be combined with top_k or top_p")

    def choose(self, logits_BV: Tensor, is_used_BV: Tensor, uniform_B1: Tensor) -> Tensor:
        """The next token of each text, [B]; V, which is none, where a logit is not finite and the model says nothing.

        Args:
            logits_BV: the model's logits.
            is_used_BV: whether prompt or text have each token already; only read if there is a penalty.
            uniform_B1: a random number from 0 to 1 for each text, float64; only read above temperature 0.
        """
        # Zero times what is not finite is no number, and so is its sum with others.
        says_nothing_B = (logits_BV * 0).sum(-1) != 0
        penalised_BV = self._penalised(logits_BV.float(), is_used_BV)
        if self.temperature == 0:
            chosen_B = penalised_BV.argmax(-1)
        else:
            # By the inverse of the distribution function, with one random number a text, where `torch.multinomial`
            # takes one for every token of the vocabulary. In float64, a uniform number times the total stays below the
            # total.
            total_BV = self._warped(penalised_BV).softmax(-1).cumsum(-1)
            chosen_B = torch.searchsorted(total_BV, uniform_B1 * total_BV[:, -1:], right=True).squeeze(-1)
        return chosen_B.masked_fill(says_nothing_B, logits_BV.shape[-1])

    def _penalised(self, logits_BV: Tensor, is_used_BV: Tensor) -> Tensor:
        if self.repetition_penalty == 1:
            return logits_BV
        # In float64: a quotient may leave the numbers that float32 has.
        penalty, logits_BV = self.repetition_penalty, logits_BV.double()
        return torch.where(is_used_BV, torch.where(logits_BV < 0, logits_BV * penalty, logits_BV / penalty), logits_BV)

    def _warped(self, logits_BV: Tensor) -> Tensor:
        """Logits of the tokens to draw from, in float64; minus infinity for all others."""
        # Relative to the largest, which then is 0 at any temperature, however low.
        logits_BV = (logits_BV - logits_BV.amax(-1, keepdim=True)).double() / self.temperature
        if 0 < self.top_k < logits_BV.shape[-1]:
            least = logits_BV.topk(self.top_k).values[:, -1:]
            logits_BV = logits_BV.masked_fill(logits_BV < least, -torch.inf)
        if self.top_p < 1:
            sorted_BV, order_BV = logits_BV.sort(descending=True, stable=True)
            probs_BV = sorted_BV.softmax(-1)
            # A token is left out if those before it are enough; the first one never is.
            is_left_out_BV = (probs_BV.cumsum(-1) - probs_BV >= self.top_p).gather(-1, order_BV.argsort(-1))
            logits_BV = logits_BV.masked_fill(is_left_out_BV, -torch.inf)
        return logits_BV


AS_THE_MODEL_SAYS = Sampling()
"""Every token is a draw from the model's own distribution."""


@torch.no_grad()
def stream(
    decoder: Decoder,
    u_BLSD: Tensor,
    end_of_text: int,
    max_new_tokens: int,
    prompts: Sequence[Sequence[int]] | None = None,
    sampling: Sampling = AS_THE_MODEL_SAYS,
    generator: torch.Generator | None = None,
) -> Iterator[Tensor]:
    """Write B texts, one token of each at a time: [B] int64, which is end-of-text for texts that have ended.

    The stream ends when all texts have ended, or after `max_new_tokens`.

    Args:
        u_BLSD: thought vectors of each text.
        end_of_text: id of the token that ends a text.
        max_new_tokens: the most tokens that are written of each text.
        prompts: what each text begins with, without begin-of-text; None for nothing.
        sampling: how each token is chosen.
        generator: a generator on the decoder's device; None for torch's global one, which `pyro.set_rng_seed` seeds.
            A device that writes ahead also draws for the few tokens that it writes after all texts have ended.

    Raises:
        ValueError: if there are not as many prompts as texts, or the number of tokens is not a whole number of at least
            0.
        RunError: if the model's logits are not finite, after all tokens before them.
    """
    require_whole("max_new_tokens", max_new_tokens, 0)
    prompts = [()] * len(u_BLSD) if prompts is None else prompts
    if len(prompts) != len(u_BLSD):
        raise ValueError(f"{len(prompts)} prompts need one z each, not {len(u_BLSD)} z")
    if not max_new_tokens or not len(prompts):
        return
    tokens = _unchecked_tokens(decoder, u_BLSD, end_of_text, max_new_tokens, prompts, sampling, generator)
    while stretch := list(itertools.islice(tokens, _num_ahead(u_BLSD.device))):
        for tokens_B, on_host in zip(stretch, torch.stack(stretch).tolist(), strict=True):
            if decoder.begin_of_text in on_host:
                raise RunError("the model's logits are not finite, so it says nothing of the next token")
            yield tokens_B
            if on_host.count(end_of_text) == len(on_host):
                return


def _num_ahead(device: torch.device) -> int:
    """The number of tokens of each text that are written before one is looked at."""
    return 1 if device.type == "cpu" else DEVICE_STRETCH


def _unchecked_tokens(
    decoder: Decoder,
    u_BLSD: Tensor,
    end_of_text: int,
    max_new_tokens: int,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    generator: torch.Generator | None,
) -> Iterator[Tensor]:
    """As many tokens of each text as :func:`stream` yields at most, whether or not all texts have ended.

    Where the logits are not finite, they are begin-of-text. After the prompts, the host does not wait for the device.
    """
    device, num_texts = u_BLSD.device, len(prompts)
    # What stands further back than any layer can see from the end of the prompt need not be read.
    inputs = [_last_inputs(decoder, prompt) for prompt in prompts]
    # Begin-of-text has a column too, since it may stand in the place of a token.
    is_any_used_BV = torch.zeros(num_texts, decoder.vocab_size, dtype=torch.bool, device=device)
    is_used_BV = is_any_used_BV[:, :-1]
    has_penalty = sampling.repetition_penalty != 1  # otherwise nothing reads it, and a long prompt would cost time
    if has_penalty:
        for is_used_V, prompt in zip(is_used_BV, prompts, strict=True):
            if prompt:
                is_used_V[list(prompt)] = True
    longest = max(map(len, inputs))
    inputs_BT = torch.tensor([row + [end_of_text] * (longest - len(row)) for row in inputs], device=device)
    num_inputs_B = torch.tensor([len(row) for row in inputs], device=device)
    hidden_BD, memory = decoder.read(inputs_BT, num_inputs_B, u_BLSD, max_new_tokens - 1)
    logits = logits_of_many_tokens(decoder, max_new_tokens)
    uniform_B1 = torch.empty(num_texts, 1, dtype=torch.float64, device=device)
    tokens_B = torch.full((num_texts,), decoder.begin_of_text, device=device)

    def choose(hidden_BD: Tensor) -> None:
        chosen_B = sampling.choose(logits(hidden_BD), is_used_BV, uniform_B1)
        # A text has ended if its last token was end-of-text, and then gets no other.
        is_other_B = (tokens_B == end_of_text) & (chosen_B != decoder.begin_of_text)
        tokens_B.copy_(chosen_B.masked_fill(is_other_B, end_of_text))
        if has_penalty:
            is_any_used_BV.scatter_(1, tokens_B[:, None], True)

    def go_on() -> None:
        choose(decoder.step(tokens_B, memory))

    go_on_again = repeated(go_on, max_new_tokens - 1, device)
    for number in range(max_new_tokens):
        if sampling.temperature:
            uniform_B1.uniform_(generator=generator)
        if number:
            go_on_again()
        else:
            choose(hidden_BD)
        yield tokens_B.clone()


def _last_inputs(decoder: Decoder, prompt: Sequence[int]) -> list[int]:
    """The inputs up to the end of a prompt, as many of them as the last layer sees.

    Raises:
        IndexError: if one of the prompt is no token of a text. A device would not recover from such an index.
    """
    last = list(prompt[max(0, len(prompt) - decoder.reach) :])
    if prompt and not 0 <= min(prompt) <= max(prompt) < decoder.begin_of_text:
        raise IndexError(f"a token of the prompt is out of range: they go from 0 to {decoder.begin_of_text - 1}")
    return last if len(prompt) >= decoder.reach else [decoder.begin_of_text, *last]


def generate(
    decoder: Decoder,
    u_BLSD: Tensor,
    end_of_text: int,
    max_new_tokens: int,
    prompts: Sequence[Sequence[int]] | None = None,
    sampling: Sampling = AS_THE_MODEL_SAYS,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Write B texts at once: [B, max_new_tokens] int64, without their prompts, filled with end-of-text after their end.

    The arguments and errors are those of :func:`stream`.
    """
    require_whole("max_new_tokens", max_new_tokens, 0)
    tokens_BN = torch.full((len(u_BLSD), max_new_tokens), end_of_text, device=u_BLSD.device)
    texts = stream(decoder, u_BLSD, end_of_text, max_new_tokens, prompts, sampling, generator)
    for number, tokens_B in enumerate(texts):
        tokens_BN[:, number] = tokens_B
    return tokens_BN

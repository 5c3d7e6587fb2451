"""Languages whose probabilities are known exactly, to hold a model's figures against.

Their texts have a fixed length and no end-of-text: any id is a symbol like the others.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import pyro.distributions as dist
import torch
from torch import Tensor

from ltm_pyro.models.batch import TokenBatch


@dataclass(frozen=True)
class TopicLanguage:
    """A text has a hidden topic, and given the topic it is drawn from a hidden Markov chain.

    The topic is to the text what z is to a sequence of the latent thought model: nothing but the symbols tells it, and
    every one of them depends on it. K topics, S hidden states, V symbols; all probabilities are float64.
    """

    topic_probs: Tensor
    """The prior of the topics, [K]."""

    initial_probs: Tensor
    """The probabilities of the state before the first symbol, which emits none itself (as in Pyro's DiscreteHMM),
    [K, S]."""

    transition_probs: Tensor
    """The probabilities of going, before every symbol, from the state of the second dimension to that of the third,
    [K, S, S]."""

    emission_probs: Tensor
    """The probabilities of the symbol that a state emits, [K, S, V]."""

    @classmethod
    def random(
        cls, num_topics: int, num_states: int, vocab_size: int, seed: int, concentration: float = 0.3
    ) -> TopicLanguage:
        """A language whose topics are equally likely and whose other probabilities are Dirichlet draws.

        Args:
            num_topics: how many topics there are (K).
            num_states: how many hidden states there are (S).
            vocab_size: how many symbols there are (V).
            seed: the same seed gives the same language.
            concentration: the concentration of the Dirichlet, positive. The smaller, the more the topics differ: with
                4 topics, 3 states and 16 symbols at 0.3, Bayes' rule names the topic of 64 symbols more than 95 times
                in 100.
        """
        rng = np.random.default_rng(seed)

        def draw(*shape: int, outcomes: int) -> Tensor:
            return torch.from_numpy(rng.dirichlet(np.full(outcomes, concentration), size=shape))

        return cls(
            topic_probs=torch.full((num_topics,), 1 / num_topics, dtype=torch.float64),
            initial_probs=draw(num_topics, outcomes=num_states),
            transition_probs=draw(num_topics, num_states, outcomes=num_states),
            emission_probs=draw(num_topics, num_states, outcomes=vocab_size),
        )

    @property
    def vocab_size(self) -> int:
        return self.emission_probs.shape[-1]

    def sample(self, num_sequences: int, length: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Texts [num_sequences, length] int64, and the topic of each [num_sequences] int64."""
        topics = _draw(self.topic_probs.expand(num_sequences, -1), generator)
        states = _draw(self.initial_probs[topics], generator)
        symbols = []
        for _ in range(length):
            states = _draw(self.transition_probs[topics, states], generator)
            symbols.append(_draw(self.emission_probs[topics, states], generator))
        return torch.stack(symbols, dim=1), topics

    def log_joint(self, tokens: Tensor) -> Tensor:
        """log p(text, topic) in nats, [N, K] float64, of texts [N, T]; its softmax is the posterior of the topic."""
        chain = dist.DiscreteHMM(  # type: ignore[no-untyped-call]  # as much of Pyro
            self.initial_probs.log(),
            self.transition_probs.log()[:, None],
            dist.Categorical(logits=self.emission_probs.log()[:, None]),
        )
        log_prob: Tensor = chain.log_prob(tokens[:, None])  # type: ignore[no-untyped-call]
        return self.topic_probs.log() + log_prob

    def log_prob(self, tokens: Tensor) -> Tensor:
        """log p(text) in nats, [N] float64, of texts [N, T]: exact, by the forward algorithm, summed over topics."""
        return self.log_joint(tokens).logsumexp(dim=1)


@dataclass(frozen=True)
class UniformLanguage:
    """Every symbol is drawn independently and uniformly: no model can need fewer than log V nats per token."""

    vocab_size: int
    """How many symbols there are (V)."""

    def sample(self, num_sequences: int, length: int, generator: torch.Generator) -> Tensor:
        """Texts [num_sequences, length] int64."""
        return torch.randint(self.vocab_size, (num_sequences, length), generator=generator)

    def log_prob(self, tokens: Tensor) -> Tensor:
        """log p(text) in nats, [N] float64, of texts [N, T]."""
        num_sequences, length = tokens.shape
        return torch.full((num_sequences,), -length * math.log(self.vocab_size), dtype=torch.float64)


@dataclass(frozen=True)
class UnigramLanguage:
    """Every text has symbol probabilities of its own, which are all that z could say of it.

    They are a draw from a symmetric Dirichlet, and the symbols are independent given them: a Dirichlet-multinomial.
    """

    vocab_size: int
    """How many symbols there are (V)."""

    concentration: float
    """The concentration of the Dirichlet, positive. The smaller, the more the texts differ."""

    def sample(self, num_sequences: int, length: int, generator: torch.Generator) -> Tensor:
        """Texts [num_sequences, length] int64."""
        # torch's own Dirichlet takes no generator.
        rng = np.random.default_rng(int(torch.randint(2**62, (1,), generator=generator)))
        probs = rng.dirichlet(np.full(self.vocab_size, self.concentration), size=num_sequences)
        return torch.multinomial(torch.from_numpy(probs), length, replacement=True, generator=generator)

    def log_prob(self, tokens: Tensor) -> Tensor:
        """log p(text) in nats, [N] float64, of texts [N, T]: exact, the probabilities integrated out."""
        counts = torch.nn.functional.one_hot(tokens, self.vocab_size).sum(1).double()
        total, a = self.vocab_size * self.concentration, self.concentration
        each = (torch.lgamma(counts + a) - math.lgamma(a)).sum(1)
        return each + math.lgamma(total) - math.lgamma(total + tokens.shape[1])


def token_batch(tokens: Tensor) -> TokenBatch:
    """Texts [N, T] as a batch: every position has weight 1, the ids are 0 to N - 1, a symbol counts as one byte."""
    num_sequences, length = tokens.shape
    return TokenBatch(
        tokens=tokens,
        weights=torch.ones(tokens.shape),
        sequence_ids=torch.arange(num_sequences),
        num_bytes=torch.full((num_sequences,), length),
    )


def _draw(probs: Tensor, generator: torch.Generator) -> Tensor:
    """One outcome for each row of [N, outcomes]."""
    return torch.multinomial(probs, 1, generator=generator).squeeze(1)

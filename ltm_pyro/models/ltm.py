"""The Latent Thought Model as a Pyro program (Kong et al. 2025, arXiv 2502.01567, eq. 1-4).

    z_b ~ p(z)                       site "z",      [B] × [L, S, D]
    x_b ~ p_β(x | u_b = U(z_b))      site "tokens", [B] × [T]

Both sites stand under the plate "sequences". p(z) and the map U are those of the prior (`priors/`): N(0, I) and the
identity in the paper.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, cast

import numpy as np
import pyro
import torch
from pyro.nn import PyroModule, pyro_method
from torch import Tensor

from ltm_pyro.errors import require_whole
from ltm_pyro.models.batch import TokenBatch
from ltm_pyro.models.decoder import Decoder, DecoderConfig
from ltm_pyro.models.encoder import Encoder, RecurrentEncoder
from ltm_pyro.models.generation import AS_THE_MODEL_SAYS, Sampling, generate, stream
from ltm_pyro.models.priors import PRIORS
from ltm_pyro.models.tokens import TokenSequence, until_end_of_text
from ltm_pyro.models.vocabulary import target_log_probs


class LatentThoughtModel(PyroModule):
    """p(z) p_β(x | z).

    The weights β, those of a learned prior included, are Pyro parameters: `pyro.infer.SVI` finds them. Two models in
    one process share the names of their parameters; a program that trains both with `pyro.infer.SVI` sets
    `pyro.settings.set(module_local_params=True)`, or clears the parameter store in between.

    Args:
        config: the shape of the decoder and of z, the prior, and the shape of the encoder if there is to be one.
        vocab_size: V, of which the last id is begin-of-text.
        end_of_text: id of the token that ends a text.

    Raises:
        ValueError: if end_of_text is not a token that can be predicted.
    """

    def __init__(self, config: DecoderConfig, vocab_size: int, end_of_text: int) -> None:
        super().__init__()
        if not 0 <= end_of_text < vocab_size - 1:
            raise ValueError(f"end_of_text {end_of_text} must be a token below begin-of-text, {vocab_size - 1}")
        self.config = config
        self.end_of_text = end_of_text
        self.decoder = Decoder(config, vocab_size)
        # In this order, so that the same seed draws the same decoder with an encoder and without, under any prior.
        if config.encoder_layers:
            self.encoder = Encoder(config) if config.encoder_reads == "text" else RecurrentEncoder(config)
        self.prior = PRIORS[config.prior](config.latent_shape)

    def forward(self, batch: TokenBatch | None = None, num_sequences: int = 1) -> Tensor:
        """Run the program on the texts of a batch, or generate texts.

        Args:
            batch: texts to observe, their positions weighted by `batch.weights`; None to draw texts of at most
                `config.length` tokens.
            num_sequences: the number of texts to draw where there is no batch.

        Returns:
            tokens, [B, T] int64 (more dimensions on the left under outer plates).

        Raises:
            ValueError: if there is not to be a text.
        """
        require_whole("the number of texts", num_sequences if batch is None else len(batch), 1)
        decoder, prior = self._part("decoder"), self._part("prior")
        weight = decoder.embedding.weight
        # z stays at least in float32 whatever the decoder computes in.
        zero = torch.zeros((), dtype=torch.promote_types(weight.dtype, torch.float32), device=weight.device)
        with pyro.plate("sequences", num_sequences if batch is None else len(batch), dim=-1):
            u = prior.thoughts(pyro.sample("z", prior.distribution(like=zero)))
            if batch is None:
                likelihood = TokenSequence(decoder, u, self.end_of_text, self.config.length)
                return pyro.sample("tokens", likelihood)
            return pyro.sample("tokens", self._likelihood(decoder, u, batch), obs=batch.tokens)

    def _part(self, name: str) -> Any:
        """The decoder or the prior. Pyro is told of its weights, unless they are frozen: in a fast step of a small
        model, telling it takes longer than all else that Pyro does."""
        part = self._modules[name]
        is_frozen = part is not None and not any(weight.requires_grad for weight in part.parameters())
        return part if is_frozen else getattr(self, name)

    def _likelihood(self, decoder: Decoder, u: Tensor, batch: TokenBatch) -> TokenSequence:
        """p(x | u) of the texts of a batch."""
        return TokenSequence(
            decoder,
            u,
            self.end_of_text,
            batch.tokens.shape[-1],
            batch.weights,
            batch.below_z,
            batch.previous,
            batch.num_context,
        )

    @torch.no_grad()
    def token_log_probs(self, batch: TokenBatch, z: Tensor) -> Tensor:
        """log p(x_n | z, x_<n) of every token of a batch in nats, [*sample_shape, B, T]; 0 where its weight is 0.

        Weighted, they add up to log p(x | z).

        Args:
            z: [*sample_shape, B, L, S, D].
        """
        log_probs = self._likelihood(self.decoder, self.prior.thoughts(z), batch).token_log_probs(batch.tokens)
        return log_probs * (batch.weights != 0)

    def stream(
        self,
        z_BLSD: Tensor,
        max_new_tokens: int,
        prompts: Sequence[Sequence[int]] | None = None,
        sampling: Sampling = AS_THE_MODEL_SAYS,
        generator: torch.Generator | None = None,
    ) -> Iterator[Tensor]:
        """Write one text for each z, one token of each at a time, as :func:`~ltm_pyro.models.generation.stream` does.

        Args:
            z_BLSD: a z for each text, which the prior maps to the thought vectors.
        """
        u_BLSD = self._thoughts(z_BLSD)
        return stream(self.decoder, u_BLSD, self.end_of_text, max_new_tokens, prompts, sampling, generator)

    def generate(
        self,
        z_BLSD: Tensor,
        max_new_tokens: int,
        prompts: Sequence[Sequence[int]] | None = None,
        sampling: Sampling = AS_THE_MODEL_SAYS,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Write one text for each z: [B, max_new_tokens], as :func:`~ltm_pyro.models.generation.generate` does.

        Args:
            z_BLSD: a z for each text, which the prior maps to the thought vectors.
        """
        u_BLSD = self._thoughts(z_BLSD)
        return generate(self.decoder, u_BLSD, self.end_of_text, max_new_tokens, prompts, sampling, generator)

    @torch.no_grad()
    def _thoughts(self, z_BLSD: Tensor) -> Tensor:
        return self.prior.thoughts(z_BLSD)

    @property
    def reach(self) -> int:
        """The number of inputs, its own included, that the prediction of a token depends on."""
        return self.decoder.reach

    @torch.no_grad()
    def precompute(self, batch: TokenBatch) -> TokenBatch:
        """The batch with all that does not depend on z computed once. It holds as long as the weights do not change."""
        inputs = self.decoder.inputs(batch.tokens, batch.previous)
        return dataclasses.replace(batch, below_z=self.decoder.below_z(inputs, batch.num_context))

    @pyro_method
    def encode(
        self, batch: TokenBatch, mean: Tensor | None = None, log_scale: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Mean and log scale of the q(z|x) that the encoder proposes, [B, L, S, D] each.

        `batch.weights` says how much each position counts. The encoder sees nothing of positions of weight 0, except
        that one which reads blocks sees their tokens as context of the others.

        Args:
            mean, log_scale: those of q(z) before the tokens of the batch were read, [B, L, S, D]; None for the prior's.

        Raises:
            ValueError: if the model has no encoder, or one that reads whole texts and is given another q than the
                prior.
        """
        if not self.config.encoder_layers:
            raise ValueError("the model has no encoder: its encoder_layers are 0")
        weight = self.decoder.embedding.weight
        dtype = torch.promote_types(weight.dtype, torch.float32)
        prior = self.prior.distribution(like=torch.zeros((), dtype=dtype, device=weight.device))
        # What the encoder reads and proposes is relative to the prior.
        if isinstance(self.encoder, RecurrentEncoder):
            mean = (prior.mean if mean is None else mean).expand(len(batch), -1, -1, -1)
            log_scale = (prior.stddev.log() if log_scale is None else log_scale).expand(len(batch), -1, -1, -1)
            relative = (mean - prior.mean) / prior.stddev, log_scale - prior.stddev.log()
            hidden, error = self._predicted(batch, mean)
            proposed = self.encoder(hidden, error, batch.weights[:, batch.num_context :], *relative)
        elif mean is None and log_scale is None:
            proposed = self.encoder(self.decoder.embedding(batch.tokens), batch.weights)
        else:
            raise ValueError("the model's encoder reads whole texts, and cannot go on from a posterior")
        proposed_mean, proposed_log_scale = (part.to(dtype) for part in proposed)
        return prior.mean + prior.stddev * proposed_mean, prior.stddev.log() + proposed_log_scale

    def _predicted(self, batch: TokenBatch, z_BLSD: Tensor) -> tuple[Tensor, Tensor]:
        """The hidden states that predict the tokens of a batch given z, and how wrong they are, [B, T, D] each.

        That is the gradient of the log-probability of the token with respect to the hidden state: the embedding of the
        token less its mean under the prediction. Both are constants: the decoder does not learn from how its errors are
        read.
        """
        decoder, tokens = self.decoder, batch.tokens[:, batch.num_context :]
        with torch.no_grad():
            inputs = decoder.inputs(batch.tokens, batch.previous)
            hidden = decoder(inputs, self.prior.thoughts(z_BLSD), None, batch.num_context)
            hidden = hidden[:, : tokens.shape[1]]  # where there are no tokens, there is still begin-of-text
        with torch.enable_grad():
            hidden.requires_grad_()
            weight, dtype = decoder.embedding.weight.detach(), decoder.compute_dtype
            log_probs = target_log_probs(hidden.flatten(0, 1), weight, tokens.flatten(), num_unused=1, dtype=dtype)
            (error,) = torch.autograd.grad(log_probs.sum(), hidden)
        return hidden.detach(), error


@torch.no_grad()
def simulate(model: LatentThoughtModel, num_texts: int, first_id: int, seed: int) -> tuple[Tensor, TokenBatch]:
    """Texts drawn from the model, each up to its end-of-text, and the z that made them, [B, L, S, D].

    The state of torch's global generator is the same afterwards as before.

    Args:
        num_texts: B, the number of texts.
        first_id: the sequence id of the first text; the others count on from it, and other ids are other texts.
        seed: the same seed and ids give the same texts.
    """
    device = model.decoder.embedding.weight.device
    # By name: torch warns of several devices that were not asked for.
    with torch.random.fork_rng(range(torch.cuda.device_count())), pyro.get_param_store().scope():
        torch.manual_seed(int(np.random.SeedSequence([seed, first_id]).generate_state(1)[0]))
        trace = pyro.poutine.trace(model).get_trace(num_sequences=num_texts)
    z, tokens = (cast(Tensor, trace.nodes[name]["value"]) for name in ("z", "tokens"))
    weights = until_end_of_text(tokens, model.end_of_text).to(z)
    ids = torch.arange(first_id, first_id + num_texts)
    return z, TokenBatch(tokens, weights, ids, torch.zeros_like(ids)).to(device)

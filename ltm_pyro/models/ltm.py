"""The Latent Thought Model as a Pyro program (Kong et al. 2025, arXiv 2502.01567, eq. 1-4).

    z_b ~ N(0, I)                    site "z",      [B] × [L, S, D]
    x_b ~ p_β(x | z_b)               site "tokens", [B] × [T]

both under the plate "sequences".
"""

from __future__ import annotations

import dataclasses

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro.nn import PyroModule, pyro_method
from torch import Tensor

from ltm_pyro.models.batch import TokenBatch
from ltm_pyro.models.decoder import Decoder, DecoderConfig
from ltm_pyro.models.encoder import Encoder
from ltm_pyro.models.tokens import TokenSequence


class LatentThoughtModel(PyroModule):
    """p(z) p_β(x | z).

    The weights β are Pyro parameters: `pyro.infer.SVI` finds them. Two models in one process share the names of
    their parameters; a program that trains both with `pyro.infer.SVI` sets
    `pyro.settings.set(module_local_params=True)`, or clears the parameter store in between.

    Args:
        config: shape of the decoder, of z, and of the encoder if there is to be one.
        vocab_size: V, of which the last id is begin-of-text.
        end_of_text: id of the token that ends a text.

    Raises:
        ValueError: if end_of_text is no token that can be predicted.
    """

    def __init__(self, config: DecoderConfig, vocab_size: int, end_of_text: int) -> None:
        super().__init__()
        if not 0 <= end_of_text < vocab_size - 1:
            raise ValueError(f"end_of_text {end_of_text} must be a token below begin-of-text, {vocab_size - 1}")
        self.config = config
        self.end_of_text = end_of_text
        self.decoder = Decoder(config, vocab_size)
        # After the decoder, whose weights so are the same with it and without.
        if config.encoder_layers:
            self.encoder = Encoder(config)

    def forward(self, batch: TokenBatch | None = None, num_sequences: int = 1) -> Tensor:
        """Run the program: on the texts of a batch, or without one to generate texts.

        Args:
            batch: texts to observe, their positions weighted by `batch.weights`. With None, `num_sequences` texts of
                at most `config.length` tokens are drawn.

        Returns:
            tokens, [B, T] int64 (more dimensions on the left under outer plates).
        """
        decoder = self.decoder
        weight = decoder.embedding.weight
        # z stays at least in float32 whatever the decoder computes in.
        zero = torch.zeros((), dtype=torch.promote_types(weight.dtype, torch.float32), device=weight.device)
        with pyro.plate("sequences", num_sequences if batch is None else len(batch), dim=-1):
            z = pyro.sample("z", dist.Normal(zero, zero + 1).expand(self.config.latent_shape).to_event(3))
            if batch is None:
                likelihood = TokenSequence(decoder, z, self.end_of_text, self.config.length)
                return pyro.sample("tokens", likelihood)
            length = batch.tokens.shape[-1]
            likelihood = TokenSequence(decoder, z, self.end_of_text, length, batch.weights, batch.below_z)
            return pyro.sample("tokens", likelihood, obs=batch.tokens)

    @torch.no_grad()
    def precompute(self, batch: TokenBatch) -> TokenBatch:
        """The batch with what does not depend on z computed once: good for as long as the weights stay as they are."""
        return dataclasses.replace(batch, below_z=self.decoder.below_z(self.decoder.inputs(batch.tokens)))

    @pyro_method
    def encode(self, batch: TokenBatch) -> tuple[Tensor, Tensor]:
        """Mean and log scale of the q(z|x) that the encoder proposes, [B, L, S, D] each.

        It sees the texts as `batch.weights` says, and nothing of what weighs 0.

        Raises:
            ValueError: if the model has no encoder.
        """
        if not self.config.encoder_layers:
            raise ValueError("the model has no encoder: its encoder_layers are 0")
        # The prior is N(0, I): what is relative to it is absolute.
        mean, log_scale = self.encoder(self.decoder.embedding(batch.tokens), batch.weights)
        dtype = torch.promote_types(mean.dtype, torch.float32)
        return mean.to(dtype), log_scale.to(dtype)


@torch.no_grad()
def simulate(model: LatentThoughtModel, num_texts: int, first_id: int, seed: int) -> tuple[Tensor, TokenBatch]:
    """Texts from the model, each up to its end-of-text, and the z that made them, [B, L, S, D].

    torch's global generator is as it was afterwards.

    Args:
        num_texts: B.
        first_id: the sequence ids count from here; other ids are other texts.
        seed: the same seed and ids give the same texts.
    """
    device = model.decoder.embedding.weight.device
    with torch.random.fork_rng(), pyro.get_param_store().scope():
        torch.manual_seed(int(np.random.SeedSequence([seed, first_id]).generate_state(1)[0]))
        trace = pyro.poutine.trace(model).get_trace(num_sequences=num_texts)
    z, tokens = trace.nodes["z"]["value"], trace.nodes["tokens"]["value"]
    is_end = (tokens == model.end_of_text).long()
    weights = (is_end.cumsum(-1) - is_end == 0).to(z)
    ids = torch.arange(first_id, first_id + num_texts)
    return z, TokenBatch(tokens, weights, ids, torch.zeros_like(ids)).to(device)

"""The prior `scaled`: u = s z with z ~ N(0, I) and a learned s. The oracles: the standard prior and the chain rule."""

from __future__ import annotations

import dataclasses

import pyro
import torch

from ltm_pyro.inference.base import log_joint
from ltm_pyro.models import DecoderConfig, LatentThoughtModel, TokenBatch

CONFIG = DecoderConfig(
    num_layers=2,
    width=8,
    num_heads=2,
    hidden=12,
    num_slots=3,
    window=3,
    length=5,
    prior="scaled",
    thoughts="fast-weights",
)
SCALES = torch.tensor([[0.5, 2.0, 0.1], [1.5, 0.3, 0.7]], dtype=torch.float64)[..., None]


def models():
    """One model under both priors, with weights so large that z decides what it writes."""
    pyro.set_rng_seed(0)
    scaled = LatentThoughtModel(CONFIG, 6, 4)
    for weight in scaled.decoder.parameters():
        torch.nn.init.normal_(weight, std=0.6)
    standard = LatentThoughtModel(dataclasses.replace(CONFIG, prior="standard"), 6, 4)
    standard.decoder.load_state_dict(scaled.decoder.state_dict())
    scaled.prior.log_scale.data = SCALES.log()
    return scaled.double(), standard.double()


def batch():
    tokens = torch.randint(5, (4, 5))
    return TokenBatch(tokens, torch.ones(4, 5).double(), torch.arange(4), torch.full((4,), 5))


def test_a_text_given_z_is_what_the_standard_prior_gives_for_z_times_the_scale():
    scaled, standard = models()
    texts, z = batch(), torch.randn(4, *CONFIG.latent_shape, dtype=torch.float64)
    found, expected = log_joint(scaled, texts, z), log_joint(standard, texts, SCALES * z)
    torch.testing.assert_close(found.log_likelihood, expected.log_likelihood, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found.log_prior, log_joint(standard, texts, z).log_prior)


def test_the_gradient_of_the_scale_is_that_of_the_thoughts_times_z_summed_over_a_slot():
    scaled, standard = models()
    texts, z = batch(), torch.randn(4, *CONFIG.latent_shape, dtype=torch.float64)
    log_joint(scaled, texts, z).log_likelihood.sum().backward()
    u = (SCALES * z).requires_grad_()
    log_joint(standard, texts, u).log_likelihood.sum().backward()
    expected = (u.grad * u).sum((0, 3))[..., None]  # d u / d log s = u
    torch.testing.assert_close(scaled.prior.log_scale.grad, expected, rtol=1e-9, atol=1e-12)


def test_it_starts_at_the_scale_of_weights():
    model = LatentThoughtModel(CONFIG, 6, 4)
    torch.testing.assert_close(model.prior.log_scale.exp(), torch.full((2, 3, 1), 0.01))

"""Figures of trained models, against the entropy of languages that no model can compress further."""

import dataclasses
import math

import pytest
import torch

from ltm_pyro.data.synthetic import TopicLanguage, UniformLanguage, token_batch
from ltm_pyro.inference import BatchNoise, SequenceNoise, bounds, infer
from ltm_pyro.inference.schemes.adam_vi import AdamVI
from ltm_pyro.inference.svi import OptimizerConfig, WeightOptimizer, elbo_backward
from ltm_pyro.models import DecoderConfig, LatentThoughtModel

LENGTH = 32
STRONG_FIT = AdamVI(32, learning_rate=0.3, epsilon=1e-8, initial_scale=math.exp(-2.5))
"""Adam's own small epsilon, the reference's rate and start, and enough steps to make use of noise that is reused."""


def mean_and_error(values):
    """Mean and its standard error."""
    return values.mean(), values.std() / math.sqrt(len(values))


def trained(scheme, sample, num_slow_steps, weight_scale):
    """A small model trained on a language of 16 symbols, and the loss of every step in nats per token.

    Args:
        sample: a number of texts, and a generator, to texts.
        weight_scale: the weights start at so many times their usual scale, so that z tells from the first step on
            and not after hundreds.
    """
    config = DecoderConfig(num_layers=2, width=32, num_heads=2, hidden=64, num_slots=4, window=16, length=LENGTH)
    model = LatentThoughtModel(config, vocab_size=17, end_of_text=15)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.mul_(weight_scale)
    settings = OptimizerConfig(learning_rate=3e-3, final_learning_rate=3e-4, warmup_steps=10)
    optimizer = WeightOptimizer(model, settings, num_slow_steps)
    generator = torch.Generator().manual_seed(1)
    rng, losses = BatchNoise(generator), []
    for step in range(num_slow_steps):
        batch = token_batch(sample(8, generator))
        state = infer(scheme, model, batch, rng)
        guide = scheme.guide(model, state, batch, rng)
        losses.append(elbo_backward(model, guide, batch, 8 * LENGTH).nelbo / (8 * LENGTH))
        assert optimizer.update(step)
    return model, torch.tensor(losses, dtype=torch.float64)


def uniform_texts(num_sequences, generator):
    return UniformLanguage(16).sample(num_sequences, LENGTH, generator)


@pytest.fixture
def held_out():
    """Uniform texts that no training has seen."""
    return token_batch(uniform_texts(64, torch.Generator().manual_seed(2)))


@pytest.mark.parametrize(
    ("scheme", "num_slow_steps", "weight_scale", "worst"),
    [(AdamVI(num_steps=4), 80, 1, 0.05), (STRONG_FIT, 15, 8, 0.3)],
    ids=["long training", "strong fit"],
)
def test_the_bound_on_incompressible_tokens_never_falls_below_log_v(
    scheme, num_slow_steps, weight_scale, worst, held_out
):
    model, losses = trained(scheme, uniform_texts, num_slow_steps, weight_scale)
    state = infer(scheme, model, held_out, SequenceNoise(0))
    estimate = bounds.elbo(model, held_out, scheme.distribution(state, SequenceNoise(0)), num_samples=16)
    bound, error = mean_and_error(estimate.nelbo / LENGTH)
    assert bound > math.log(16) - 3 * error
    assert bound < math.log(16) + worst
    # The loss of a slow step is one too: its texts are new, and so is the noise of its draw.
    loss, error = mean_and_error(losses[num_slow_steps // 2 :])
    assert loss > math.log(16) - 3 * error


def test_the_figure_at_reused_noise_claims_to_compress_the_incompressible(held_out):
    """As the reference trains and evaluates, its figure is below the entropy; the bound of the same q is not."""
    scheme = dataclasses.replace(STRONG_FIT, noise="reused")
    model, losses = trained(scheme, uniform_texts, 15, weight_scale=8)
    state = infer(scheme, model, held_out, SequenceNoise(0))
    claimed, error = mean_and_error(bounds.reused_noise(model, held_out, scheme, state).nelbo / LENGTH)
    assert claimed < math.log(16) - 5 * error
    loss, error = mean_and_error(losses[-5:])
    assert loss < math.log(16) - 5 * error
    # Of the same model: the bound of this q, and of one that was fitted with fresh noise.
    fresh = infer(STRONG_FIT, model, held_out, SequenceNoise(0))
    for q in (scheme.distribution(state, SequenceNoise(0)), STRONG_FIT.distribution(fresh, SequenceNoise(0))):
        bound, error = mean_and_error(bounds.elbo(model, held_out, q, num_samples=16).nelbo / LENGTH)
        assert bound > math.log(16) + 5 * error


def test_the_bound_on_a_language_of_known_probability_is_above_it():
    """Four topics, which the model has to find out: the bound comes near, and is no better than the truth."""
    language = TopicLanguage.random(num_topics=4, num_states=3, vocab_size=16, seed=0)

    def sample(num_sequences, generator):
        return language.sample(num_sequences, LENGTH, generator)[0]

    scheme = AdamVI(6, learning_rate=0.2)
    model, _ = trained(scheme, sample, 120, weight_scale=4)
    batch = token_batch(sample(64, torch.Generator().manual_seed(2)))
    state = infer(scheme, model, batch, SequenceNoise(0))
    estimate = bounds.elbo(model, batch, scheme.distribution(state, SequenceNoise(0)), num_samples=16)
    difference, error = mean_and_error((estimate.nelbo + language.log_prob(batch.tokens)) / LENGTH)
    assert difference > -3 * error
    # Half of what there is to learn has been learned, and z carries some of it.
    assert difference < (math.log(16) + language.log_prob(batch.tokens).mean() / LENGTH) / 2
    assert estimate.kl.mean() > 1

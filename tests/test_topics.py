"""What z is for: a continuation keeps the topic of its prompt, though the decoder cannot see it any more."""

import itertools
import math

import pytest
import torch

from ltm_pyro.data import TopicLanguage, token_batch
from ltm_pyro.inference import BatchNoise, SequenceNoise, infer
from ltm_pyro.inference.schemes.vi import VI
from ltm_pyro.inference.svi import OptimizerConfig, WeightOptimizer, elbo_backward
from ltm_pyro.models import DecoderConfig, LatentThoughtModel, generate

pytestmark = pytest.mark.slow

LANGUAGE = TopicLanguage.random(num_topics=4, num_states=3, vocab_size=12, seed=0)
LENGTH = 48


@pytest.fixture(scope="module")
def learned() -> LatentThoughtModel:
    """A model that sees of a text, besides z, the last symbol only."""
    torch.manual_seed(0)
    shape = DecoderConfig(num_layers=2, width=16, num_heads=2, hidden=32, num_slots=2, window=1, length=LENGTH)
    model = LatentThoughtModel(shape, LANGUAGE.vocab_size + 2, LANGUAGE.vocab_size)
    config, num_steps = OptimizerConfig(learning_rate=2e-2, final_learning_rate=1e-3, warmup_steps=20), 300
    optimizer, generator = WeightOptimizer(model, config, num_steps), torch.Generator().manual_seed(0)
    scheme, rng = VI(num_steps=4), BatchNoise(generator)
    for step in range(num_steps):
        batch = token_batch(LANGUAGE.sample(32, LENGTH, generator)[0])
        guide = scheme.guide(model, infer(scheme, model, batch, rng), batch, rng)
        elbo_backward(model, guide, batch, batch.tokens.numel())
        optimizer.update(step)
    return model


def test_a_continuation_keeps_the_topic_of_its_prompt_and_more_steps_do_not_harm(learned):
    """The topic of a continuation is what Bayes' rule names, which knows the language and nothing of the model."""
    num_texts = 400
    prompts, topics = LANGUAGE.sample(num_texts, LENGTH // 2, torch.Generator().manual_seed(1))
    kept = {}
    for num_steps in (0, 1, 4, 16, 64):
        scheme, rng = VI(num_steps=num_steps), SequenceNoise(0)  # without a step: the prior
        state = infer(scheme, learned, token_batch(prompts), rng)
        z = scheme.posterior(state, 1, rng).samples[0, 0]
        generator = torch.Generator().manual_seed(2)
        texts = generate(learned.decoder, z, learned.end_of_text, LENGTH // 2, prompts.tolist(), generator=generator)
        # It has never seen an end-of-text, and the language has no symbol for it.
        symbols = texts.clamp(max=LANGUAGE.vocab_size - 1)
        kept[num_steps] = (LANGUAGE.log_joint(symbols).argmax(1) == topics).double()

    def gain(more: int, less: int) -> tuple[float, float]:
        """Mean difference on the same prompts, and its standard error."""
        difference = kept[more] - kept[less]
        return difference.mean().item(), difference.std().item() / math.sqrt(num_texts)

    # From the prior the topic is right by chance, one time in four.
    assert kept[0].mean().item() == pytest.approx(0.25, abs=5 * math.sqrt(0.25 * 0.75 / num_texts))
    for num_steps in (1, 4, 16, 64):
        difference, error = gain(num_steps, 0)
        assert difference > 5 * error
        assert difference > 0.2
    for less, more in itertools.pairwise((1, 4, 16, 64)):
        difference, error = gain(more, less)
        assert difference > -3 * error
    difference, error = gain(16, 1)
    assert difference > 2 * error

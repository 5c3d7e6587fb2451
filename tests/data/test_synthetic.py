"""Synthetic languages: probabilities against enumeration by hand, and samples against probabilities."""

import dataclasses
import itertools
import math

import pytest
import torch

from ltm_pyro.data.synthetic import TopicLanguage, UniformLanguage, UnigramLanguage, token_batch


def tiny_language(concentration=0.5):
    """Two topics that are not equally likely, two states, three symbols."""
    language = TopicLanguage.random(2, 2, 3, seed=1, concentration=concentration)
    return dataclasses.replace(language, topic_probs=torch.tensor([0.3, 0.7], dtype=torch.float64))


def all_texts(vocab_size, length):
    return torch.tensor(list(itertools.product(range(vocab_size), repeat=length)))


def enumerated_prob(language, text):
    """p(text), summed over every topic and every path of hidden states, in plain floats."""
    topics, initial, transition, emission = (
        probs.tolist()
        for probs in (
            language.topic_probs,
            language.initial_probs,
            language.transition_probs,
            language.emission_probs,
        )
    )
    total = 0.0
    for topic, path in itertools.product(
        range(len(topics)), itertools.product(range(len(initial[0])), repeat=len(text) + 1)
    ):
        prob = topics[topic] * initial[topic][path[0]]
        for before, after, symbol in zip(path[:-1], path[1:], text, strict=True):
            prob *= transition[topic][before][after] * emission[topic][after][symbol]
        total += prob
    return total


@pytest.mark.parametrize("length", [1, 2, 5])
def test_probabilities_of_all_texts_sum_to_one(length):
    total = tiny_language().log_prob(all_texts(3, length)).exp().sum()
    assert total.dtype == torch.float64
    assert float(total) == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("concentration", [0.02, 0.5])  # with the first, some probabilities are next to nothing
def test_log_prob_is_that_of_enumeration(concentration):
    language = tiny_language(concentration)
    texts = all_texts(3, 4)
    expected = [math.log(enumerated_prob(language, text)) for text in texts.tolist()]
    assert language.log_prob(texts).tolist() == pytest.approx(expected, rel=1e-10)


def test_samples_have_the_probabilities_of_the_language():
    language, num_sequences = tiny_language(), 20_000
    texts, topics = language.sample(num_sequences, 3, torch.Generator().manual_seed(0))
    assert texts.shape == (num_sequences, 3)
    assert texts.dtype == topics.dtype == torch.int64
    expected = language.log_prob(all_texts(3, 3)).exp()
    number = (texts * torch.tensor([9, 3, 1])).sum(dim=1)
    within_5_standard_errors(torch.bincount(number, minlength=27), expected, num_sequences)
    within_5_standard_errors(torch.bincount(topics, minlength=2), language.topic_probs, num_sequences)


def within_5_standard_errors(counts, probs, num_draws):
    standard_error = (probs * (1 - probs) / num_draws).sqrt()
    assert ((counts / num_draws - probs).abs() <= 5 * standard_error).all()


def test_texts_of_a_topic_are_drawn_from_that_topic():
    language = tiny_language()
    texts, topics = language.sample(20_000, 1, torch.Generator().manual_seed(1))
    for topic in range(2):
        of_topic = texts[topics == topic, 0]
        probs = (language.initial_probs @ language.transition_probs @ language.emission_probs)[topic, topic]
        within_5_standard_errors(torch.bincount(of_topic, minlength=3), probs, len(of_topic))


@pytest.mark.parametrize("seed", range(5))
def test_the_topic_of_a_random_language_shows_in_64_symbols(seed):
    language = TopicLanguage.random(4, 3, 16, seed=seed)
    texts, topics = language.sample(1000, 64, torch.Generator().manual_seed(0))
    assert (language.log_joint(texts).argmax(dim=1) == topics).double().mean() > 0.95


def test_the_same_seeds_give_the_same_language_and_samples():
    draws = [TopicLanguage.random(2, 2, 3, seed=0).sample(5, 7, torch.Generator().manual_seed(2)) for _ in range(2)]
    assert draws[0][0].equal(draws[1][0])
    assert not TopicLanguage.random(2, 2, 3, seed=1).emission_probs.equal(
        TopicLanguage.random(2, 2, 3, seed=0).emission_probs
    )


def test_the_uniform_language_spends_log_v_on_every_token():
    language = UniformLanguage(3)
    assert language.log_prob(all_texts(3, 4)).exp().sum().item() == pytest.approx(1, abs=1e-12)
    texts = language.sample(20_000, 1, torch.Generator().manual_seed(0))
    within_5_standard_errors(torch.bincount(texts[:, 0], minlength=3), torch.full((3,), 1 / 3), 20_000)


def test_the_unigram_language_spends_what_the_polya_urn_does():
    """Symbol by symbol: the next one has probability (a + its count) / (V a + all counts) (Johnson et al. 1997)."""
    language = UnigramLanguage(3, concentration=0.4)
    texts = all_texts(3, 4)
    log_prob = language.log_prob(texts)
    assert log_prob.exp().sum().item() == pytest.approx(1)
    for text, value in zip(texts.tolist(), log_prob.tolist(), strict=True):
        expected = math.prod((0.4 + text[:n].count(symbol)) / (1.2 + n) for n, symbol in enumerate(text))
        assert math.exp(value) == pytest.approx(expected)


def test_samples_of_the_unigram_language_have_its_probabilities():
    """100,000 texts of three symbols: a relative frequency has a standard error of at most 0.0016."""
    language = UnigramLanguage(3, concentration=0.4)
    samples = language.sample(100_000, 3, torch.Generator().manual_seed(0))
    counts = torch.bincount((samples * torch.tensor([9, 3, 1])).sum(1), minlength=27)
    assert torch.allclose(counts / 100_000, language.log_prob(all_texts(3, 3)).exp().float(), atol=5 * 0.0016)
    assert samples.equal(language.sample(100_000, 3, torch.Generator().manual_seed(0)))


def test_a_batch_of_synthetic_texts_counts_every_position():
    texts = UniformLanguage(5).sample(4, 6, torch.Generator().manual_seed(0))
    batch = token_batch(texts)
    assert batch.tokens.equal(texts)
    assert batch.weights.equal(torch.ones(4, 6))
    assert batch.sequence_ids.tolist() == [0, 1, 2, 3]
    assert batch.num_bytes.tolist() == [6, 6, 6, 6]

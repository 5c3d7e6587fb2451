"""The likelihood: it is a probability distribution over texts, and generation draws from it.

Most tests enumerate every text of a vocabulary of three tokens and begin-of-text.
"""

import itertools
import math

import numpy as np
import pyro
import pytest
import torch

from ltm_pyro.models import Decoder, DecoderConfig, TokenSequence
from ltm_pyro.models.tokens import log_probs_of_all, log_probs_of_chosen

VOCAB_SIZE, END, BEGIN = 4, 2, 3
LENGTH = 4
# Longer than the window, so that texts are decoded in blocks, and short enough to enumerate.
CONFIG = DecoderConfig(num_layers=2, width=8, num_heads=2, hidden=12, num_slots=2, window=3, length=LENGTH)


@pytest.fixture
def decoder():
    """A decoder in float64 whose texts have unequal probabilities."""
    decoder = Decoder(CONFIG, VOCAB_SIZE).double()
    for weight in decoder.parameters():
        torch.nn.init.normal_(weight, std=0.6)
    return decoder.requires_grad_(False)


def random_z(*batch_shape):
    return torch.randn(*batch_shape, *CONFIG.latent_shape, dtype=torch.float64)


def random_tokens(*shape):
    return torch.randint(VOCAB_SIZE - 1, shape)


def all_sequences(length=LENGTH):
    return torch.tensor(list(itertools.product(range(VOCAB_SIZE - 1), repeat=length)))


def all_texts(length=LENGTH):
    """Texts that end within the length, filled with end-of-text, and those that have not ended there."""
    texts = [
        (*body, *[END] * (length - ended))
        for ended in range(length)
        for body in itertools.product((0, 1), repeat=ended)
    ]
    return torch.tensor([*texts, *itertools.product((0, 1), repeat=length)])


def naive_token_log_probs(decoder, tokens_NT, z_NLSD):
    """log p of each token of N texts, [N, T], each from the decoder's logits on the tokens before it alone."""
    log_probs = []
    begun = torch.cat([torch.full((len(tokens_NT), 1), BEGIN), tokens_NT], dim=1)
    for n in range(tokens_NT.shape[1]):
        logits = decoder.logits(decoder(begun[:, : n + 1], z_NLSD))[:, -1].numpy()
        chosen = logits[np.arange(len(logits)), tokens_NT[:, n]]
        log_probs.append(chosen - np.log(np.exp(logits).sum(1)))
    return np.stack(log_probs, axis=1)


def test_probabilities_of_all_sequences_sum_to_one_when_every_position_counts(decoder):
    weights = torch.ones(LENGTH, dtype=torch.float64)
    texts = TokenSequence(decoder, random_z(), END, LENGTH, weights)
    assert len(all_sequences()) == 3**LENGTH
    assert texts.log_prob(all_sequences()).exp().sum().item() == pytest.approx(1, abs=1e-12)


def test_probabilities_of_all_texts_that_end_and_all_that_do_not_sum_to_one(decoder):
    texts = TokenSequence(decoder, random_z(), END, LENGTH)
    assert len(all_texts()) == 2 ** (LENGTH + 1) - 1
    assert texts.log_prob(all_texts()).exp().sum().item() == pytest.approx(1, abs=1e-12)


def test_log_prob_is_the_cross_entropy_up_to_and_including_the_first_end_of_text(decoder):
    z = random_z()
    texts = TokenSequence(decoder, z, END, LENGTH)
    expected = naive_token_log_probs(decoder, all_sequences(), z.expand(len(all_sequences()), -1, -1, -1))
    np.testing.assert_allclose(texts.token_log_probs(all_sequences()).numpy(), expected, rtol=1e-11, atol=1e-11)
    for tokens, log_prob, log_probs in zip(all_sequences(), texts.log_prob(all_sequences()), expected, strict=True):
        ends = [n for n, token in enumerate(tokens.tolist()) if token == END]
        predicted = ends[0] + 1 if ends else LENGTH
        assert log_prob.item() == pytest.approx(log_probs[:predicted].sum(), abs=1e-11)


def test_weights_multiply_the_cross_entropy_of_each_position(decoder):
    z = random_z(3)
    tokens = random_tokens(3, LENGTH)
    tokens[0] = END
    weights = torch.tensor([[0.0, 1.0, 1.0, 0.0], [0.5, 0.0, 4.0, 1.0], [0.25, 1.5, 0.0, 3.0]], dtype=torch.float64)
    expected = (naive_token_log_probs(decoder, tokens, z) * weights.numpy()).sum(1)
    log_prob = TokenSequence(decoder, z, END, LENGTH, weights).log_prob(tokens)
    np.testing.assert_allclose(log_prob.numpy(), expected, rtol=1e-11, atol=1e-11)


def test_what_stands_in_the_padding_changes_neither_log_prob_nor_its_gradient(decoder):
    length = 9
    num_tokens = torch.tensor([0, 1, 5, 9])
    is_padding = torch.arange(length) >= num_tokens[:, None]
    weights = (~is_padding).double()
    z = random_z(4).requires_grad_()
    tokens = random_tokens(4, length)
    texts = TokenSequence(decoder, z, END, length, weights)
    log_prob = texts.log_prob(tokens)
    (gradient,) = torch.autograd.grad(log_prob.sum(), z)
    assert log_prob[0] == 0
    assert (log_prob[1:] < 0).all()
    for shift in (1, 2):
        log_prob_of_other = texts.log_prob(torch.where(is_padding, (tokens + shift) % (VOCAB_SIZE - 1), tokens))
        assert torch.equal(log_prob_of_other, log_prob)
        (gradient_of_other,) = torch.autograd.grad(log_prob_of_other.sum(), z)
        torch.testing.assert_close(gradient_of_other, gradient, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("log_probs", [log_probs_of_chosen, log_probs_of_all])
def test_hidden_states_of_padding_have_no_part_in_what_is_summed(decoder, log_probs):
    """Both ways, that of a CPU and that of a device, against the decoder's logits."""
    is_chosen, tokens = torch.tensor([[True, True, False], [False, True, False]]), random_tokens(2, 3)
    hidden = torch.randn(2, 3, CONFIG.width, dtype=torch.float64)
    expected = decoder.logits(hidden).log_softmax(-1).gather(-1, tokens[..., None])[..., 0]
    for filling in (0.0, math.nan, math.inf):
        filled = hidden.where(is_chosen[..., None], filling).requires_grad_()
        found = log_probs(decoder, filled, tokens, is_chosen)
        torch.testing.assert_close(found[is_chosen], expected[is_chosen])
        assert found.isfinite().all()
        (gradient,) = torch.autograd.grad((found * is_chosen).sum(), filled)
        assert gradient.isfinite().all()
        assert not gradient[~is_chosen].any()
        assert gradient[is_chosen].any(-1).all()


def test_without_weights_what_follows_the_first_end_of_text_counts_nothing(decoder):
    texts = TokenSequence(decoder, random_z(), END, 6)
    endings = torch.tensor([[0, END, *ending] for ending in itertools.product(range(3), repeat=4)])
    log_probs = texts.log_prob(endings)
    assert torch.equal(log_probs, log_probs[0].expand_as(log_probs))


def test_log_prob_of_a_token_does_not_depend_on_later_tokens(decoder):
    length = 9
    texts = TokenSequence(decoder, random_z(2), END, length)
    tokens = random_tokens(2, length)
    before = texts.token_log_probs(tokens)
    for n in range(length - 1):
        changed = tokens.clone()
        changed[:, n + 1 :] = (changed[:, n + 1 :] + 1) % (VOCAB_SIZE - 1)
        after = texts.token_log_probs(changed)
        assert torch.equal(after[:, : n + 1], before[:, : n + 1])
        assert (after[:, n + 1] != before[:, n + 1]).all()


@pytest.mark.parametrize("weighted", [False, True])
def test_outer_dimensions_of_z_equal_a_loop_over_them(decoder, weighted):
    z = random_z(5, 3)
    tokens = random_tokens(3, LENGTH)
    weights = torch.rand(3, LENGTH, dtype=torch.float64) if weighted else None
    texts = TokenSequence(decoder, z, END, LENGTH, weights)
    assert texts.batch_shape == (5, 3)
    assert texts.event_shape == (LENGTH,)
    looped = torch.stack([TokenSequence(decoder, one, END, LENGTH, weights).log_prob(tokens) for one in z])
    torch.testing.assert_close(texts.log_prob(tokens), looped, rtol=1e-12, atol=1e-12)
    assert texts.token_log_probs(tokens).shape == (5, 3, LENGTH)


def test_log_prob_of_more_texts_than_batch_dimensions_equals_a_loop_over_them(decoder):
    texts = TokenSequence(decoder, random_z(3), END, LENGTH)
    tokens = random_tokens(6, 3, LENGTH)
    looped = torch.stack([texts.log_prob(one) for one in tokens])
    torch.testing.assert_close(texts.log_prob(tokens), looped, rtol=1e-12, atol=1e-12)


def test_log_prob_of_a_text_does_not_depend_on_its_batch_mates(decoder):
    z = random_z(6)
    tokens = random_tokens(6, LENGTH)
    together = TokenSequence(decoder, z, END, LENGTH).log_prob(tokens)
    alone = torch.stack([TokenSequence(decoder, z[b], END, LENGTH).log_prob(tokens[b]) for b in range(6)])
    torch.testing.assert_close(together, alone, rtol=1e-12, atol=1e-12)
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    permuted = TokenSequence(decoder, z[order], END, LENGTH).log_prob(tokens[order])
    torch.testing.assert_close(permuted, together[order], rtol=1e-12, atol=1e-12)


def test_expanded_texts_have_the_log_prob_of_the_original(decoder):
    weights = torch.rand(3, LENGTH, dtype=torch.float64)
    tokens = random_tokens(3, LENGTH)
    for texts in (
        TokenSequence(decoder, random_z(3), END, LENGTH, weights),
        TokenSequence(decoder, random_z(3), END, LENGTH),
    ):
        expanded = texts.expand(torch.Size([2, 3]))
        assert (expanded.batch_shape, expanded.event_shape) == ((2, 3), (LENGTH,))
        expected = texts.log_prob(tokens).expand(2, 3)
        torch.testing.assert_close(expanded.log_prob(tokens), expected, rtol=1e-12, atol=1e-12)
        assert expanded.sample().shape == (2, 3, LENGTH)
        assert expanded.sample((5,)).shape == (5, 2, 3, LENGTH)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_log_prob_is_summed_at_least_in_float32(decoder, dtype):
    texts = TokenSequence(decoder.to(dtype), random_z(2), END, LENGTH)
    assert texts.log_prob(random_tokens(2, LENGTH)).dtype == torch.promote_types(dtype, torch.float32)


def test_frequencies_of_generated_texts_are_their_probabilities(decoder):
    num_draws = 8_000
    texts = TokenSequence(decoder, random_z(2), END, LENGTH)
    drawn = texts.sample((num_draws,))
    assert drawn.shape == (num_draws, 2, LENGTH)
    probabilities = texts.log_prob(all_texts()[:, None]).exp()
    # Were both z's texts alike, drawing from the wrong z would go unseen.
    assert (probabilities[:, 0] - probabilities[:, 1]).abs().max() > 0.05
    total = 0
    for text, probability in zip(all_texts(), probabilities, strict=True):
        counts = (drawn == text).all(-1).sum(0)
        total += counts
        standard_error = (num_draws * probability * (1 - probability)).sqrt()
        # A count has no normal tail where fewer than one is expected: one more is granted.
        assert ((counts - num_draws * probability).abs() < 5 * standard_error + 1).all(), text
    # Each text that was drawn is one of those: after its end it holds end-of-text alone.
    assert total.tolist() == [num_draws, num_draws]


def test_begin_of_text_is_never_drawn_however_well_it_would_fit(decoder):
    # The hidden state behind begin-of-text points along its embedding: its logit would be by far the largest.
    decoder.embedding.weight[BEGIN] = 1_000.0
    decoder.final_norm.weight.fill_(1.0)
    hidden = decoder(torch.tensor([[BEGIN]]), random_z(1))
    assert (decoder.embedding.weight @ hidden[0, 0]).argmax() == BEGIN
    drawn = TokenSequence(decoder, random_z(500), END, LENGTH).sample()
    assert drawn.max() < BEGIN
    assert drawn.min() >= 0


def test_generation_is_reproducible_from_pyros_seed(decoder):
    texts = TokenSequence(decoder, random_z(50), END, LENGTH)
    pyro.set_rng_seed(7)
    first = texts.sample()
    second = texts.sample()
    pyro.set_rng_seed(7)
    assert torch.equal(texts.sample(), first)
    assert not torch.equal(first, second)


def test_generation_records_no_gradient(decoder):
    decoder.requires_grad_(True)
    recorded = []
    decoder.final_norm.register_forward_hook(lambda module, inputs, hidden: recorded.append(hidden.requires_grad))
    texts = TokenSequence(decoder, random_z(50).requires_grad_(), END, LENGTH)
    texts.sample()
    assert len(recorded) == LENGTH
    assert not any(recorded)


def test_support_is_every_token_but_begin_of_text(decoder):
    support = TokenSequence(decoder, random_z(), END, LENGTH).support
    assert support.check(all_sequences()).all()
    for outside in (BEGIN, -1):
        assert not support.check(torch.tensor([0, 1, outside, END]))


@pytest.mark.parametrize("shape", [(2, 8), (3, 2, 8), (2, 3, 8), (2, 2, 4), (5, 2, 2, 9)])
def test_thought_vectors_of_another_shape_than_the_decoders_are_refused(decoder, shape):
    with pytest.raises(ValueError, match="their last dimensions must be"):
        TokenSequence(decoder, torch.zeros(shape, dtype=torch.float64), END, LENGTH)


@pytest.mark.parametrize("dtype", [torch.int32, torch.float32, torch.bool])
def test_tokens_of_another_type_than_int64_are_refused(decoder, dtype):
    texts = TokenSequence(decoder, random_z(), END, LENGTH)
    with pytest.raises(ValueError, match="tokens must be int64"):
        texts.log_prob(torch.zeros(LENGTH, dtype=dtype))


@pytest.mark.parametrize("outside", [BEGIN, VOCAB_SIZE, -1, -100])
@pytest.mark.parametrize("position", [0, LENGTH - 1])
def test_an_id_that_cannot_be_predicted_gets_no_log_prob(decoder, outside, position):
    tokens = torch.zeros(LENGTH, dtype=torch.int64)
    tokens[position] = outside
    with pytest.raises((IndexError, RuntimeError, ValueError), match=r"out of (bounds|range)"):
        TokenSequence(decoder, random_z(), END, LENGTH).log_prob(tokens)


def test_uniform_logits_cost_the_logarithm_of_the_vocabulary_without_begin_of_text(decoder):
    decoder.final_norm.weight.zero_()
    log_prob = TokenSequence(decoder, random_z(), END, LENGTH).log_prob(torch.tensor([0, 1, END, END]))
    assert log_prob.item() == pytest.approx(-3 * math.log(VOCAB_SIZE - 1), abs=1e-12)

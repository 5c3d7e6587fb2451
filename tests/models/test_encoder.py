"""The encoder: its formula, what it sees of a text, and what it is before it has learnt anything.

Shapes: B sequences, T tokens, L layers, S slots, D width.
"""

import dataclasses
import math

import numpy as np
import pytest
import torch

from ltm_pyro.models import Decoder, DecoderConfig, LatentThoughtModel, TokenBatch
from ltm_pyro.models.encoder import REMEMBER, Encoder, RecurrentEncoder

TOY = DecoderConfig(num_layers=2, width=12, num_heads=3, hidden=10, num_slots=3, window=4, length=11, encoder_layers=2)


def sharp_encoder():
    """An encoder in float64 with weights so large that every input matters."""
    encoder = Encoder(TOY).double()
    for weight in encoder.parameters():
        torch.nn.init.normal_(weight, std=0.5)
    return encoder


def random_inputs(batch_size=3):
    """Embedded tokens and weights: some 0, some fractions, some above 1; all of the last text are 0."""
    weights_BT = 2 * torch.rand(batch_size, TOY.length, dtype=torch.float64)
    weights_BT[torch.rand(batch_size, TOY.length) < 0.3] = 0
    weights_BT[-1] = 0
    return torch.randn(batch_size, TOY.length, TOY.width, dtype=torch.float64), weights_BT


def rms_normed(x, weight):
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-5) * weight


def turned(x_NK):
    """Rotary positions by complex multiplication."""
    half = x_NK.shape[1] // 2
    angles = np.outer(np.arange(len(x_NK)), 10_000.0 ** (-np.arange(half) / half))
    complex_NK = (x_NK[:, :half] + 1j * x_NK[:, half:]) * np.exp(1j * angles)
    return np.concatenate([complex_NK.real, complex_NK.imag], axis=1)


def naive_proposal(weights, tokens_TD, weights_T):
    """Mean and log scale in numpy for one text: loops over layers, heads and positions, and weights as factors."""
    queries = weights["queries.weight"]
    x = np.concatenate([queries, tokens_TD])
    factors = np.concatenate([np.ones(len(queries)), weights_T])
    size = TOY.width // TOY.num_heads
    for layer in range(TOY.encoder_layers):
        weight = {
            name.removeprefix(f"blocks.{layer}.").removesuffix(".weight"): value
            for name, value in weights.items()
            if name.startswith(f"blocks.{layer}.")
        }
        q, k, v = np.split(
            rms_normed(x, weight["self_attention_norm"]) @ weight["self_attention.query_key_value"].T, 3, 1
        )
        seen = np.zeros_like(x)
        for head in (slice(h * size, (h + 1) * size) for h in range(TOY.num_heads)):
            keys, queries_of_head = turned(k[:, head]), turned(q[:, head])
            for n in range(len(x)):
                attention = factors * np.exp(keys @ queries_of_head[n] / math.sqrt(size))
                seen[n, head] = attention @ v[:, head] / attention.sum()
        x = x + seen @ weight["self_attention.output"].T
        gate, up = np.split(rms_normed(x, weight["feed_forward_norm"]) @ weight["feed_forward.gate_up"].T, 2, 1)
        x = x + (gate / (1 + np.exp(-gate)) * up) @ weight["feed_forward.output"].T
    proposed = rms_normed(x[: len(queries)], weights["final_norm.weight"]) @ weights["head.weight"].T
    return [part.reshape(TOY.latent_shape) for part in np.split(proposed, 2, 1)]


def proposals(encoder, x_BTD, weights_BT):
    """Mean and log scale, [2, B, L, S, D]."""
    with torch.no_grad():
        return torch.stack(encoder(x_BTD, weights_BT))


def test_proposals_equal_an_implementation_in_loops():
    encoder = sharp_encoder()
    x_BTD, weights_BT = random_inputs()
    weights = {name: value.numpy() for name, value in encoder.state_dict().items()}
    pairs = zip(x_BTD.numpy(), weights_BT.numpy(), strict=True)
    expected = np.stack([naive_proposal(weights, *pair) for pair in pairs], axis=1)
    # All is float64 but the rotation angles of 17 positions; proposals are of the size of 2.
    np.testing.assert_allclose(
        proposals(encoder, x_BTD, weights_BT).numpy(), expected, rtol=0, atol=2 * 17 * np.finfo(np.float32).eps
    )


def test_tokens_that_weigh_nothing_have_no_influence_at_all():
    """Bit for bit; and no gradient goes to them."""
    encoder = sharp_encoder()
    x_BTD, weights_BT = random_inputs()
    other_BTD = torch.where(weights_BT[..., None] == 0, 100 * torch.randn_like(x_BTD), x_BTD)
    assert proposals(encoder, x_BTD, weights_BT).equal(proposals(encoder, other_BTD, weights_BT))
    x_BTD.requires_grad_()
    sum(part.square().sum() for part in encoder(x_BTD, weights_BT)).backward()
    is_seen = weights_BT > 0
    assert (x_BTD.grad[~is_seen] == 0).all()
    assert (x_BTD.grad[is_seen] != 0).any(-1).all()


def test_neither_padding_nor_batch_mates_nor_their_order_matter():
    encoder = sharp_encoder()
    x_BTD, weights_BT = random_inputs()
    expected = proposals(encoder, x_BTD, weights_BT)
    padded_BTD = torch.cat([x_BTD, torch.randn(3, 5, TOY.width, dtype=torch.float64)], 1)
    padded = proposals(encoder, padded_BTD, torch.nn.functional.pad(weights_BT, (0, 5)))
    torch.testing.assert_close(padded, expected, rtol=0, atol=1e-12)
    for index in ([2, 0, 1], [1], [0, 2]):
        torch.testing.assert_close(
            proposals(encoder, x_BTD[index], weights_BT[index]), expected[:, index], rtol=0, atol=1e-12
        )


def test_of_a_text_that_is_not_seen_it_says_the_same_whatever_it_is():
    encoder = sharp_encoder()
    x_BTD, weights_BT = random_inputs()
    mean, log_scale = encoder(x_BTD, torch.zeros_like(weights_BT))
    for part in (mean, log_scale):
        assert part.isfinite().all()
        torch.testing.assert_close(part, part[:1].expand_as(part), rtol=0, atol=1e-12)
    (mean.sum() + log_scale.sum()).backward()
    assert all(weight.grad.isfinite().all() for weight in encoder.parameters())


def test_a_token_that_weighs_little_has_little_influence():
    encoder = sharp_encoder()
    x_BTD, _ = random_inputs()
    ones_BT = torch.ones(3, TOY.length, dtype=torch.float64)

    def with_first(weight):
        weights_BT = ones_BT.clone()
        weights_BT[:, 0] = weight
        return proposals(encoder, x_BTD, weights_BT)

    unseen = with_first(0.0)
    assert (with_first(1e-9) - unseen).abs().max() < 1e-6
    assert (with_first(1.0) - unseen).abs().max() > 1e-2


def test_the_order_of_tokens_and_the_place_of_a_slot_matter():
    encoder = sharp_encoder()
    x_BTD, _ = random_inputs()
    ones_BT = torch.ones(3, TOY.length, dtype=torch.float64)
    forwards, backwards = proposals(encoder, x_BTD, ones_BT), proposals(encoder, x_BTD.flip(1), ones_BT)
    assert (forwards - backwards).abs().max() > 0.1
    slots = forwards.flatten(2, 3)
    assert torch.pdist(slots[0, 0]).min() > 0.1


def test_it_runs_in_bfloat16():
    """To the three digits that it has, which some twenty operations wear down to one or two."""
    encoder = sharp_encoder()
    x_BTD, weights_BT = random_inputs()
    expected = proposals(encoder, x_BTD, weights_BT)
    rough = proposals(encoder.bfloat16(), x_BTD.bfloat16(), weights_BT)
    assert rough.dtype == torch.bfloat16
    assert (rough - expected).abs().mean() < 0.05 * expected.abs().mean()


# --- before it has learnt


def test_weights_start_as_those_of_the_decoder_but_for_the_head():
    config = dataclasses.replace(TOY, width=96, hidden=160, encoder_layers=3)
    encoder = Encoder(config)
    for name, weight in encoder.named_parameters():
        if "norm" in name:
            assert weight.eq(1).all(), name
        elif name == "head.weight":
            assert weight.eq(0).all()
        else:
            # Each of 3 layers ends in the residual stream twice.
            scale = 0.02 / math.sqrt(6) if name.endswith(".output.weight") else 0.02
            assert weight.std().item() == pytest.approx(scale, rel=5 / math.sqrt(2 * weight.numel())), name


def random_batch():
    tokens = torch.randint(6, (3, TOY.length))
    weights = (torch.arange(TOY.length) < torch.tensor([11, 4, 0])[:, None]).float()
    return TokenBatch(tokens, weights, torch.arange(3), torch.ones(3, dtype=torch.int64))


def test_untrained_it_proposes_the_prior_exactly():
    model = LatentThoughtModel(TOY, vocab_size=7, end_of_text=5)
    for part in model.encode(random_batch()):
        assert part.shape == (3, *TOY.latent_shape)
        assert part.eq(0).all()


def test_a_model_without_an_encoder_is_what_it_was_and_the_decoder_is_the_same_with_one():
    torch.manual_seed(1)
    decoder = Decoder(TOY, 7)
    after = torch.random.get_rng_state()
    torch.manual_seed(1)
    without = LatentThoughtModel(dataclasses.replace(TOY, encoder_layers=0), vocab_size=7, end_of_text=5)
    assert torch.random.get_rng_state().equal(after)
    torch.manual_seed(1)
    model = LatentThoughtModel(TOY, vocab_size=7, end_of_text=5)
    expected = {f"decoder.{name}": weight for name, weight in decoder.state_dict().items()}
    assert without.state_dict().keys() == expected.keys()
    added = model.state_dict().keys() - expected.keys()
    assert added == {f"encoder.{name}" for name in model.encoder.state_dict()}
    for name, weight in expected.items():
        assert without.state_dict()[name].equal(weight), name
        assert model.state_dict()[name].equal(weight), name


# --- in the model


@pytest.mark.parametrize(
    ("computed_in", "expected"),
    [(torch.bfloat16, torch.float32), (torch.float32, torch.float32), (torch.float64, torch.float64)],
)
def test_the_model_encodes_in_at_least_float32(computed_in, expected):
    model = LatentThoughtModel(TOY, vocab_size=7, end_of_text=5).to(computed_in)
    assert [part.dtype for part in model.encode(random_batch())] == [expected] * 2


def test_the_model_embeds_tokens_as_its_decoder_does():
    model = LatentThoughtModel(TOY, vocab_size=7, end_of_text=5).double()
    torch.nn.init.normal_(model.encoder.head.weight)
    batch = random_batch()
    x_BTD = model.decoder.embedding.weight[batch.tokens]
    assert torch.stack(model.encode(batch)).equal(torch.stack(model.encoder(x_BTD, batch.weights)))
    sum(part.square().sum() for part in model.encode(batch)).backward()
    for name, weight in [*model.encoder.named_parameters(), ("embedding", model.decoder.embedding.weight)]:
        assert weight.grad.abs().max() > 0, name


def test_a_model_without_an_encoder_says_so():
    model = LatentThoughtModel(dataclasses.replace(TOY, encoder_layers=0), vocab_size=7, end_of_text=5)
    with pytest.raises(ValueError, match="no encoder"):
        model.encode(random_batch())


# --- one that reads blocks

READER = dataclasses.replace(TOY, encoder_layers=1, encoder_reads="block")


def sharp_reader():
    encoder = RecurrentEncoder(READER).double()
    for weight in encoder.parameters():
        if weight.dim() == 2:
            torch.nn.init.normal_(weight, std=0.5)
    return encoder


def random_block(batch_size=3):
    """Hidden states, errors, weights (those of the last text are 0), and the mean and log scale before."""
    x_BTD, weights_BT = random_inputs(batch_size)
    before = torch.randn(2, batch_size, *TOY.latent_shape, dtype=torch.float64)
    return x_BTD, torch.randn_like(x_BTD), weights_BT, *before


def naive_update(weights, hidden_TD, error_TD, weights_T, mean, log_scale):
    """In numpy for one text that has a token: loops over slots and heads."""
    size = TOY.width // TOY.num_heads
    mean, log_scale = (part.reshape(-1, TOY.width) for part in (mean, log_scale))
    updated = np.zeros((2, *mean.shape))
    for slot in range(len(mean)):
        state = weights["slots.weight"][slot]
        state = state + weights["posterior.weight"] @ np.concatenate([mean[slot], log_scale[slot]])
        query = weights["query.weight"] @ rms_normed(state, weights["slot_norm.weight"])
        attended = np.zeros(TOY.width)
        for head in (slice(h * size, (h + 1) * size) for h in range(TOY.num_heads)):
            total, value = 1.0, np.zeros(size)  # the key that stands for nothing has logit 0 and value 0
            for hidden, error, factor in zip(hidden_TD, error_TD, weights_T, strict=True):
                key = (weights["key.weight"] @ hidden)[head]
                # Both have a root mean square of 1; torch adds the machine epsilon to its square.
                logit = (query[head] / np.sqrt((query[head] ** 2).mean())) @ (key / np.sqrt((key**2).mean()))
                factor = factor * np.exp(weights["sharpness"] * logit / math.sqrt(size))
                total += factor
                value += factor * (weights["value.weight"] @ rms_normed(error, weights["error_norm.weight"]))[head]
            attended[head] = value / total
        candidates = np.split(weights["head.weight"] @ rms_normed(attended, weights["final_norm.weight"]), 3)
        share = 1 / (1 + np.exp(weights["remember"] - candidates[2]))
        for part, (old, new) in enumerate([(mean[slot], candidates[0]), (log_scale[slot], candidates[1])]):
            updated[part, slot] = (1 - share) * old + share * new
    return updated.reshape(2, *TOY.latent_shape)


def test_updates_equal_an_implementation_in_loops():
    encoder, inputs = sharp_reader(), random_block()
    with torch.no_grad():
        found = torch.stack(encoder(*inputs))
    weights = {name: value.numpy() for name, value in encoder.state_dict().items()}
    for text in range(2):
        expected = naive_update(weights, *(part[text].numpy() for part in inputs))
        np.testing.assert_allclose(found[:, text].numpy(), expected, rtol=1e-10, atol=1e-12)


def test_a_text_that_is_not_read_stays_as_it_was_and_its_gradients_are_finite():
    encoder, (hidden, error, weights_BT, mean, log_scale) = sharp_reader(), random_block()
    found = encoder(hidden, error, weights_BT, mean, log_scale)
    for part, before in zip(found, (mean, log_scale), strict=True):
        assert part[-1].equal(before[-1])
        assert not part[0].equal(before[0])
    empty = encoder(hidden[:, :0], error[:, :0], weights_BT[:, :0], mean, log_scale)
    assert empty[0].equal(mean)
    assert empty[1].equal(log_scale)
    sum(part.square().sum() for part in (*found, *empty)).backward()
    assert all(weight.grad.isfinite().all() for weight in encoder.parameters())


def test_tokens_of_a_block_that_weigh_nothing_have_no_influence_at_all():
    encoder, (hidden, error, weights_BT, mean, log_scale) = sharp_reader(), random_block()
    unseen = weights_BT[..., None] == 0
    others = (torch.where(unseen, 100 * torch.randn_like(x), x) for x in (hidden, error))
    expected = encoder(hidden, error, weights_BT, mean, log_scale)
    for part, other in zip(expected, encoder(*others, weights_BT, mean, log_scale), strict=True):
        assert part.equal(other)


def test_untrained_it_remembers_and_tells_texts_apart():
    """The scale stays that of the prior; of the mean before, the share that the gates begin with stays."""
    torch.manual_seed(0)
    config = dataclasses.replace(READER, width=48, num_heads=3)
    encoder = RecurrentEncoder(config)
    zeros = torch.zeros(2, *config.latent_shape)
    hidden, error = torch.randn(2, 2, 40, 48)
    mean, log_scale = encoder(hidden, error, torch.ones(2, 40), zeros, zeros)
    assert log_scale.eq(0).all()
    assert (mean[0] - mean[1]).abs().mean() > 0.05
    later, _ = encoder(hidden, error, torch.ones(2, 40), zeros + 100, zeros)
    share = 1 / (1 + math.exp(-REMEMBER))
    torch.testing.assert_close(later, torch.full_like(later, 100 * share), rtol=0.02, atol=0)


@pytest.mark.parametrize("prior", ["standard", "affine"])
def test_the_model_reads_a_block_by_what_its_decoder_predicted_there(prior):
    """On whole texts, with probabilities written out; a block of them is cut to what it needs."""
    config = dataclasses.replace(READER, prior=prior, window=3)
    model = LatentThoughtModel(config, vocab_size=7, end_of_text=5).double()
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.4)
    batch = random_batch()
    batch = batch.with_weights(batch.weights.double())
    mean, log_scale = torch.randn(2, 3, *TOY.latent_shape, dtype=torch.float64)
    with torch.no_grad():
        hidden = model.decoder(model.decoder.inputs(batch.tokens), model.prior.thoughts(mean))
        vectors = model.decoder.embedding.weight
        probabilities = (hidden @ vectors[:6].T).softmax(-1)
        error = vectors[batch.tokens] - torch.einsum("btv,vd->btd", probabilities, vectors[:6])
        weights = batch.weights * ((torch.arange(TOY.length) >= 6) & (torch.arange(TOY.length) < 10))
        expected = model.encoder(hidden, error, weights, mean, log_scale)
        found = model.encode(batch.block(6, 10, model.reach), mean, log_scale)
    for part, other in zip(found, expected, strict=True):
        torch.testing.assert_close(part, other, rtol=1e-9, atol=1e-12)
    assert not found[0][0].equal(mean[0])
    assert found[0][1].equal(mean[1])


def test_a_model_whose_encoder_reads_texts_cannot_go_on():
    model = LatentThoughtModel(TOY, vocab_size=7, end_of_text=5)
    zeros = torch.zeros(3, *TOY.latent_shape)
    with pytest.raises(ValueError, match="reads whole texts"):
        model.encode(random_batch(), zeros, zeros)

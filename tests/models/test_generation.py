"""Generation: what is remembered of a text changes nothing, and tokens are drawn as the settings say.

Shapes: B texts, T tokens, L layers, S slots, D width, V vocabulary.
"""

import dataclasses
import itertools
import math

import numpy as np
import pytest
import torch

from ltm_pyro.errors import RunError
from ltm_pyro.evaluation import operations
from ltm_pyro.models import Decoder, DecoderConfig, Sampling, TokenSequence, generate, generation, vector_products
from ltm_pyro.models.generation import stream

TOY = DecoderConfig(num_layers=3, width=12, num_heads=3, hidden=10, num_slots=2, window=4, length=11)
VOCAB_SIZE, END, BEGIN = 7, 5, 6
CONFIGS = [
    TOY,
    dataclasses.replace(TOY, window=1),
    dataclasses.replace(TOY, num_layers=1, window=5, num_slots=0),
    dataclasses.replace(TOY, thoughts="fast-weights"),
]
# None, shorter than the window, longer than it, and longer than any layer can see (10 inputs with TOY).
PROMPTS = [[], [3], [0, 1, 2, 3, 4, 0], [0, 3, 1, 1, 2, 4, 0, 0, 1, 4, 3, 2, 2, 0, 4, 3]]
GREEDY = Sampling(temperature=0)


def sharp_decoder(config=TOY, vocab_size=VOCAB_SIZE):
    """A decoder in float64 with weights so large that every input matters."""
    decoder = Decoder(config, vocab_size).double()
    for weight in decoder.parameters():
        torch.nn.init.normal_(weight, std=0.5)
    return decoder.requires_grad_(False)


def random_z(decoder, batch_size):
    return torch.randn(batch_size, *decoder.config.latent_shape, dtype=torch.float64)


def naive_greedy(decoder, z_LSD, prompt, num_tokens, end):
    """One text, all of it read again for every token."""
    tokens = list(prompt)
    for _ in range(num_tokens):
        logits_TV = decoder.logits(decoder(torch.tensor([[decoder.begin_of_text, *tokens]]), z_LSD[None]))[0]
        tokens.append(int(logits_TV[-1].argmax()))
        if tokens[-1] == end:
            break
    written = tokens[len(prompt) :]
    return written + [end] * (num_tokens - len(written))


@pytest.mark.parametrize("config", CONFIGS)
def test_texts_are_those_that_reading_all_of_them_for_every_token_gives(config, monkeypatch):
    num_tokens, num_ended = 24, 0
    monkeypatch.setattr(vector_products, "WORTH_A_COPY", num_tokens)  # the output layer is the one for many tokens
    for _ in range(3):
        decoder = sharp_decoder(config)
        z = random_z(decoder, len(PROMPTS))
        written = generate(decoder, z, END, num_tokens, PROMPTS, GREEDY)
        expected = [naive_greedy(decoder, *pair, num_tokens, END) for pair in zip(z, PROMPTS, strict=True)]
        assert written.tolist() == expected
        num_ended += sum(END in row for row in expected)
    assert 0 < num_ended < 3 * len(PROMPTS)  # both were tried: texts that end, and that go on beyond the window


@pytest.mark.parametrize("config", CONFIGS)
def test_log_probs_step_by_step_are_those_of_teacher_forcing(config):
    decoder = sharp_decoder(config)
    num_read, length = torch.tensor([1, 2, 7, 5]), 40
    z = random_z(decoder, 4)
    tokens = torch.randint(VOCAB_SIZE - 1, (4, length))
    hidden, memory = decoder.read(decoder.inputs(tokens)[:, :7], num_read, z, num_steps=length - 7)
    expected = TokenSequence(decoder, z, END, length).token_log_probs(tokens)
    for step in range(length - 7):
        position = num_read - 1 + step
        here = tokens.gather(1, position[:, None])
        log_probs = decoder.logits(hidden).log_softmax(-1).gather(1, here)
        torch.testing.assert_close(log_probs, expected.gather(1, position[:, None]), rtol=1e-11, atol=1e-11)
        hidden = decoder.step(here[:, 0], memory)


def test_what_stands_behind_a_short_prompt_is_not_seen():
    decoder = sharp_decoder()
    z = random_z(decoder, 2)
    num_read = torch.tensor([2, 6])
    inputs = torch.randint(VOCAB_SIZE, (2, 6))
    changed = inputs.clone()
    changed[0, 2:] = (changed[0, 2:] + 1) % VOCAB_SIZE
    (first, memory), (same, other_memory) = (decoder.read(x, num_read, z, 9) for x in (inputs, changed))
    assert torch.equal(first, same)
    for token in torch.randint(VOCAB_SIZE - 1, (9, 2)):
        assert torch.equal(decoder.step(token, memory), decoder.step(token, other_memory))


@pytest.mark.parametrize("config", CONFIGS)
def test_of_a_prompt_exactly_what_some_layer_sees_is_read(config):
    decoder = sharp_decoder(config)
    z = random_z(decoder, 1)
    inputs = torch.randint(VOCAB_SIZE, (1, 25))
    expected = decoder(inputs, z)[:, -1]
    found, one_less = (
        decoder.read(inputs[:, -number:], torch.tensor([number]), z, 0)[0]
        for number in (decoder.reach, max(1, decoder.reach - 1))
    )
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)
    assert decoder.reach == 1 or (one_less - expected).abs().max() > 1e-9
    read = []
    decoder.embedding.register_forward_hook(lambda module, inputs, output: read.append(output.shape[1]))
    generate(decoder, z, END, 1, [[1] * 24])
    assert read == [decoder.reach]


def test_a_token_costs_the_same_wherever_it_stands():
    decoder = sharp_decoder().float()
    z = random_z(decoder, 2).float()
    calls = []
    for block in decoder.blocks:
        block.cross_attention.key_value.register_forward_hook(lambda *args: calls.append(args))
    _, memory = decoder.read(torch.full((2, 1), BEGIN), torch.ones(2, dtype=torch.int64), z, num_steps=200)
    token = torch.tensor([1, 2])
    costs, sizes = set(), set()
    for _ in range(10):
        for _ in range(19):
            decoder.step(token, memory)
        costs.add(operations.count(lambda: decoder.step(token, memory)))
        sizes |= {x.shape[2] for block in memory.blocks for x in (block.ring.k_BHRK, block.ring.v_BHRK)}
    assert memory.num_read_B.tolist() == [201, 201]
    assert len(costs) == 1
    assert min(costs) > 0
    assert sizes == {TOY.window}
    assert len(calls) == TOY.num_layers  # keys and values of z, once a layer


def test_in_bfloat16_steps_say_what_reading_at_once_says():
    torch.manual_seed(0)
    decoder = Decoder(DecoderConfig(), 258)
    for weight in decoder.parameters():
        if weight.dim() > 1:
            torch.nn.init.normal_(weight, std=weight.shape[1] ** -0.5)
    decoder.compute_dtype = torch.bfloat16
    tokens, z = torch.randint(256, (4, 100)), torch.randn(4, *decoder.config.latent_shape)
    with torch.no_grad():
        expected = decoder(decoder.inputs(tokens), z)
        hidden, memory = decoder.read(decoder.inputs(tokens)[:, :90], torch.full((4,), 90), z, num_steps=10)
        found = torch.stack([hidden, *(decoder.step(tokens[:, n], memory) for n in range(89, 99))], dim=1)
    assert found.dtype == torch.float32
    assert (found - expected[:, 89:]).norm() < 0.02 * expected[:, 89:].norm()


def naive_probs(logits, used, sampling):
    """Of the next token, as transformers defines it, in numpy and one token at a time."""
    scores = list(logits)
    for token in used:
        penalty = sampling.repetition_penalty
        scores[token] = scores[token] * penalty if scores[token] < 0 else scores[token] / penalty
    scores = np.array(scores) / sampling.temperature
    best_first = sorted(range(len(scores)), key=lambda token: -scores[token])
    kept = best_first[: sampling.top_k] if sampling.top_k else best_first
    weights = {token: np.exp(scores[token]) for token in kept}
    nucleus, total = [], 0.0
    for token in kept:
        if total < sampling.top_p:
            nucleus.append(token)
        total += weights[token] / sum(weights.values())
    return {token: weights[token] / sum(weights[other] for other in nucleus) for token in nucleus}


def naive_text_probs(decoder, z_LSD, prompt, length, sampling):
    """The probability of every text that can be drawn, from the decoder's logits on all that stands before a token."""
    probs = {(): 1.0}
    for _ in range(length):
        longer = {(*text, END): prob for text, prob in probs.items() if END in text}
        unfinished = [text for text in probs if END not in text]
        if not unfinished:
            probs = longer
            continue
        inputs = torch.tensor([[BEGIN, *prompt, *text] for text in unfinished])
        logits_NV = decoder.logits(decoder(inputs, z_LSD.expand(len(inputs), -1, -1, -1)))[:, -1].numpy()
        for text, logits in zip(unfinished, logits_NV, strict=True):
            for token, factor in naive_probs(logits, {*prompt, *text}, sampling).items():
                longer[*text, token] = probs[text] * factor
        probs = longer
    return probs


SETTINGS = [
    Sampling(),
    Sampling(temperature=0.5),
    Sampling(temperature=1.7),
    Sampling(top_k=1),
    Sampling(top_k=3),
    Sampling(top_k=100),
    Sampling(top_p=0.7),
    Sampling(top_p=1e-9),
    Sampling(repetition_penalty=1.8),
    Sampling(temperature=1.4, top_k=4, top_p=0.75, repetition_penalty=0.6),
]


@pytest.mark.parametrize("sampling", SETTINGS, ids=str)
def test_frequencies_of_texts_are_their_probabilities(sampling):
    num_draws, length, prompts = 2000, 3, [[], [2, 0, 2, 1, 4, 2]]
    decoder = sharp_decoder()
    z = random_z(decoder, 2)
    generator = torch.Generator().manual_seed(1)
    drawn = generate(
        decoder, z.repeat_interleave(num_draws, 0), END, length, [p for p in prompts for _ in range(num_draws)],
        sampling, generator,
    )  # fmt: skip
    for text_draws, z_LSD, prompt in zip(drawn.view(2, num_draws, length), z, prompts, strict=True):
        expected = naive_text_probs(decoder, z_LSD, prompt, length, sampling)
        assert sum(expected.values()) == pytest.approx(1)
        found, counts = np.unique(text_draws.numpy(), axis=0, return_counts=True)
        counts = dict(zip(map(tuple, found.tolist()), counts.tolist(), strict=True))
        assert counts.keys() <= expected.keys()
        for text, prob in expected.items():
            standard_error = np.sqrt(num_draws * prob * (1 - prob))
            # A count has no normal tail where fewer than one is expected: one more is granted.
            assert abs(counts.get(text, 0) - num_draws * prob) < 5 * standard_error + 1, text


def choose(sampling, logits, is_used=False):
    uniform = torch.rand(len(logits), 1, dtype=torch.float64)
    return sampling.choose(logits, torch.full(logits.shape, is_used), uniform)


def test_equally_likely_tokens_are_all_kept_as_transformers_does():
    logits = torch.tensor([[1.0, 3.0, 1.0, 0.0, 1.0]]).expand(500, -1)
    drawn = choose(Sampling(top_k=2), logits)
    assert drawn.unique().tolist() == [0, 1, 2, 4]


@pytest.mark.parametrize("temperature", [1e-6, 1e-40, 1e-320])
def test_near_temperature_0_the_most_likely_token_is_drawn(temperature):
    logits = 40 * torch.randn(50, 5)
    drawn = choose(Sampling(temperature=temperature), logits)
    assert torch.equal(drawn, logits.argmax(-1))


def test_a_generator_makes_texts_reproducible_and_leaves_the_global_one_alone():
    decoder = sharp_decoder()
    z = random_z(decoder, 20)
    before = torch.get_rng_state()
    first, again, other = (
        generate(decoder, z, END, 8, generator=torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)
    )
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_a_text_stops_at_its_end_of_text_and_the_loop_at_the_last_one():
    decoder = sharp_decoder()
    z = random_z(decoder, 6)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.stack(list(stream(decoder, z, END, 500, generator=generator)), dim=1)
    lengths = [row.index(END) + 1 for row in tokens.tolist()]
    assert len(set(lengths)) > 1
    assert tokens.shape[1] == max(lengths)
    for row, length in zip(tokens.tolist(), lengths, strict=True):
        assert set(row[length:]) <= {END}
    padded = generate(decoder, z, END, 500, generator=torch.Generator().manual_seed(0))
    assert torch.equal(padded[:, : max(lengths)], tokens)
    assert (padded[:, max(lengths) :] == END).all()


def test_nothing_is_written_where_nothing_is_asked_for():
    decoder = sharp_decoder()
    assert generate(decoder, random_z(decoder, 2), END, 0, [[1], [2, 3]]).shape == (2, 0)
    assert generate(decoder, random_z(decoder, 0), END, 3).shape == (0, 3)


def test_a_prompt_for_each_z_is_required():
    decoder = sharp_decoder()
    with pytest.raises(ValueError, match="1 prompts need one z each, not 2"):
        generate(decoder, random_z(decoder, 2), END, 3, [[1]])


@pytest.mark.parametrize("outside", [BEGIN, VOCAB_SIZE, -1])
def test_a_prompt_of_ids_that_are_no_text_is_refused(outside):
    decoder = sharp_decoder()
    with pytest.raises(IndexError, match="out of range"):
        generate(decoder, random_z(decoder, 1), END, 3, [[1, outside]])


@pytest.mark.parametrize("outside", [BEGIN, VOCAB_SIZE, -1])
@pytest.mark.parametrize("penalty", [1, 2])
def test_an_id_that_is_no_text_is_refused_wherever_it_stands(outside, penalty):
    decoder = sharp_decoder()
    with pytest.raises(IndexError, match="out of range"):
        generate(decoder, random_z(decoder, 1), END, 3, [[outside, *[1] * 40]], Sampling(repetition_penalty=penalty))


@pytest.mark.parametrize(
    ("settings", "mentioned"),
    [
        ({"temperature": -0.1}, "temperature must be at least 0"),
        ({"temperature": float("nan")}, "temperature must be at least 0"),
        ({"temperature": float("inf")}, "temperature must be at least 0"),
        ({"top_k": -1}, "top_k must be a whole number"),
        ({"top_p": 0.0}, "top_p must be above 0"),
        ({"top_p": 1.1}, "top_p must be above 0"),
        ({"repetition_penalty": 0.0}, "repetition_penalty must be from 0.001 to 1000"),
        ({"repetition_penalty": 1e-39}, "repetition_penalty must be from 0.001 to 1000"),
        ({"repetition_penalty": 1e4}, "repetition_penalty must be from 0.001 to 1000"),
        ({"temperature": 0.0, "top_k": 5}, "cannot be combined with top_k"),
        ({"temperature": 0.0, "top_p": 0.9}, "cannot be combined with top_k"),
    ],
)
def test_settings_that_mean_nothing_are_refused(settings, mentioned):
    with pytest.raises(ValueError, match=mentioned):
        Sampling(**settings)


def test_settings_of_one_kind_go_together():
    for temperature, penalty in itertools.product((0.0, 1.0), (1.0, 1.3)):
        Sampling(temperature=temperature, repetition_penalty=penalty)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("settings", [{}, {"temperature": 0.0}, {"top_k": 2}, {"top_p": 0.5}])
def test_no_token_comes_from_logits_that_are_not_finite(value, settings):
    logits = torch.zeros(2, 5)
    logits[1, 3] = value
    first, second = choose(Sampling(**settings), logits).tolist()
    assert first < 5
    assert second == 5


@pytest.mark.parametrize("num_ahead", [1, 4, 100])
@pytest.mark.parametrize("sampling", [GREEDY, Sampling(repetition_penalty=1.1)], ids=str)
@pytest.mark.parametrize("row", [0, 1])
def test_texts_end_with_an_error_where_logits_are_not_finite_whoever_looks_how_often(
    num_ahead, sampling, row, monkeypatch
):
    """All tokens before them are given, and none from them or after them. One of the texts has ended by then."""
    decoder = sharp_decoder()
    end = int(generate(decoder, z := random_z(decoder, 2), END, 1, [[1], [2]], GREEDY)[0, 0])
    expected = list(stream(decoder, z, end, 9, [[1], [2]], sampling, torch.Generator().manual_seed(0)))[:6]
    step, num_steps = decoder.step, 0

    def broken(*args):
        nonlocal num_steps
        hidden, num_steps = step(*args), num_steps + 1
        if num_steps == len(expected):
            hidden[row] = math.nan
        return hidden

    monkeypatch.setattr(decoder, "step", broken)
    monkeypatch.setattr(generation, "_num_ahead", lambda device: num_ahead)
    written = stream(decoder, z, end, 9, [[1], [2]], sampling, torch.Generator().manual_seed(0))
    for tokens in expected:
        assert next(written).equal(tokens)
    with pytest.raises(RunError, match="logits are not finite"):
        next(written)


def test_a_processor_is_asked_after_every_token_and_a_device_less_often():
    assert generation._num_ahead(torch.device("cpu")) == 1
    assert generation._num_ahead(torch.device("cuda")) > 1


@pytest.mark.parametrize("num_ahead", [2, 7, 1000])
def test_texts_are_the_same_however_far_they_are_written_ahead(num_ahead, monkeypatch):
    decoder = sharp_decoder()
    z = random_z(decoder, 6)
    settings = {"sampling": Sampling(repetition_penalty=1.2)}
    expected = list(stream(decoder, z, END, 50, generator=torch.Generator().manual_seed(0), **settings))
    monkeypatch.setattr(generation, "_num_ahead", lambda device: num_ahead)
    tokens = list(stream(decoder, z, END, 50, generator=torch.Generator().manual_seed(0), **settings))
    assert torch.stack(tokens).equal(torch.stack(expected))


@pytest.mark.parametrize("penalty", [0.001, 1000.0])
@pytest.mark.parametrize("temperature", [0.0, 5e-324, 1e-39, 1e300])
def test_settings_at_the_ends_of_their_range_give_tokens_of_the_vocabulary(penalty, temperature):
    """Also for logits near the ends of float32, whose sum is beyond them."""
    logits = torch.tensor([[3e38, 3e38, 1e-45, 3e38, -3e38]])
    sampling = Sampling(temperature=temperature, repetition_penalty=penalty)
    for used in (True, False):
        assert 0 <= choose(sampling, logits, used).item() < 5

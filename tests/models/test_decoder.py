"""The decoder: its size, its formula, what its hidden states can see.

Shapes: B sequences, T tokens, L layers, S slots, D width, V vocabulary.
"""

import dataclasses
import math

import numpy as np
import pytest
import torch

from ltm_pyro.models import Decoder, DecoderConfig

SMALL = DecoderConfig(num_layers=3, width=512, num_heads=8, hidden=1376, num_slots=8, window=256, length=1024)
MEDIUM = dataclasses.replace(SMALL, num_layers=6, num_slots=4)
LARGE = dataclasses.replace(SMALL, num_layers=12)
TOY = DecoderConfig(num_layers=3, width=12, num_heads=3, hidden=10, num_slots=2, window=4, length=11)
FAST = dataclasses.replace(TOY, thoughts="fast-weights")


def sharp_decoder(config, vocab_size=7):
    """A decoder in float64 with weights so large that every input matters."""
    decoder = Decoder(config, vocab_size).double()
    for weight in decoder.parameters():
        torch.nn.init.normal_(weight, std=0.5)
    return decoder.requires_grad_(False)


def random_inputs(decoder, batch_size=2, length=None):
    config = decoder.config
    inputs_BT = torch.randint(decoder.vocab_size, (batch_size, length or config.length))
    return inputs_BT, torch.randn(batch_size, *config.latent_shape, dtype=torch.float64)


def count_weights(config, vocab_size):
    with torch.device("meta"):
        return sum(weight.numel() for weight in Decoder(config, vocab_size).parameters())


def rms_normed(x, weight):
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-5) * weight


def turned(x_TK):
    """Rotary positions by complex multiplication."""
    half = x_TK.shape[1] // 2
    angles = np.outer(np.arange(len(x_TK)), 10_000.0 ** (-np.arange(half) / half))
    complex_TK = (x_TK[:, :half] + 1j * x_TK[:, half:]) * np.exp(1j * angles)
    return np.concatenate([complex_TK.real, complex_TK.imag], axis=1)


def attended(query_K, key_NK, value_NK):
    weights = np.exp(key_NK @ query_K / math.sqrt(len(query_K)))
    return weights @ value_NK / weights.sum()


def naive_hidden(config, weights, inputs_T, z_LSD):
    """Kong et al. 2025 in numpy for one sequence: loops over layers, heads and positions, and no mask."""
    x = weights["embedding.weight"][inputs_T]
    size = config.width // config.num_heads
    heads = [slice(h * size, (h + 1) * size) for h in range(config.num_heads)]
    for layer in range(config.num_layers):
        weight = {
            name.removeprefix(f"blocks.{layer}.").removesuffix(".weight"): value
            for name, value in weights.items()
            if name.startswith(f"blocks.{layer}.")
        }
        q, k, v = np.split(
            rms_normed(x, weight["self_attention_norm"]) @ weight["self_attention.query_key_value"].T, 3, 1
        )
        seen = np.zeros_like(x)
        for head in heads:
            keys, queries = turned(k[:, head]), turned(q[:, head])
            for n in range(len(x)):
                first = max(0, n - config.window + 1)
                seen[n, head] = attended(queries[n], keys[first : n + 1], v[first : n + 1, head])
        x = x + seen @ weight["self_attention.output"].T

        if config.thoughts == "attended":
            q = rms_normed(x, weight["cross_attention_norm"]) @ weight["cross_attention.query"].T
            k, v = np.split(z_LSD[layer] @ weight["cross_attention.key_value"].T, 2, 1)
            for head in heads:
                keys = turned(k[:, head])
                for n in range(len(x)):
                    seen[n, head] = attended(q[n, head], keys, v[:, head])
            x = x + seen @ weight["cross_attention.output"].T

        gate, up = np.split(rms_normed(x, weight["feed_forward_norm"]) @ weight["feed_forward.gate_up"].T, 2, 1)
        hidden = gate / (1 + np.exp(-gate)) * up
        x = x + hidden @ weight["feed_forward.output"].T
        if config.thoughts == "fast-weights":
            for unit, vector in enumerate(z_LSD[layer]):  # a hidden unit also writes along its vector
                x = x + hidden[:, unit, None] * vector
    return rms_normed(x, weights["final_norm.weight"])


@pytest.mark.parametrize(("config", "num_weights"), [(SMALL, 38_369_280), (MEDIUM, 51_005_952), (LARGE, 76_279_296)])
def test_the_published_sizes_have_the_published_numbers_of_weights(config, num_weights):
    assert count_weights(config, vocab_size=50_258) == num_weights


def test_the_default_is_tiny_and_has_thoughts_to_reach_beyond_its_window():
    config = DecoderConfig()
    assert count_weights(config, vocab_size=258) <= 2_000_000
    assert config.num_layers >= 3
    assert config.num_slots >= 4
    assert config.length >= 256
    assert config.num_layers * (config.window - 1) + 1 <= config.length / 4
    assert config.latent_shape == (config.num_layers, config.num_slots, config.width)


@pytest.mark.parametrize(
    "config",
    [
        TOY,
        dataclasses.replace(TOY, window=1),
        dataclasses.replace(TOY, window=11),
        FAST,
        dataclasses.replace(FAST, num_slots=10),
    ],
)
def test_hidden_states_and_logits_equal_an_implementation_in_loops(config):
    decoder = sharp_decoder(config)
    inputs_BT, z_BLSD = random_inputs(decoder)
    weights = {name: value.numpy() for name, value in decoder.state_dict().items()}
    expected = np.stack(
        [naive_hidden(config, weights, *pair) for pair in zip(inputs_BT.numpy(), z_BLSD.numpy(), strict=True)]
    )
    hidden = decoder(inputs_BT, z_BLSD)
    # All is float64 but the rotation angles of 11 positions, and the hidden states are of size one.
    np.testing.assert_allclose(hidden.numpy(), expected, rtol=0, atol=11 * np.finfo(np.float32).eps)
    expected_logits = hidden.numpy() @ weights["embedding.weight"][: decoder.vocab_size - 1].T
    np.testing.assert_allclose(decoder.logits(hidden).numpy(), expected_logits, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("num_context", [1, 3, 6, 9, 10])
@pytest.mark.parametrize("config", [TOY, FAST, dataclasses.replace(TOY, window=1)])
def test_hidden_states_after_a_context_are_those_of_all_inputs_and_no_layer_computes_more_than_is_seen(
    config, num_context
):
    decoder = sharp_decoder(config)
    inputs_BT, z_BLSD = random_inputs(decoder)
    expected = decoder(inputs_BT, z_BLSD)[:, num_context:]
    computed = []
    for block in decoder.blocks:
        block.feed_forward.register_forward_hook(lambda _, inputs, __: computed.append(inputs[0].shape[1]))
    hidden = decoder(inputs_BT, z_BLSD, num_context=num_context)
    torch.testing.assert_close(hidden, expected, rtol=1e-12, atol=1e-12)
    seen = [config.length - num_context + above * (config.window - 1) for above in (2, 1, 0)]
    assert computed == [min(config.length, positions) for positions in seen]


def test_begin_of_text_is_the_last_id_and_has_no_logit():
    decoder = sharp_decoder(TOY, vocab_size=7)
    assert decoder.begin_of_text == 6
    assert decoder.logits(decoder(*random_inputs(decoder))).shape == (2, TOY.length, 6)


@pytest.mark.parametrize("window", [1, 4, 11, 20])
def test_a_hidden_state_does_not_depend_on_later_tokens(window):
    decoder = sharp_decoder(dataclasses.replace(TOY, window=window))
    inputs_BT, z_BLSD = random_inputs(decoder)
    before = decoder(inputs_BT, z_BLSD)
    for n in range(TOY.length - 1):
        changed_BT = inputs_BT.clone()
        changed_BT[:, n + 1 :] = (changed_BT[:, n + 1 :] + 1) % decoder.vocab_size
        after = decoder(changed_BT, z_BLSD)
        assert torch.equal(after[:, : n + 1], before[:, : n + 1])
        assert (after[:, n + 1 :] != before[:, n + 1 :]).any(-1).all()


@pytest.mark.parametrize(("num_layers", "window"), [(1, 1), (1, 5), (2, 1), (2, 4), (3, 4), (3, 2)])
def test_a_hidden_state_reaches_back_over_exactly_layers_times_window_minus_one_tokens(num_layers, window):
    reach = num_layers * (window - 1)
    decoder = sharp_decoder(dataclasses.replace(TOY, num_layers=num_layers, window=window))
    inputs_BT, z_BLSD = random_inputs(decoder, length=reach + 6)
    changed_BT = inputs_BT.clone()
    changed_BT[:, 2] = (changed_BT[:, 2] + 1) % decoder.vocab_size
    differs = (decoder(inputs_BT, z_BLSD) != decoder(changed_BT, z_BLSD)).any(-1)
    positions = torch.arange(reach + 6)
    assert torch.equal(differs, ((positions >= 2) & (positions <= 2 + reach)).expand(2, -1))


def test_every_hidden_state_depends_on_every_slot_of_every_layer():
    decoder = sharp_decoder(TOY)
    inputs_BT, z_BLSD = random_inputs(decoder)
    z_BLSD.requires_grad_()
    hidden_BTD = decoder(inputs_BT, z_BLSD)
    direction_D = torch.randn(TOY.width, dtype=torch.float64)
    for n in range(TOY.length):
        (gradient,) = torch.autograd.grad((hidden_BTD[:, n] @ direction_D).sum(), z_BLSD, retain_graph=True)
        assert (gradient.norm(dim=-1) > 1e-6).all()


@pytest.mark.parametrize("layer", range(TOY.num_layers))
def test_a_layer_reads_its_own_thought_vectors_and_no_others(layer):
    decoder = sharp_decoder(TOY)
    for other, block in enumerate(decoder.blocks):
        if other != layer:
            block.cross_attention.output.weight.zero_()
    inputs_BT, z_BLSD = random_inputs(decoder)
    before = decoder(inputs_BT, z_BLSD)
    for changed in range(TOY.num_layers):
        changed_BLSD = z_BLSD.clone()
        changed_BLSD[:, changed] += 1.0
        differs = (decoder(inputs_BT, changed_BLSD) != before).any(-1)
        assert (differs == (changed == layer)).all()


@pytest.mark.parametrize("layer", range(TOY.num_layers))
def test_what_lies_below_a_layer_does_not_depend_on_its_thought_vectors(layer):
    decoder = sharp_decoder(TOY)
    outputs = []
    for block in decoder.blocks:
        block.self_attention.register_forward_hook(lambda module, inputs, output: outputs.append(output))
    inputs_BT, z_BLSD = random_inputs(decoder)
    decoder(inputs_BT, z_BLSD)
    z_BLSD[:, layer] += 1.0
    decoder(inputs_BT, z_BLSD)
    before, after = outputs[: TOY.num_layers], outputs[TOY.num_layers :]
    unchanged = [torch.equal(*pair) for pair in zip(before, after, strict=True)]
    assert unchanged == [reader <= layer for reader in range(TOY.num_layers)]


@pytest.mark.parametrize("num_layers", [1, 3])
def test_initial_weights_have_the_scale_of_gpt2(num_layers):
    config = dataclasses.replace(TOY, num_layers=num_layers, width=48, hidden=80)
    num_norms = 0
    for name, weight in Decoder(config, vocab_size=300).named_parameters():
        if weight.dim() == 1:
            num_norms += 1
            assert torch.equal(weight, torch.ones(48))
            continue
        std = 0.02 / math.sqrt(3 * num_layers) if name.endswith(".output.weight") else 0.02
        # Standard errors of the standard deviation and of the mean of n normal numbers.
        assert abs(weight.std().item() - std) < 5 * std / math.sqrt(2 * weight.numel()), name
        assert abs(weight.mean().item()) < 5 * std / math.sqrt(weight.numel()), name
    assert num_norms == 3 * num_layers + 1


def test_weights_are_drawn_from_the_global_generator():
    torch.manual_seed(1)
    first = Decoder(TOY, vocab_size=7)
    second = Decoder(TOY, vocab_size=7)
    assert not torch.equal(first.embedding.weight, second.embedding.weight)
    for decoder in (first, second):
        torch.manual_seed(2)
        decoder.reset_parameters()
    for weight, same in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(weight, same)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        (field.name, value)
        for field in dataclasses.fields(DecoderConfig)
        if field.type == "int"
        for value in (0, -2)
        # The model without z, and without an encoder.
        if (field.name, value) not in (("num_slots", 0), ("encoder_layers", 0))
    ],
)
def test_sizes_that_are_too_small_are_refused_by_name(field, value):
    with pytest.raises(ValueError, match=f"{field} must be at least"):
        DecoderConfig(**{field: value})


def test_a_prior_that_is_not_registered_is_refused_by_name():
    with pytest.raises(ValueError, match="unknown prior 'normal': choose from standard, affine"):
        DecoderConfig(prior="normal")


def test_without_slots_it_is_the_decoder_whose_cross_attention_adds_nothing():
    shape = {"num_layers": 2, "width": 16, "num_heads": 2, "hidden": 24, "window": 3, "length": 7}
    with_z, without = (Decoder(DecoderConfig(**shape, num_slots=slots), 9).double() for slots in (3, 0))
    assert not any("cross_attention" in name for name, _ in without.named_parameters())
    without.load_state_dict({name: with_z.state_dict()[name] for name in without.state_dict()})
    with torch.no_grad():
        for block in with_z.blocks:
            block.cross_attention.output.weight.zero_()
    tokens = torch.randint(8, (4, 7))
    z = torch.randn(4, 2, 3, 16, dtype=torch.float64)
    assert torch.allclose(without(tokens, z[:, :, :0]), with_z(tokens, z), rtol=1e-12)


def test_fast_weights_of_zero_are_the_decoder_without_z_and_cost_no_weights():
    with_z, without = sharp_decoder(FAST), sharp_decoder(dataclasses.replace(FAST, num_slots=0))
    assert with_z.state_dict().keys() == without.state_dict().keys()
    without.load_state_dict(with_z.state_dict())
    tokens, z = random_inputs(with_z)
    torch.testing.assert_close(with_z(tokens, 0 * z), without(tokens, z[:, :, :0]), rtol=1e-12, atol=1e-12)
    assert (with_z(tokens, z) - without(tokens, z[:, :, :0])).abs().max() > 0.1


def test_a_fast_weight_needs_a_hidden_unit():
    with pytest.raises(ValueError, match="num_slots 11 must be at most hidden = 10"):
        dataclasses.replace(FAST, num_slots=11)


@pytest.mark.parametrize(("width", "num_heads"), [(128, 3), (12, 4), (9, 3)])
def test_a_width_that_does_not_split_into_heads_of_pairs_is_refused(width, num_heads):
    with pytest.raises(ValueError, match=f"width {width} must be a multiple"):
        DecoderConfig(width=width, num_heads=num_heads)


def test_without_slots_a_layer_ends_in_the_residual_stream_twice():
    config = dataclasses.replace(TOY, num_slots=0, width=48, hidden=80)
    decoder = Decoder(config, vocab_size=300)
    ends = [weight for name, weight in decoder.named_parameters() if name.endswith(".output.weight")]
    assert len(ends) == 2 * config.num_layers
    assert sum(weight.dim() == 1 for weight in decoder.parameters()) == 2 * config.num_layers + 1
    std = 0.02 / math.sqrt(2 * config.num_layers)
    for weight in ends:
        assert abs(weight.std().item() - std) < 5 * std / math.sqrt(2 * weight.numel())


# --- less than float32, and compiled


def log_probs_and_slopes(decoder, inputs_BT, z_BLSD):
    """Of the inputs as tokens; ∂ Σ log p / ∂ z."""
    z_BLSD = z_BLSD.clone().requires_grad_()
    hidden = decoder(inputs_BT, z_BLSD).flatten(0, 1)
    log_probs = decoder.log_probs(hidden, inputs_BT.flatten())
    return log_probs.detach(), torch.autograd.grad(log_probs.sum(), z_BLSD)[0]


@pytest.fixture
def wide():
    """A decoder in float32 of the size of preset tiny, its inputs and a z."""
    torch.manual_seed(0)
    decoder = Decoder(DecoderConfig(), 258)
    for weight in decoder.parameters():
        if weight.dim() > 1:
            torch.nn.init.normal_(weight, std=weight.shape[1] ** -0.5)
    return decoder, torch.randint(256, (8, 256)), torch.randn(8, *decoder.config.latent_shape)


def test_bfloat16_has_little_noise_and_no_bias_to_speak_of(wide):
    """Rounding to 8 bits moves the log-probability of a token by a percent of a nat or so, either way."""
    decoder, inputs, z = wide
    exact, exact_slope = log_probs_and_slopes(decoder, inputs, z)
    decoder.compute_dtype = torch.bfloat16
    rounded, slope = log_probs_and_slopes(decoder, inputs, z)
    # The layers by themselves, and not only the vocabulary term.
    with torch.no_grad():
        hidden, decoder.compute_dtype = decoder(inputs, z), None
        assert 1e-4 < (hidden - decoder(inputs, z)).std() < 0.03
    assert rounded.dtype == torch.float32
    assert slope.dtype == torch.float32
    difference = (rounded - exact).double()
    assert 1e-4 < difference.std() < 0.03
    assert difference.mean().abs() < 5 * difference.std() / math.sqrt(len(difference)) + 1e-3
    assert torch.nn.functional.cosine_similarity(slope.flatten(), exact_slope.flatten(), dim=0) > 0.999


def test_bfloat16_leaves_weights_and_their_gradients_in_float32(wide):
    decoder, inputs, z = wide
    decoder.compute_dtype = torch.bfloat16
    hidden = decoder(inputs, z)
    decoder.log_probs(hidden.flatten(0, 1), inputs.flatten()).sum().backward()
    assert {weight.dtype for weight in decoder.parameters()} == {torch.float32}
    assert {weight.grad.dtype for weight in decoder.parameters()} == {torch.float32}
    rounded = decoder.embedding.weight.grad.clone()
    decoder.zero_grad()
    decoder.compute_dtype = None
    decoder.log_probs(decoder(inputs, z).flatten(0, 1), inputs.flatten()).sum().backward()
    exact = decoder.embedding.weight.grad
    assert (rounded - exact).norm() < 0.02 * exact.norm()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # the compiler's own, of parts of PyTorch that it uses
def test_compiled_it_says_the_same(wide):
    decoder, inputs, z = wide
    expected = log_probs_and_slopes(decoder, inputs, z)
    below = decoder.below_z(inputs)
    decoder.compile()
    for ours, theirs in zip(log_probs_and_slopes(decoder, inputs, z), expected, strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-5)
    # What a batch has precomputed in the fast steps comes from a graph of its own.
    assert torch.allclose(decoder.below_z(inputs).x_BTD, below.x_BTD, rtol=1e-4, atol=1e-5)
    again = decoder(inputs, z, decoder.below_z(inputs))
    assert torch.allclose(again, decoder(inputs, z), rtol=1e-4, atol=1e-5)

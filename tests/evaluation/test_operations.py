"""Counted operations against formulas by hand: 2 m n k for a product of [m, n] and [n, k] matrices."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from ltm_pyro.evaluation import operations
from ltm_pyro.evaluation.estimators import ESTIMATORS, EstimatorSettings
from ltm_pyro.evaluation.inferred import Inference
from ltm_pyro.inference import PRIOR
from ltm_pyro.inference.objectives import OBJECTIVES
from ltm_pyro.inference.objectives.past import Past
from ltm_pyro.inference.schemes.amortized import Amortized
from ltm_pyro.inference.schemes.vi import VI
from ltm_pyro.models import DecoderConfig, LatentThoughtModel

L, D, H, S, T, V = 2, 16, 24, 3, 32, 10
HEADS = 2
CONFIG = DecoderConfig(num_layers=L, width=D, num_heads=HEADS, hidden=H, num_slots=S, window=T, length=T)


def model_of(**changes: Any) -> LatentThoughtModel:
    return LatentThoughtModel(dataclasses.replace(CONFIG, **changes), vocab_size=V + 1, end_of_text=0)


LAYER = 2 * (4 * D * D + 3 * D * H)  # query, key, value, output; gate, up, output
ATTENTION = 2 * 2 * T * D  # scores and their use, with every position, masked or not
CROSS = 2 * 2 * HEADS * S * D  # scores and their use
KEYS_AND_VALUES = 2 * 2 * D * D * S  # of the thoughts, once a sequence
SLOTS = 2 * KEYS_AND_VALUES  # and as much to take in the weights of queries and output
LOGITS = 2 * D * V
FORWARD = L * (LAYER + ATTENTION) + LOGITS
FORWARD_WITH_Z = FORWARD + L * (CROSS + SLOTS / T)
BELOW = 2 * 4 * D * D + ATTENTION  # of the first layer, its self-attention


def test_a_product_of_matrices():
    assert operations.count(lambda: torch.ones(3, 5) @ torch.ones(5, 7)) == 2 * 3 * 5 * 7


def test_a_model_without_z_costs_a_pass_to_score_and_three_to_train():
    model = model_of(num_slots=0)
    assert operations.of_estimate(model, ESTIMATORS["exact"], Inference.from_prior(), EstimatorSettings()) == FORWARD
    # The logits are computed again for the gradient of the weights.
    assert operations.of_training(model, PRIOR, OBJECTIVES["whole"]()) == 3 * FORWARD + LOGITS
    assert all(weight.grad is None for weight in model.parameters())


def test_counting_a_training_step_leaves_gradients_weights_and_random_numbers_alone():
    model = model_of()
    gradients = {name: torch.rand_like(weight) for name, weight in model.named_parameters()}
    for name, weight in model.named_parameters():
        weight.grad = gradients[name].clone()
    weights = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    generator = torch.random.get_rng_state()
    assert operations.of_training(model, VI(num_steps=1), OBJECTIVES["whole"]()) > 0
    assert torch.equal(torch.random.get_rng_state(), generator)
    for name, weight in model.named_parameters():
        assert torch.equal(weight.grad, gradients[name])
        assert torch.equal(weight, weights[name])


def test_a_window_costs_what_its_blocks_do():
    """Blocks of W queries see 2 W keys, the first W."""
    wide, narrow = (
        operations.of_estimate(
            model_of(num_slots=0, window=window), ESTIMATORS["exact"], Inference.from_prior(), EstimatorSettings()
        )
        for window in (T, 4)
    )
    assert wide - narrow == L * 2 * 2 * D * (T - 4 * (2 - 4 / T))


def test_a_draw_costs_a_pass_and_a_step_of_inference_three_of_what_lies_above_the_first_thoughts():
    """Forwards, backwards through the activations alone, and forwards again at the end of the step.

    What lies below is computed once for all steps or draws.
    """
    model = model_of()

    def cost(num_steps: int, num_samples: int) -> float:
        inference = Inference("vi", VI(num_steps=num_steps))
        return operations.of_estimate(model, ESTIMATORS["elbo"], inference, EstimatorSettings(num_samples=num_samples))

    above = FORWARD_WITH_Z - BELOW
    assert cost(0, 5) == pytest.approx(BELOW + 5 * above)
    step = cost(1, 1) - cost(0, 1) - BELOW
    assert 2.9 * above < step < 3.3 * above
    assert cost(7, 3) == pytest.approx(BELOW + 7 * step + BELOW + 3 * above)
    # The slow step has no gradient of z, and so none of what keys and values are made from.
    training = operations.of_training(model, VI(num_steps=7), OBJECTIVES["whole"]())
    assert training == pytest.approx(BELOW + 7 * step + 3 * FORWARD_WITH_Z + LOGITS - L * KEYS_AND_VALUES / T)


def test_an_encoder_costs_two_passes_and_a_gradient_to_train_and_one_to_score():
    """It runs where inference starts, and again in the guide, whose gradient costs two passes more.

    Its layers have no cross-attention; L·S queries stand in front of T tokens, and the head reads the queries alone.
    """
    num_layers, queries = 3, L * S
    positions = queries + T
    layer = positions * LAYER + 2 * 2 * positions * positions * D
    encoder = (num_layers * layer + queries * 2 * D * 2 * D) / T
    model, settings = model_of(encoder_layers=num_layers), EstimatorSettings(num_samples=3)
    inference = Inference("amortized", Amortized())
    scored = operations.of_estimate(model, ESTIMATORS["elbo"], inference, settings)
    assert scored == pytest.approx(3 * FORWARD_WITH_Z - 2 * BELOW + encoder)
    # z has a gradient here: that of the keys and values of the slots, which vi's slow step does without.
    training = operations.of_training(model, Amortized(), OBJECTIVES["whole"]())
    assert training == pytest.approx(3 * FORWARD_WITH_Z + LOGITS + 4 * encoder)


def test_an_encoder_of_blocks_reads_each_block_by_a_pass_without_gradient():
    """One more pass of four, and what the encoder itself does; the last block is read by nobody."""
    model = model_of(window=4, encoder_layers=1, encoder_reads="block")
    without = operations.of_training(model_of(window=4), VI(num_steps=0), Past(T // 4))
    training = operations.of_training(model, Amortized(), Past(T // 4))
    assert 1.1 * without < training < 2 * without
    inference = Inference("amortized", Amortized(), block_size=T // 4)
    scored = operations.of_estimate(model, ESTIMATORS["prequential"], inference, EstimatorSettings(num_samples=1))
    from_prior = dataclasses.replace(Inference.from_prior(), block_size=T // 4)
    alone = operations.of_estimate(model, ESTIMATORS["prequential"], from_prior, EstimatorSettings(num_samples=1))
    assert 1.5 * alone < scored < 3 * alone


def test_prequential_infers_from_what_stands_before_a_block_alone():
    """Blocks of a quarter: inference reads 0, 1, 2 and 3 of them, and each layer what a block needs of it."""
    settings = EstimatorSettings(num_samples=2, block_size=T // 4)
    model = model_of(num_slots=S, window=T // 4)

    def cost(num_steps: int) -> float:
        inference = Inference("vi", VI(num_steps=num_steps))
        return operations.of_estimate(model, ESTIMATORS["prequential"], inference, settings)

    elbo = [
        operations.of_estimate(
            model, ESTIMATORS["elbo"], Inference("vi", VI(num_steps=steps)), EstimatorSettings(num_samples=1)
        )
        for steps in (0, 1)
    ]
    size = T // 4
    passes = sum(
        min((block + 1) * size, size + (L - 1 - layer) * (size - 1)) for block in range(4) for layer in range(L)
    )
    # Each draw makes keys and values of the thoughts for each block.
    slots = L * SLOTS / T
    without = 2 * (elbo[0] - slots) - BELOW
    assert cost(0) == pytest.approx(passes / (L * T) * without + 4 * 2 * slots, rel=0.15)
    assert cost(1) - cost(0) == pytest.approx((1 + 2 + 3) / 4 * (elbo[1] - elbo[0]), rel=0.15)

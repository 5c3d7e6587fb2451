"""Noise: what keys its numbers, and that they have the distribution they should."""

import math

import pytest
import scipy.stats
import torch

from ltm_pyro.inference import BatchNoise, SequenceNoise

NUM_DRAWS = 20_000
FLOAT64 = torch.zeros((), dtype=torch.float64)


class OnDevice(SequenceNoise):
    """Draws as on a device that is not the CPU; here on the CPU."""

    def __init__(self, seed):
        super().__init__(seed)
        self._by_numpy = False


def normal_on_device(**key):
    return normal(**key, noise=OnDevice)


def uniform_on_device(**key):
    return uniform(**key, noise=OnDevice)


def normal(seed=0, sequence_id=5, purpose="step", step=0, count=8, noise=SequenceNoise):
    """Numbers of one sequence."""
    ids, steps = torch.tensor([sequence_id]), torch.tensor([step])
    return noise(seed).normal(purpose, ids, steps, torch.Size([count]), like=FLOAT64)[0]


def uniform(seed=0, sequence_id=5, purpose="step", step=0, count=8, noise=SequenceNoise):
    ids, steps = torch.tensor([sequence_id]), torch.tensor([step])
    return noise(seed).uniform(purpose, ids, steps, (count,))[:, 0]


def batch_noise(seed=0):
    return BatchNoise(torch.Generator().manual_seed(seed))


DIFFERENT_KEYS = [
    {},
    {"seed": 1},
    {"seed": 2**32},
    {"sequence_id": 0},
    {"sequence_id": 6},
    {"sequence_id": 2**40},
    {"step": 1},
    {"step": 2},
    {"purpose": "init"},
    {"purpose": "guide"},
    {"purpose": "posterior"},
    {"purpose": "distribution"},
    {"purpose": "split"},
    # Seed and id are no sum, nor are id and step.
    {"seed": 5, "sequence_id": 0},
    {"sequence_id": 4, "step": 1},
]


@pytest.mark.parametrize("draw", [normal, normal_on_device, uniform, uniform_on_device])
def test_keys_that_differ_in_any_part_have_no_number_in_common(draw):
    numbers = torch.cat([draw(**key) for key in DIFFERENT_KEYS])
    assert len(numbers.unique()) == len(numbers)


@pytest.mark.parametrize("draw", [normal, normal_on_device, uniform, uniform_on_device])
def test_neighbouring_seeds_of_any_size_have_no_number_in_common(draw):
    seeds = [edge + offset for edge in (0, 2**31, 2**32, 2**53, 2**63, 2**64 - 3) for offset in range(3)]
    numbers = torch.cat([draw(seed=seed) for seed in seeds])
    assert len(numbers.unique()) == len(numbers)


@pytest.mark.parametrize("draw", [normal, uniform])
def test_the_same_key_gives_the_same_numbers_whatever_was_drawn_before(draw):
    first = draw(seed=3, sequence_id=1, step=4)
    noise = SequenceNoise(3)
    ids, steps = torch.tensor([1]), torch.tensor([4])
    noise.normal("init", ids, steps, torch.Size([7]), like=FLOAT64)
    noise.uniform("step", ids, steps + 1)
    torch.randn(3)
    again = (
        noise.normal("step", ids, steps, torch.Size([8]), like=FLOAT64)[0]
        if draw is normal
        else noise.uniform("step", ids, steps, (8,))[:, 0]
    )
    assert again.equal(first)


@pytest.mark.parametrize("noise", [SequenceNoise(0), OnDevice(0)], ids=lambda noise: type(noise).__name__)
def test_numbers_of_a_sequence_do_not_depend_on_its_batch(noise):
    ids, steps = torch.tensor([4, 9, 2, 7]), torch.tensor([0, 3, 3, 1])

    def draw(index):
        normals = noise.normal("step", ids[index], steps[index], torch.Size([2, 3]), (2,), like=FLOAT64)
        return normals, noise.uniform("step", ids[index], steps[index], (2,))

    normals, uniforms = draw(torch.arange(4))
    for index in (torch.tensor([2, 0, 3, 1]), torch.tensor([1]), torch.tensor([3, 2])):
        assert draw(index)[0].equal(normals[:, index])
        assert draw(index)[1].equal(uniforms[:, index])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no CUDA device")
def test_noise_for_a_gpu_is_drawn_there_and_keyed_like_any():
    noise, ids, steps = SequenceNoise(0, "cuda"), torch.tensor([4, 9, 2]), torch.tensor([0, 3, 3])
    like = torch.zeros((), device="cuda")
    drawn = noise.normal("step", ids, steps, torch.Size([2, 3]), (2,), like=like)
    assert (drawn.shape, drawn.device.type) == ((2, 3, 2, 3), "cuda")
    assert noise.normal("step", ids[1:], steps[1:], torch.Size([2, 3]), (2,), like=like).equal(drawn[:, 1:])
    assert len(drawn.unique()) == drawn.numel()


@pytest.mark.parametrize("noise", [SequenceNoise(0), OnDevice(0)], ids=lambda noise: type(noise).__name__)
def test_more_chains_leave_the_numbers_of_the_first_ones_as_they_were(noise):
    ids, steps = torch.tensor([4, 9]), torch.tensor([0, 3])
    few, many = (noise.normal("step", ids, steps, torch.Size([2, 3]), (n,), like=FLOAT64) for n in (2, 5))
    assert few.equal(many[:2])
    few, many = (noise.uniform("step", ids, steps, (n,)) for n in (2, 5))
    assert few.equal(many[:2])


def test_runs_in_float32_and_float64_see_the_same_numbers():
    ids, steps = torch.tensor([4, 9]), torch.tensor([0, 3])
    single, double = (
        SequenceNoise(0).normal("step", ids, steps, torch.Size([3]), like=torch.zeros((), dtype=dtype))
        for dtype in (torch.float32, torch.float64)
    )
    assert (single.dtype, double.dtype) == (torch.float32, torch.float64)
    assert single.double().equal(double)


def across_sequences(draw):
    """One number of each of many sequences."""
    ids = torch.arange(NUM_DRAWS)
    return draw(ids, torch.zeros_like(ids))


def across_steps(draw):
    """One number of each of many steps of a sequence."""
    steps = torch.arange(NUM_DRAWS)
    return draw(torch.full_like(steps, 5), steps)


def normals_of(noise):
    return lambda ids, steps: noise.normal("step", ids, steps, torch.Size(), like=FLOAT64)


def uniforms_of(noise):
    return lambda ids, steps: noise.uniform("step", ids, steps)


NORMALS = {
    "one stream": lambda: normal(count=NUM_DRAWS),
    "across sequences": lambda: across_sequences(normals_of(SequenceNoise(0))),
    "across steps": lambda: across_steps(normals_of(SequenceNoise(0))),
    "of a batch": lambda: across_sequences(normals_of(batch_noise())),
    "one stream of a device": lambda: normal_on_device(count=NUM_DRAWS),
    "across sequences, on a device": lambda: across_sequences(normals_of(OnDevice(0))),
    "across steps, on a device": lambda: across_steps(normals_of(OnDevice(0))),
}
UNIFORMS = {
    "one stream": lambda: uniform(count=NUM_DRAWS),
    "across sequences": lambda: across_sequences(uniforms_of(SequenceNoise(0))),
    "across steps": lambda: across_steps(uniforms_of(SequenceNoise(0))),
    "of a batch": lambda: across_sequences(uniforms_of(batch_noise())),
    "one stream of a device": lambda: uniform_on_device(count=NUM_DRAWS),
    "across sequences, on a device": lambda: across_sequences(uniforms_of(OnDevice(0))),
    "across steps, on a device": lambda: across_steps(uniforms_of(OnDevice(0))),
}
# The two-sided probability of 5 standard errors.
SMALLEST_P_VALUE = math.erfc(5 / math.sqrt(2))


@pytest.mark.parametrize("draw", NORMALS.values(), ids=NORMALS)
def test_normal_numbers_are_standard_normal(draw):
    numbers = draw()
    assert numbers.shape == (NUM_DRAWS,)
    assert scipy.stats.kstest(numbers.numpy(), "norm").pvalue > SMALLEST_P_VALUE
    # Moments 1 to 4 are 0, 1, 0 and 3; those of twice the order, less their squares, are the variances.
    for order, (moment, variance) in enumerate([(0, 1), (1, 2), (0, 15), (3, 96)], start=1):
        assert abs(numbers.pow(order).mean() - moment) < 5 * math.sqrt(variance / NUM_DRAWS)


@pytest.mark.parametrize("draw", UNIFORMS.values(), ids=UNIFORMS)
def test_uniform_numbers_are_uniform_from_0_to_1(draw):
    numbers = draw()
    assert numbers.shape == (NUM_DRAWS,)
    assert numbers.dtype == torch.float64
    assert numbers.min() >= 0
    assert numbers.max() < 1
    assert scipy.stats.kstest(numbers.numpy(), "uniform").pvalue > SMALLEST_P_VALUE


@pytest.mark.parametrize("other", [key for key in DIFFERENT_KEYS if key], ids=str)
@pytest.mark.parametrize("draw", [normal, normal_on_device, uniform, uniform_on_device])
def test_streams_are_uncorrelated(draw, other):
    streams = torch.stack([draw(count=NUM_DRAWS), draw(count=NUM_DRAWS, **other)])
    assert abs(torch.corrcoef(streams)[0, 1]) < 5 / math.sqrt(NUM_DRAWS)


@pytest.mark.parametrize(
    "noise", [SequenceNoise(0), OnDevice(0), batch_noise()], ids=lambda noise: type(noise).__name__
)
def test_dimensions_are_samples_then_sequences_then_event(noise):
    ids, steps = torch.tensor([4, 9, 2]), torch.tensor([0, 3, 1])
    single = torch.zeros((), dtype=torch.float32)
    normals = noise.normal("step", ids, steps, torch.Size([6, 7]), (4, 5), like=single)
    assert normals.shape == (4, 5, 3, 6, 7)
    assert normals.dtype == torch.float32
    assert len(normals.unique()) == normals.numel()
    uniforms = noise.uniform("step", ids, steps, (4, 5))
    assert uniforms.shape == (4, 5, 3)
    assert len(uniforms.unique()) == uniforms.numel()


def test_noise_of_a_batch_is_new_in_every_call_and_repeats_with_its_generator():
    ids, steps = torch.tensor([4, 9]), torch.tensor([0, 3])

    def draws(noise):
        normals = [noise.normal("step", ids, steps, torch.Size([3]), like=FLOAT64).flatten() for _ in range(3)]
        return torch.cat([*normals, *[noise.uniform("step", ids, steps) for _ in range(3)]])

    assert len(draws(batch_noise()).unique()) == 24
    assert draws(batch_noise()).equal(draws(batch_noise()))
    assert not draws(batch_noise()).equal(draws(batch_noise(1)))


@pytest.mark.parametrize("noise", [SequenceNoise(0), batch_noise()], ids=lambda noise: type(noise).__name__)
def test_noise_does_not_touch_the_global_generator(noise):
    before = torch.random.get_rng_state()
    noise.normal("step", torch.tensor([4]), torch.tensor([0]), torch.Size([3]), like=FLOAT64)
    noise.uniform("step", torch.tensor([4]), torch.tensor([0]))
    assert torch.random.get_rng_state().equal(before)

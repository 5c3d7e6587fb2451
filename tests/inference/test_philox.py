"""Philox: the published vectors of its authors, and which words a sequence gets."""

import math

import numpy as np
import pytest
import torch

from ltm_pyro.inference import philox

# Salmon et al. 2011, kat_vectors of Random123: philox4x32, 10 rounds: counter, key, words.
PUBLISHED = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def numbers(text):
    return [int(word, 16) for word in text.split()]


@pytest.mark.parametrize(("counter", "key", "expected"), PUBLISHED)
def test_words_are_those_that_were_published(counter, key, expected):
    words = philox.philox(tuple(torch.tensor([word]) for word in numbers(counter)), tuple(numbers(key)))
    assert [word.item() for word in words] == numbers(expected)


def test_the_counter_is_block_step_and_both_words_of_the_id():
    counter, key = (5, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0)
    expected = philox.philox(tuple(torch.tensor([word]) for word in counter), key)
    found = philox.words(
        key[0] | key[1] << 32, torch.tensor([counter[2] | counter[3] << 32]), torch.tensor([counter[1]]), 8
    )
    assert [word[0, 5].item() for word in found] == [word.item() for word in expected]


def test_normal_numbers_are_box_and_muller_of_the_words():
    ids, steps = torch.tensor([3, 2**40]), torch.tensor([0, 7])
    w0, w1, w2, w3 = (word.numpy().astype(np.float64) for word in philox.words(9, ids, steps, 25))
    expected = []
    for first, second in ((w0, w1), (w2, w3)):
        radius, angle = np.sqrt(-2 * np.log((first + 0.5) / 2**32)), 2 * math.pi * (second + 0.5) / 2**32
        expected += [radius * np.cos(angle), radius * np.sin(angle)]
    found = philox.normal(9, ids, steps, 99)
    assert (found.shape, found.dtype) == ((2, 99), torch.float32)
    # Near 1 a float32 has an absolute error of 6e-8, and the root of its logarithm one of 3e-4.
    np.testing.assert_allclose(found.numpy(), np.stack(expected, -1).reshape(2, 100)[:, :99], rtol=0, atol=5e-4)


def test_the_extreme_words_give_finite_normal_numbers():
    extreme = torch.tensor([0, 1, 2**31, 2**32 - 1])
    unit = philox._unit(extreme)
    assert unit.min() > 0
    assert unit.max() <= 1
    assert (-2 * unit.log()).sqrt().max() < 6.8


def test_uniform_numbers_have_53_bits():
    """Each of two words gives its highest bits: 32 of the first and 21 of the second."""
    ids, steps = torch.tensor([3]), torch.tensor([0])
    words = [[int(number) for number in word[0]] for word in philox.words(9, ids, steps, 500)]
    expected = [
        (high * 2**21 + low // 2**11) / 2**53 for pair in zip(*words, strict=True) for high, low in (pair[:2], pair[2:])
    ]
    assert philox.uniform(9, ids, steps, 999)[0].tolist() == expected[:999]

"""The output layer for few vectors is the output layer."""

import pytest
import torch
import torch.nn.functional as F

from ltm_pyro.models import Decoder, DecoderConfig
from ltm_pyro.models.vector_products import WORTH_A_COPY, VectorLinear, logits_of_many_tokens

SHAPE = DecoderConfig(num_layers=1, width=8, num_heads=2, hidden=10, num_slots=2, window=4, length=11)


@pytest.mark.parametrize("num_threads", [1, 2, 3, 8])
@pytest.mark.parametrize(("num_outputs", "num_inputs", "batch_size"), [(10, 4, 1), (7, 5, 3), (257, 16, 2)])
def test_products_with_few_vectors_are_those_of_a_linear_map(
    num_threads, num_outputs, num_inputs, batch_size, monkeypatch
):
    monkeypatch.setattr(torch, "get_num_threads", lambda: num_threads)
    weight = torch.randn(num_outputs, num_inputs, dtype=torch.float64)
    x = torch.randn(batch_size, num_inputs, dtype=torch.float64)
    torch.testing.assert_close(VectorLinear(weight)(x), F.linear(x, weight), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("num_tokens", [1, WORTH_A_COPY])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@torch.no_grad()
def test_prepared_for_many_tokens_the_logits_are_those_of_the_decoder(num_tokens, dtype):
    decoder = Decoder(SHAPE, 20)
    decoder.compute_dtype = dtype
    hidden = torch.randn(3, 8)
    logits, expected = logits_of_many_tokens(decoder, num_tokens)(hidden), decoder.logits(hidden)
    assert logits.dtype == expected.dtype
    torch.testing.assert_close(logits, expected)

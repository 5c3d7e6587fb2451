"""The output layer laid out for products with few vectors, as they occur where texts are written token by token.

A product with one vector is as fast as its weights are read, and most weights of a small model are the vocabulary's. On
a CPU, the libraries behind PyTorch read a matrix of [in, out] about twice as fast as one of [out, in], which `F.linear`
takes, and read either with a single thread. Written as a batch of products, one a thread, it is read by all threads.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ltm_pyro.models.decoder import Decoder

WORTH_A_COPY = 64
"""The number of tokens from which on the new layout saves more time than it takes to make."""


class VectorLinear:
    """A linear map of few vectors, without bias: `F.linear(x_BD, weight)` up to rounding, for the present weights."""

    def __init__(self, weight: Tensor) -> None:
        self.num_outputs = len(weight)
        num_parts = torch.get_num_threads()
        padded = F.pad(weight, (0, 0, 0, -len(weight) % num_parts))
        self.parts = torch.unflatten(padded, 0, (num_parts, -1)).transpose(1, 2).contiguous()
        """The weights that each thread multiplies by, [threads, in, out / threads]."""

    def __call__(self, x_BD: Tensor) -> Tensor:
        products = torch.bmm(x_BD.expand(len(self.parts), -1, -1), self.parts)
        return products.transpose(0, 1).flatten(1)[:, : self.num_outputs]


def logits_of_many_tokens(decoder: Decoder, num_tokens: int) -> Callable[[Tensor], Tensor]:
    """A function equal to `decoder.logits` for [B, D], laid out to be called so many times with the present weights."""
    weight = decoder.embedding.weight[:-1]
    if decoder.compute_dtype is not None:
        rounded = weight.to(decoder.compute_dtype)  # once, and not for every token
        return lambda hidden_BD: F.linear(hidden_BD.to(rounded.dtype), rounded)
    if weight.device.type == "cpu" and num_tokens >= WORTH_A_COPY:
        return VectorLinear(weight)
    return decoder.logits

"""The code of single tokens is a code, and characters are put together from their tokens."""

from __future__ import annotations

import dataclasses
import itertools
from types import SimpleNamespace

import pytest
import torch

from ltm_pyro.data import get_tokenizer
from ltm_pyro.data.synthetic import token_batch
from ltm_pyro.evaluation.by_token import Piece, code_by_token, pieces
from ltm_pyro.evaluation.estimators import EstimatorSettings
from ltm_pyro.evaluation.inferred import Inference, Inferred
from ltm_pyro.inference import SCHEMES, SequenceNoise
from ltm_pyro.models import DecoderConfig, LatentThoughtModel

END = 256


@pytest.mark.parametrize("scheme", ["map", "vi"])
@pytest.mark.parametrize("is_streaming", [True, False])
@pytest.mark.parametrize("block_size", [1, 3])
def test_the_probabilities_of_what_may_follow_sum_to_one_after_every_beginning(scheme, is_streaming, block_size):
    config = DecoderConfig(num_layers=2, width=8, num_heads=2, hidden=8, num_slots=2, window=2, length=4)
    model = LatentThoughtModel(config, vocab_size=4, end_of_text=2).double()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.normal_(std=0.7)
    texts = torch.tensor(list(itertools.product(range(3), repeat=4)))
    batch = dataclasses.replace(token_batch(texts), sequence_ids=torch.zeros(len(texts), dtype=torch.int64))
    batch = batch.with_weights(batch.weights.double())
    inference = Inference(scheme, SCHEMES[scheme](num_steps=2), block_size=block_size if is_streaming else None)
    inferred = Inferred(model, batch, inference, SequenceNoise(0))
    estimate, nats = code_by_token(inferred, EstimatorSettings(num_samples=4, block_size=block_size))
    assert torch.allclose(nats.sum(1), estimate.nats, rtol=1e-9)
    # The texts are in order: each beginning of n tokens has 3^(4 - n) of them, and so has each token after it.
    for place in range(4):
        of_token = (-nats[:, place]).exp().view(3**place, 3, -1)
        assert torch.allclose(of_token, of_token[..., :1].expand_as(of_token))  # nothing of what follows is known
        assert torch.allclose(of_token[..., 0].sum(1), torch.ones(3**place).double())
    assert nats.std() > 0.1


def test_a_character_is_put_together_from_its_bytes():
    encoding = get_tokenizer("bytes")
    tokens = [*"a東é".encode(), END, *"ü".encode()]
    assert pieces(tokens, encoding) == [
        Piece("a", 0, 1),
        Piece("東", 1, 4),
        Piece("é", 4, 6),
        Piece("", 6, 7),
        Piece("ü", 7, 9),
    ]


def test_a_character_that_is_cut_is_shown_as_such_and_no_token_is_lost():
    encoding = get_tokenizer("bytes")
    east, umlaut = "東".encode(), "ü".encode()
    for tokens in ([*east[1:], *b"a", *umlaut[:1]], [*umlaut[:1], END, *b"b"], [END], [*east[:2]]):
        found = pieces(tokens, encoding)
        assert [place for piece in found for place in range(piece.start, piece.stop)] == list(range(len(tokens)))
        expected = bytes(token for token in tokens if token < END).decode(errors="replace")
        assert "".join(piece.text for piece in found) == expected


def test_a_token_of_several_characters_is_a_piece_and_may_end_within_one():
    words = {0: b"the ", 1: b"caf", 2: "é".encode()[:1], 3: "é".encode()[1:] + b"s"}
    encoding = SimpleNamespace(
        n_vocab=4, _mergeable_ranks={word: rank for rank, word in words.items()}, decode_single_token_bytes=words.get
    )
    assert pieces([0, 1, 2, 3], encoding) == [Piece("the ", 0, 1), Piece("caf", 1, 2), Piece("és", 2, 4)]

"""Held-out figures against sums by hand, and their standard error against the spread that it claims."""

from __future__ import annotations

import json
import math
import statistics

import pytest
import torch

from ltm_pyro.data import get_tokenizer, tokenize
from ltm_pyro.evaluation.estimators import BlockNats, Estimate
from ltm_pyro.evaluation.figures import (
    Document,
    Figure,
    chosen_sequences,
    difference,
    order_zero_bits_per_byte,
    per_token,
    ratio_error,
    validation_sequences,
)
from ltm_pyro.models import TokenBatch

BYTES = get_tokenizer("bytes")


def estimate(nll: list[float], kl: list[float], variance: list[float], num_samples: int = 4) -> Estimate:
    """`variance` is that of one draw of z."""
    nll, kl, variance = (torch.tensor(value, dtype=torch.float64) for value in (nll, kl, variance))
    return Estimate(nll + kl, "vi", num_samples, kl=kl, variance=variance / num_samples)


def batch(num_tokens: list[int], num_bytes: list[int]) -> TokenBatch:
    weights = torch.arange(max(num_tokens)) < torch.tensor(num_tokens)[:, None]
    return TokenBatch(
        torch.zeros(weights.shape, dtype=torch.long),
        weights.float(),
        torch.arange(len(weights)),
        torch.tensor(num_bytes),
    )


def held_out(documents: list[tuple[float, int]]) -> Figure:
    """One document a row: (nats, predicted tokens)."""
    total = Figure("elbo", 4)
    nats, num_tokens = [nats for nats, _ in documents], [num_tokens for _, num_tokens in documents]
    zeros = [0.0] * len(documents)
    total.add(estimate(nats, zeros, zeros), batch(num_tokens, num_tokens), torch.arange(len(documents)))
    return total


@pytest.fixture
def by_hand() -> Figure:
    """Two batches of three sequences and one, from the documents 7, 9, 7 and 9."""
    total = Figure("elbo", 4)
    first = estimate([3.0, 5.0, 2.0], [1.0, 0.5, 0.0], [4.0, 16.0, 0.0])
    total.add(first, batch([2, 4, 1], [6, 12, 0]), torch.tensor([7, 9, 7]))
    total.add(estimate([6.0], [2.5], [44.0]), batch([3], [7]), torch.tensor([9]))
    return total


def test_figures_of_parts_join_to_that_of_all(by_hand):
    """Of the documents 7 and 9, which lie in both parts; the third part holds no text, as that of an idle process."""
    total, second = Figure("elbo", 4), Figure("elbo", 4)
    first = estimate([3.0, 5.0], [1.0, 0.5], [4.0, 16.0])
    total.add(first, batch([2, 4], [6, 12]), torch.tensor([7, 9]))
    second.add(estimate([2.0, 6.0], [0.0, 2.5], [0.0, 44.0]), batch([1, 3], [0, 7]), torch.tensor([7, 9]))
    total.join(second)
    total.join(Figure("elbo", 4))
    assert total.record() == by_hand.record()
    assert total.documents == by_hand.documents
    from_nothing = Figure("elbo", 4)
    from_nothing.join(total)
    assert from_nothing.record() == by_hand.record()


def test_joined_figures_have_the_weights_of_all():
    """And none, where the figure has no such part."""
    total = Figure("iwae", 4, effective_sample_sizes=[1.0], pareto_ks=[0.2], num_sequences=1)
    total.join(Figure("iwae", 4, effective_sample_sizes=[3.0], pareto_ks=[0.4], num_sequences=1))
    assert (total.effective_sample_sizes, total.pareto_ks) == ([1.0, 3.0], [0.2, 0.4])
    assert (total.kl, total.variance) == (None, None)


def test_nats_tokens_and_bytes_are_totals_over_all_sequences(by_hand):
    assert (by_hand.nats, by_hand.kl) == (20.0, 4.0)
    assert (by_hand.num_tokens, by_hand.num_bytes, by_hand.num_sequences) == (10, 25, 4)
    assert by_hand.documents == {7: Document(6.0, 3, 6), 9: Document(14.0, 7, 19)}


def test_the_record_is_totals_over_totals(by_hand):
    record = by_hand.record()
    assert record["nelbo_nats_per_token"] == pytest.approx(2.0)
    assert record["nll_nats_per_token"] == pytest.approx(1.6)
    assert record["kl_nats_per_token"] == pytest.approx(0.4)
    assert record["bits_per_byte"] == pytest.approx(20 / 0.6931471805599453 / 25)
    assert record["perplexity"] == pytest.approx(math.e**2)
    # The variances of the four means of 4 draws add up to 16 nats squared.
    assert record["monte_carlo_standard_error"] == pytest.approx(4 / 10)
    # Both documents have 2 nats per token: they do not differ at all.
    assert record["standard_error"] == 0
    assert (record["num_tokens"], record["num_sequences"], record["num_samples"], record["fast_steps"]) == (10, 4, 4, 4)
    assert json.loads(json.dumps(record, allow_nan=False)) == record


def test_the_printed_line_has_the_figures_of_the_record(by_hand):
    bits, rate = 20 / math.log(2) / 25, 4 / math.log(2) / 25
    assert str(by_hand) == (
        f"z from vi: at most {bits:.3f} bits/byte, of which KL {rate:.3f}; 2.000 ± 0.000 (over documents) nats/token "
        "[elbo, T = 4, 4 pieces, 4 draws]"
    )


def test_texts_without_bytes_have_no_bits_per_byte():
    total = Figure("elbo", 4)
    total.add(estimate([3.0], [1.0], [0.0]), batch([2], [0]), torch.tensor([0]))
    assert total.record()["bits_per_byte"] is None
    assert str(total) == "z from vi: 2.000 nats/token [elbo, T = 4, 1 piece, 4 draws]"


def test_one_document_says_nothing_of_others_however_many_sequences_it_has():
    total = Figure("elbo", 4)
    total.add(estimate([3.0, 4.0], [1.0, 1.0], [0.0, 0.0]), batch([2, 2], [2, 2]), torch.tensor([5, 5]))
    assert total.standard_error is None


def test_the_standard_error_of_documents_of_one_length_is_that_of_a_mean():
    nats = [3.0, 5.5, 4.0, 9.0, 1.5]
    expected = statistics.stdev(nats) / math.sqrt(5) / 8
    assert held_out([(value, 8) for value in nats]).standard_error == pytest.approx(expected)


def test_the_standard_error_counts_documents_and_not_their_pieces():
    whole = held_out([(7.0, 4), (12.0, 5), (3.0, 3)])
    pieces = Figure("elbo", 4)
    zeros = [0.0] * 4
    pieces.add(
        estimate([3.0, 12.0, 4.0, 3.0], zeros, zeros), batch([1, 5, 3, 3], [1, 5, 3, 3]), torch.tensor([0, 1, 0, 2])
    )
    assert pieces.standard_error == pytest.approx(whole.standard_error)


@pytest.mark.parametrize(("num_documents", "spread"), [(200, 0.3), (20, 0.3), (20, 1.0), (20, 1.5), (13, 1.0)])
def test_the_standard_error_is_the_spread_over_other_documents_drawn_alike(num_documents, spread):
    """1,500 sets of documents whose sizes differ by a factor of e^spread, and nats per document and per token.

    The root mean square is compared, which an unbiased variance has. 1,500 draws know a standard deviation to 2 %.
    """
    generator = torch.Generator().manual_seed(0)
    ratios, errors = [], []
    for _ in range(1500):
        sizes = (spread * torch.randn(num_documents, generator=generator, dtype=torch.float64)).exp()
        num_tokens = (200 * sizes).ceil().long()
        rate = 2 + 0.5 * torch.randn(num_documents, generator=generator, dtype=torch.float64)
        nats = rate * num_tokens + 3 * torch.randn(num_documents, generator=generator, dtype=torch.float64)
        total = Figure("elbo", 4)
        rows = zip(nats.tolist(), num_tokens.tolist(), strict=True)
        total.documents = {number: Document(*row) for number, row in enumerate(rows)}
        ratios.append(total.record()["nats_per_token"])
        errors.append(total.standard_error)
    mean_square = math.sqrt(statistics.fmean(error**2 for error in errors))
    assert 0.92 < mean_square / statistics.stdev(ratios) < 1.2


def test_a_document_that_has_all_of_the_text_says_nothing_of_others():
    assert ratio_error([(3.0, 4), (0.0, 0)]) is None


def test_figures_per_token_by_hand():
    figures = per_token(nats=8.0, kl=2.0, num_tokens=4, num_bytes=16)
    assert figures == {
        "nelbo_nats_per_token": 2.0,
        "nll_nats_per_token": 1.5,
        "kl_nats_per_token": 0.5,
        "bits_per_byte": pytest.approx(0.5 * math.log2(math.e)),
        "perplexity": pytest.approx(7.389056098930650),
    }


def test_a_figure_that_is_no_elbo_has_no_parts():
    figures = per_token(nats=8.0, kl=None, num_tokens=4, num_bytes=16)
    assert [name for name, value in figures.items() if value is None] == [
        "nelbo_nats_per_token",
        "nll_nats_per_token",
        "kl_nats_per_token",
    ]
    assert figures["perplexity"] == pytest.approx(math.exp(2))


def test_diagnostics_are_medians_over_the_sequences_that_have_them():
    total = Figure("iwae", 4)
    values = [torch.tensor(value, dtype=torch.float64) for value in ([3.0, 4.0, 5.0], [1.0, 9.0, 2.0])]
    ks = torch.tensor([0.2, math.nan, 0.4], dtype=torch.float64)
    scores = Estimate(values[0], "vi", 64, variance=values[0], effective_sample_size=values[1], pareto_k=ks)
    total.add(scores, batch([2, 2, 2], [2, 2, 2]), torch.arange(3))
    record = total.record()
    assert record["effective_sample_size"] == 2
    assert record["pareto_k"] == pytest.approx(0.3)
    assert record["heavy_tailed"] == 0
    assert record["monte_carlo_standard_error"] == pytest.approx(math.sqrt(12) / 6)
    assert record["nelbo_nats_per_token"] is None
    assert record["valid_bound"]


@pytest.mark.parametrize(
    ("ks", "share"),
    [([0.5, 0.1, 0.1], 1 / 3), ([math.inf, 0.1, 0.2], 1 / 3), ([0.5, math.nan, 0.1], 1 / 2), ([0.46, 9.0, 0.5], 1)],
)
def test_one_text_with_weights_of_a_heavy_tail_takes_the_monte_carlo_error_away(ks, share):
    """Of 64 draws, a k̂ of 0.45 is the highest that can be trusted; the median says nothing of the worst texts."""
    nats, ks = torch.tensor([3.0, 4.0, 5.0]).double(), torch.tensor(ks, dtype=torch.float64)
    total = Figure("iwae", 4)
    scores = Estimate(nats, "vi", 64, variance=nats, effective_sample_size=nats, pareto_k=ks)
    total.add(scores, batch([2, 2, 2], [2, 2, 2]), torch.arange(3))
    assert total.record()["monte_carlo_standard_error"] is None
    assert total.record()["heavy_tailed"] == pytest.approx(share)


@pytest.mark.parametrize(
    ("name", "nats", "is_valid"),
    [("elbo", 3.0, True), ("exact", 3.0, True), ("reused-noise", 3.0, False), ("elbo", math.inf, False)],
)
def test_what_is_a_valid_figure(name, nats, is_valid):
    total = Figure(name, 4)
    total.add(Estimate(torch.tensor([nats]), "vi", 1), batch([2], [2]), torch.arange(1))
    assert total.is_valid is is_valid
    assert total.record()["valid_bound"] is is_valid
    assert ("NOT A BOUND" in str(total)) is not is_valid


def test_a_difference_is_paired_over_documents():
    """The figures differ by 0.5 bits a byte in every document, though the documents differ much more."""
    sizes = [4, 10, 6]
    first, second = Figure("exact", 0), Figure("elbo", 4)
    for figure, excess in ((first, 0.0), (second, 0.5)):
        nats = [math.log(2) * size * (number + excess) for number, size in enumerate(sizes, start=1)]
        figure.documents = {number: Document(*row) for number, row in enumerate(zip(nats, sizes, sizes, strict=True))}
    value, error = difference(second, first)
    assert value == pytest.approx(0.5)
    assert error == pytest.approx(0, abs=1e-12)
    assert difference(first, second)[0] == pytest.approx(-0.5)
    del second.documents[2]
    with pytest.raises(ValueError, match="same texts"):
        difference(second, first)


def test_a_perplexity_beyond_floating_point_does_not_exist():
    assert per_token(nats=1e4, kl=0.0, num_tokens=1, num_bytes=0)["perplexity"] is None
    assert per_token(nats=math.nan, kl=0.0, num_tokens=1, num_bytes=1)["perplexity"] is None


def test_a_uniform_byte_over_the_vocabulary_costs_8_bits():
    assert per_token(nats=10 * math.log(256), kl=0.0, num_tokens=10, num_bytes=10)["bits_per_byte"] == pytest.approx(8)


@pytest.mark.parametrize(
    ("texts", "bits"),
    [
        (["abcd", "dcba", "aabbccdd"], 2),
        (["ab"] * 50, 1),
        (["aaab"], 0.75 * math.log2(4 / 3) + 0.25 * 2),
        (["éé"], 1),  # C3 A9: bytes, not characters
        (["aaaa", "a"], 0),
        (["", "ab"], 1),
    ],
)
def test_the_entropy_of_single_bytes(texts, bits):
    assert order_zero_bits_per_byte(tokenize(texts, BYTES), BYTES) == pytest.approx(bits, abs=1e-12)


def test_an_entropy_is_never_printed_with_a_minus():
    assert f"{order_zero_bits_per_byte(tokenize(['aaaa'], BYTES), BYTES):.3f}" == "0.000"


def test_diagnostics_are_of_all_batches():
    total = Figure("iwae", 4)
    for size, k in ((1.0, 0.1), (2.0, 0.2), (6.0, 0.6)):
        one = [torch.tensor([value], dtype=torch.float64) for value in (3.0, size, k)]
        scores = Estimate(one[0], "vi", 16, variance=one[0], effective_sample_size=one[1], pareto_k=one[2])
        total.add(scores, batch([2], [2]), torch.arange(1))
    record = total.record()
    assert record["effective_sample_size"] == 2
    assert record["pareto_k"] == pytest.approx(0.2)


def test_the_chosen_sequences_are_of_all_and_every_time_the_same():
    chosen = chosen_sequences(10_000, 100)
    assert len(set(chosen.tolist())) == 100
    assert chosen.tolist() == chosen_sequences(10_000, 100).tolist()
    assert chosen.tolist()[:30] == chosen_sequences(10_000, 30).tolist()
    assert abs(chosen.mean() - 5000) < 5 * 10_000 / math.sqrt(12 * 100)
    assert sorted(chosen_sequences(7, 20).tolist()) == list(range(7))


@pytest.mark.parametrize(("num_sequences", "num_validation"), [(1000, 16), (70, 16), (20, 16), (5, 16), (2, 1), (7, 3)])
def test_what_validation_has_seen_is_not_scored_and_all_else_can_be(num_sequences, num_validation):
    seen = validation_sequences(num_sequences, num_validation).tolist()
    scored = chosen_sequences(num_sequences, num_sequences, num_validation).tolist()
    assert sorted(seen + scored) == list(range(num_sequences))
    assert len(seen) == min(num_validation, num_sequences // 2)
    few = chosen_sequences(num_sequences, 3, num_validation).tolist()
    assert few == chosen_sequences(num_sequences, num_sequences)[: len(few)].tolist()


def test_a_single_sequence_is_validated_and_scored():
    assert validation_sequences(1, 16).tolist() == chosen_sequences(1, 64, 16).tolist() == [0]


def test_the_nats_of_blocks_are_those_of_all_texts_at_the_same_positions():
    first = Estimate(
        torch.tensor([6.0, 5.0]), "map", 1, by_block=BlockNats(2, torch.tensor([[1.0, 2.0], [2.0, 3.0], [3.0, 0.0]]))
    )
    second = Estimate(torch.tensor([4.0]), "map", 1, by_block=BlockNats(2, torch.tensor([[4.0]])))
    parts = Figure("prequential", 1), Figure("prequential", 1)
    parts[0].add(first, batch([5, 3], [5, 3]), torch.tensor([0, 1]))
    parts[1].add(second, batch([2], [2]), torch.tensor([2]))
    parts[0].join(parts[1])
    assert parts[0].by_position() == [
        {"first": 0, "num_tokens": 6, "nats_per_token": 7 / 6},
        {"first": 2, "num_tokens": 3, "nats_per_token": 5 / 3},
        {"first": 4, "num_tokens": 1, "nats_per_token": 3.0},
    ]
    assert held_out([(3.0, 2)]).by_position() == []

"""Packing: no token is lost or doubled, bytes add up, and padding counts nothing."""

import itertools

import pytest
import tiktoken
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from ltm_pyro.data import packing
from ltm_pyro.data.documents import tokenize
from ltm_pyro.data.packing import PACKING
from ltm_pyro.data.tokenizers import get_tokenizer

BYTES = get_tokenizer("bytes")
MERGING = tiktoken.Encoding(
    "merging",
    pat_str=r"\w+|\W+",
    mergeable_ranks={bytes([byte]): byte for byte in range(256)} | {b"th": 256, b"the": 257},
    special_tokens={"<|endoftext|>": 258, "<|beginoftext|>": 259},
)

# Texts of few letters, so that merges and characters of several bytes are common.
TEXTS = st.lists(st.text(alphabet="the é\U0001f642", max_size=30), min_size=1, max_size=8)
ENCODINGS = st.sampled_from([BYTES, MERGING])
LENGTHS = st.integers(1, 12)


def pack_by_document(texts, encoding, length):
    return packing.pack_by_document(tokenize(texts, encoding), encoding, length)


def pack_as_stream(texts, encoding, length):
    return packing.pack_as_stream(tokenize(texts, encoding), encoding, length)


def whole(packed):
    """All sequences as one batch."""
    return packed.batch(range(len(packed)))


def predicted(packed):
    """The tokens that weigh 1 in each sequence, and a check that those of weight 0 come behind them."""
    batch = whole(packed)
    counts = batch.weights.sum(dim=1).long()
    assert (batch.weights == (torch.arange(batch.tokens.shape[1]) < counts[:, None])).all()
    return [tokens[:count].tolist() for tokens, count in zip(batch.tokens, counts, strict=True)]


def joined(pieces):
    return list(itertools.chain.from_iterable(pieces))


def expected(documents, encoding):
    return [[*encoding.encode_ordinary(document), encoding.eot_token] for document in documents]


@given(TEXTS, ENCODINGS, LENGTHS)
def test_by_document_each_document_comes_back_from_its_own_sequences(documents, encoding, length):
    wanted = expected(documents, encoding)
    assume(len(joined(wanted)) >= length)
    packed = pack_by_document(documents, encoding, length)
    sequences = iter(predicted(packed))
    for tokens in wanted:
        pieces = [next(sequences) for _ in range(-(-len(tokens) // length))]
        assert joined(pieces) == tokens
        assert all(len(piece) == length for piece in pieces[:-1])
    assert next(sequences, None) is None
    assert whole(packed).num_bytes.sum() == sum(len(document.encode()) for document in documents)


@given(TEXTS, ENCODINGS, LENGTHS)
def test_as_stream_the_documents_follow_each_other_without_padding(documents, encoding, length):
    wanted = joined(expected(documents, encoding))
    assume(len(wanted) >= length)
    packed = pack_as_stream(documents, encoding, length)
    sequences = predicted(packed)
    assert joined(sequences) == wanted
    assert all(len(sequence) == length for sequence in sequences[:-1])
    assert whole(packed).num_bytes.sum() == sum(len(document.encode()) for document in documents)


def test_an_example_worked_by_hand():
    by_document = pack_by_document(["abé", "c", ""], BYTES, 3)
    assert whole(by_document).tokens.tolist() == [[97, 98, 0xC3], [0xA9, 256, 256], [99, 256, 256], [256, 256, 256]]
    assert by_document.num_tokens.tolist() == [3, 2, 2, 1]
    assert whole(by_document).num_bytes.tolist() == [3, 1, 1, 0]
    stream = pack_as_stream(["abé", "c", ""], BYTES, 3)
    assert whole(stream).tokens.tolist() == [[97, 98, 0xC3], [0xA9, 256, 99], [256, 256, 256]]
    assert stream.num_tokens.tolist() == [3, 3, 2]
    assert whole(stream).num_bytes.tolist() == [3, 2, 0]


def test_bytes_of_merged_tokens():
    packed = pack_by_document(["the they"], MERGING, 2)  # the | " " / the | y / end
    assert whole(packed).num_bytes.tolist() == [4, 4, 0]


def test_special_tokens_written_in_a_text_are_text():
    packed = pack_as_stream(["<|endoftext|>"], BYTES, 14)
    assert whole(packed).tokens[0].tolist() == [*b"<|endoftext|>", 256]
    assert whole(packed).num_bytes.tolist() == [13]


def test_a_batch_names_its_sequences_in_the_order_asked_for():
    packed = pack_by_document(["abcd", "e"], BYTES, 3)
    batch = packed.batch(torch.tensor([2, 0]))
    assert batch.tokens.tolist() == [[101, 256, 256], [97, 98, 99]]
    assert batch.weights.tolist() == [[1, 1, 0], [1, 1, 1]]
    assert batch.sequence_ids.tolist() == [2, 0]
    assert batch.num_bytes.tolist() == [1, 3]
    assert (batch.tokens.dtype, batch.weights.dtype) == (torch.int64, torch.float32)
    assert len(packed) == 3


@pytest.mark.parametrize("pack", PACKING.values(), ids=PACKING)
def test_text_shorter_than_a_sequence_is_one_sequence_with_padding(pack):
    packed = pack(tokenize(["abc"], BYTES), BYTES, 9)
    assert len(packed) == 1
    assert packed.num_tokens.tolist() == [4]


def test_sequences_of_one_document_share_its_id_and_those_of_a_stream_have_their_own():
    assert pack_by_document(["abcde", "f"], BYTES, 3).document_ids.tolist() == [0, 0, 1]
    assert pack_as_stream(["abcde", "f"], BYTES, 3).document_ids.tolist() == [0, 1, 2]


@pytest.mark.parametrize("packing", PACKING)
@pytest.mark.parametrize("length", [1, 2, 3, 5, 100])
@pytest.mark.parametrize("tokenizer", ["bytes", "merged"])
def test_words_are_those_of_the_documents_wherever_sequences_end(packing, length, tokenizer):
    """As Python's split of each text finds them, whose only white space here is ASCII's."""
    texts = ["two words", "  with\tmargins \n", "", "ünïcode, 漢字 and hyphen-ated", "x", " "]
    encoding = get_tokenizer("bytes") if tokenizer == "bytes" else merged()
    packed = PACKING[packing](tokenize(texts, encoding), encoding, length)
    assert packed.num_words(range(len(packed))) == sum(len(text.split()) for text in texts) == 9
    assert sum(packed.num_words([index]) for index in reversed(range(len(packed)))) == 9


def test_a_word_is_counted_where_it_begins():
    encoding = get_tokenizer("bytes")
    packed = PACKING["document"](tokenize(["one three", "a"], encoding), encoding, 5)
    # "one t", "hree" and end-of-text, "a" and end-of-text
    assert [packed.num_words([index]) for index in range(3)] == [2, 0, 1]


def merged() -> tiktoken.Encoding:
    """Bytes, and tokens of several, one of which has white space inside."""
    ranks = {bytes([byte]): byte for byte in range(256)}
    ranks |= {b"wo": 256, b"s\t": 257, b"d ": 258}
    end = "<|endoftext|>"
    return tiktoken.Encoding(
        "merged", pat_str=r"(?s).+", mergeable_ranks=ranks, special_tokens={end: 259, "<|beginoftext|>": 260}
    )

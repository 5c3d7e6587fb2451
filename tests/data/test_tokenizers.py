"""Tokenizers: round trips, the ids of the special tokens, and errors that say what to do."""

import random

import numpy as np
import pytest
import requests
import tiktoken
from hypothesis import given
from hypothesis import strategies as st

from ltm_pyro.data.tokenizers import begin_of_text, encode, end_of_text, fingerprint, get_tokenizer, token_num_bytes
from ltm_pyro.errors import InputError

BYTES = get_tokenizer("bytes")


def small_encoding(**changes):
    """An encoding of 261 ids: the bytes, two merges, an id that nothing uses, and an end-of-text."""
    ranks = {bytes([byte]): byte for byte in range(256)} | {b"th": 256, b"the": 257}
    settings = {"pat_str": r"\w+|\W+", "mergeable_ranks": ranks, "special_tokens": {"<|endoftext|>": 260}}
    return tiktoken.Encoding("small", **(settings | changes))


GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"


@pytest.fixture
def merging():
    """An encoding with GPT-2's pattern, and merges of blanks."""
    ranks = {bytes([byte]): byte for byte in range(256)} | {b"  ": 256, b"    ": 257, b" a": 258, b"\n\n": 259}
    return small_encoding(pat_str=GPT2_PATTERN, mergeable_ranks=ranks)


@pytest.fixture
def small(monkeypatch):
    """Makes the small encoding one that tiktoken knows by the name `small`."""
    monkeypatch.setattr(tiktoken, "list_encoding_names", lambda: ["small"])
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: small_encoding())


@given(st.text())
def test_bytes_tokens_are_the_bytes_of_the_text(text):
    tokens = BYTES.encode_ordinary(text)
    assert bytes(tokens) == text.encode()
    assert BYTES.decode(tokens) == text


@pytest.mark.parametrize("character", ["a", "\n", "é", "\U0001f642"])
def test_bytes_tokens_of_a_text_longer_than_one_piece(character):
    text = character * 1000
    assert bytes(BYTES.encode_ordinary(text)) == text.encode()


def test_bytes_has_the_two_special_tokens_last():
    assert (end_of_text(BYTES), begin_of_text(BYTES), BYTES.n_vocab) == (256, 257, 258)


def test_a_tiktoken_encoding_gets_a_begin_of_text_as_its_last_id(small):
    encoding = get_tokenizer("small")
    assert (end_of_text(encoding), begin_of_text(encoding), encoding.n_vocab) == (260, 261, 262)
    text = "the thing that <|endoftext|> <|beginoftext|>"
    assert encoding.encode_ordinary(text) == small_encoding().encode_ordinary(text)


def test_token_num_bytes_counts_merges_and_gives_zero_to_what_is_no_text(small):
    num_bytes = token_num_bytes(get_tokenizer("small"))
    assert num_bytes.tolist() == [1] * 256 + [2, 3, 0, 0, 0, 0]
    assert np.issubdtype(num_bytes.dtype, np.integer)


def test_an_unknown_name_lists_the_names_that_exist():
    with pytest.raises(InputError) as error:
        get_tokenizer("no-such-tokenizer")
    message = str(error.value)
    assert "\n" not in message
    assert all(name in message for name in ["no-such-tokenizer", "bytes", *tiktoken.list_encoding_names()])


@pytest.mark.parametrize("failure", [requests.ConnectionError("no\nnetwork"), ValueError("Hash mismatch")])
def test_a_failing_download_says_how_to_go_without_a_network(monkeypatch, failure):
    def get_encoding(name):
        raise failure

    monkeypatch.setattr(tiktoken, "get_encoding", get_encoding)
    with pytest.raises(InputError, match="TIKTOKEN_CACHE_DIR") as error:
        get_tokenizer("gpt2")
    assert "\n" not in str(error.value)


def test_an_encoding_without_end_of_text_is_refused(monkeypatch, small):
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: small_encoding(special_tokens={}))
    with pytest.raises(InputError, match="endoftext"):
        get_tokenizer("small")


def test_the_fingerprint_is_that_of_the_contents():
    assert fingerprint(small_encoding()) == fingerprint(small_encoding())
    swapped = {bytes([byte]): byte for byte in range(256)} | {b"the": 256, b"th": 257}
    different = [
        small_encoding(),
        small_encoding(pat_str=r"\w+|\W"),
        small_encoding(mergeable_ranks=swapped),
        small_encoding(special_tokens={"<|endoftext|>": 259}),
        BYTES,
    ]
    assert len({fingerprint(encoding) for encoding in different}) == len(different)


BLANKS = {
    "blanks": "left" + " " * 1_000_000 + "right",
    "line ends": "left" + "\n" * 1_000_000,
    "both": "left" + " \n" * 500_000 + "right",
    "wide blanks": "\u3000" * 1_000_000 + "x",
}


@pytest.mark.parametrize("name", ["bytes", "merging"])
@pytest.mark.parametrize("run", BLANKS)
def test_a_run_of_a_million_blanks_is_encoded(name, run, merging):
    """tiktoken panics on it where the pattern looks for the end of the run, as GPT-2's does."""
    encoding = get_tokenizer("bytes") if name == "bytes" else merging
    text = BLANKS[run]
    assert encoding.decode(encode(text, encoding).tolist()) == text


@pytest.mark.parametrize("seed", range(20))
def test_text_with_a_long_run_has_the_tokens_that_tiktoken_gives(seed, merging, monkeypatch):
    """With a bound so low that every text is taken the other way."""
    generator = random.Random(seed)
    characters = " \n\t\r\x0b\x85\u3000ab'sll1.é漢😀<|endoftext|>"
    text = "".join(generator.choice(characters) for _ in range(200))
    monkeypatch.setattr("ltm_pyro.data.tokenizers.LONG_RUN", 1)
    with_runs = text + "  end"
    assert encode(with_runs, merging).tolist() == merging.encode_ordinary(with_runs)

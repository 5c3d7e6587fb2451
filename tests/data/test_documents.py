"""Documents as tokens: what is read is what tiktoken gives, however the documents lie in arrays and are selected."""

import itertools

import numpy as np
import pytest
import tiktoken
from hypothesis import given
from hypothesis import strategies as st

from ltm_pyro.data.documents import Documents, TokenizedTexts, encode_document, token_dtype, tokenize
from ltm_pyro.data.tokenizers import get_tokenizer
from ltm_pyro.errors import InputError

BYTES = get_tokenizer("bytes")
MERGING = tiktoken.Encoding(
    "merging",
    pat_str=r"\w+|\W+",
    mergeable_ranks={bytes([byte]): byte for byte in range(256)} | {b"th": 256, b"the": 257},
    special_tokens={"<|endoftext|>": 258, "<|beginoftext|>": 259},
)
ENCODINGS = pytest.mark.parametrize("encoding", [BYTES, MERGING], ids=["bytes", "merging"])
TEXTS = ["the they é", "", "<|endoftext|>"]


def joined(lists):
    return list(itertools.chain.from_iterable(lists))


@ENCODINGS
def test_a_document_is_what_tiktoken_gives_and_its_end(encoding):
    documents = tokenize(TEXTS, encoding)
    expected = [[*encoding.encode_ordinary(text), encoding.eot_token] for text in TEXTS]
    assert documents.sizes.tolist() == [len(tokens) for tokens in expected]
    assert documents.read(0, documents.num_tokens).tolist() == joined(expected)
    for number, text in enumerate(TEXTS):
        assert encode_document(text, encoding).tolist() == expected[number]
        alone = documents.select(np.array([number]))
        assert alone.read(0, alone.num_tokens).tolist() == expected[number]


@given(st.data())
def test_any_stretch_of_any_selection_is_read_from_any_arrays(data):
    """The oracle is Python's lists, joined."""
    sizes = data.draw(st.lists(st.lists(st.integers(1, 5), max_size=4), min_size=1, max_size=4))
    arrays = [np.arange(sum(inside), dtype=np.uint16) + 100 * number for number, inside in enumerate(sizes)]
    bounds = np.cumsum([0, *joined(sizes)])
    lists = [np.concatenate(arrays).tolist()[a:b] for a, b in itertools.pairwise(bounds)]
    mask = np.array(data.draw(st.lists(st.booleans(), min_size=len(lists), max_size=len(lists))), dtype=bool)
    expected = joined(itertools.compress(lists, mask))
    documents = Documents(arrays, bounds[:-1], np.diff(bounds)).select(mask)
    assert documents.num_tokens == len(expected)
    if expected:
        start = data.draw(st.integers(0, len(expected) - 1))
        stop = data.draw(st.integers(start + 1, len(expected)))
        assert documents.read(start, stop).tolist() == expected[start:stop]
        assert documents.counts(1000).tolist() == [expected.count(token) for token in range(1000)]


def test_documents_that_lie_next_to_each_other_are_read_where_they_are():
    array = np.arange(12, dtype=np.uint16)
    documents = Documents([array], np.array([0, 3, 6, 9]), np.array([3, 3, 3, 3]))
    assert np.shares_memory(documents.select(np.array([1, 2])).read(1, 5), array)


def test_tokens_take_the_smallest_type_that_holds_them():
    assert [token_dtype(size) for size in (258, 2**16, 2**16 + 1)] == ["<u2", "<u2", "<u4"]
    assert encode_document("a", BYTES).dtype == "<u2"


@ENCODINGS
def test_a_lone_surrogate_is_refused(encoding):
    with pytest.raises(InputError, match=r"not valid Unicode .* character 2") as error:
        tokenize(["fine", "no\ud800"], encoding)
    assert "\n" not in str(error.value)


def test_a_token_that_the_vocabulary_does_not_have_is_refused():
    damaged = Documents([np.array([1, 259], dtype=np.uint16)], np.array([0]), np.array([2]))
    with pytest.raises(InputError, match=r"token 259, but its vocabulary has 258.*--verify"):
        damaged.counts(258)


@ENCODINGS
def test_texts_are_read_back_from_a_selection_of_their_tokens(encoding):
    chosen = tokenize(TEXTS, encoding).select(np.array([2, 0, 1]))
    assert TokenizedTexts("texts", chosen, "").texts(encoding) == [TEXTS[2], TEXTS[0], TEXTS[1]]

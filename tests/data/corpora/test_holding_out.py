"""What is held out of a corpus that brings no validation split."""

import random

import pytest

from ltm_pyro.data.corpora import load_corpus


def test_one_document_in_twenty_is_held_out_whatever_their_order(write, json_lines, documents):
    first = load_corpus(write("first.jsonl", json_lines(documents)))
    shuffled = random.Random(0).sample(documents, len(documents))
    second = load_corpus(write("second.jsonl", json_lines(shuffled)))
    assert len(first.validation) == 3
    assert set(first.validation) == set(second.validation)


def test_equal_documents_fall_on_one_side(write, json_lines, documents):
    corpus = load_corpus(write("rows.jsonl", json_lines(documents * 3)))
    assert len(corpus.validation) == 9
    assert not set(corpus.train) & set(corpus.validation)


@pytest.mark.parametrize(("num_distinct", "by_document"), [(19, False), (20, True)])
def test_of_few_distinct_documents_the_ends_are_held_out(write, num_distinct, by_document, json_lines, documents):
    repeated = documents[:num_distinct] * 2
    corpus = load_corpus(write("rows.jsonl", json_lines(repeated)))
    assert len(corpus.validation) == (2 if by_document else len(repeated))
    if not by_document:
        assert [head + tail for head, tail in zip(corpus.train, corpus.validation, strict=True)] == repeated


def test_text_too_short_to_hold_any_out(write, refusal):
    assert "validate" in refusal(write("a.txt", "x"))

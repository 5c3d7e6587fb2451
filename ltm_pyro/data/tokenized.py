"""Corpora and texts as tokens: encoded when they are loaded, or mapped into memory where they are prepared corpora."""

from __future__ import annotations

from pathlib import Path

import tiktoken

from ltm_pyro.data.corpora import Texts, absolute, load_corpus, load_texts
from ltm_pyro.data.corpora.base import existing_path
from ltm_pyro.data.documents import TokenizedCorpus, TokenizedTexts, tokenize
from ltm_pyro.data.prepared import is_prepared, open_prepared, read_manifest


def load_tokenized_corpus(data: str, text_column: str | None, encoding: tiktoken.Encoding) -> TokenizedCorpus:
    """A prepared corpus, or all documents of another one, encoded.

    Args:
        data: a folder that `python -m ltm_pyro.prepare` has written, or as in
            :func:`~ltm_pyro.data.corpora.load_corpus`.
        text_column: as in :func:`~ltm_pyro.data.corpora.open_corpus`.
        encoding: a tokenizer of :func:`~ltm_pyro.data.tokenizers.get_tokenizer`.

    Raises:
        InputError: there is no such corpus, it cannot be read, or it was prepared with another tokenizer.
    """
    if is_prepared(data):
        return open_prepared(Path(data).expanduser(), encoding)
    corpus = load_corpus(data, text_column)
    validation = tokenize(corpus.validation, encoding)
    sha256 = Texts(corpus.name, corpus.validation).sha256
    held_out = TokenizedTexts.held_out_of(corpus.name, validation, sha256)
    return TokenizedCorpus(corpus.name, tokenize(corpus.train, encoding), held_out, corpus.sha256, corpus.parts)


def is_local(data: str) -> bool:
    """Whether a corpus lies in files: not one that comes with Python or from a network."""
    return absolute(data) != data or Path(data).is_absolute()


def is_there(data: str) -> bool:
    """Whether a corpus that lies in files is there."""
    return existing_path(data.partition("=")[2] or data) is not None


def load_corpus_sha256(data: str, text_column: str | None) -> str:
    """The hash of the corpus that :func:`load_tokenized_corpus` gives.

    Raises:
        InputError: there is no such corpus, or it cannot be read.
    """
    return read_manifest(Path(data).expanduser()).sha256 if is_prepared(data) else load_corpus(data, text_column).sha256


def load_tokenized_texts(data: str, text_column: str | None, encoding: tiktoken.Encoding) -> TokenizedTexts:
    """Texts to score, encoded; of a prepared corpus, what is held out of it.

    Args:
        data: a folder that `python -m ltm_pyro.prepare` has written, or as in
            :func:`~ltm_pyro.data.corpora.load_texts`.
        text_column: the column that holds the text, in files and data sets with columns; None as in
            :func:`~ltm_pyro.data.corpora.open_corpus`.
        encoding: a tokenizer of :func:`~ltm_pyro.data.tokenizers.get_tokenizer`.

    Raises:
        InputError: there are no such texts, they cannot be read, or they were prepared with another tokenizer.
    """
    if is_prepared(data):
        return open_prepared(Path(data).expanduser(), encoding).validation
    texts = load_texts(data, text_column)
    return TokenizedTexts(texts.name, tokenize(texts.documents, encoding), texts.sha256)

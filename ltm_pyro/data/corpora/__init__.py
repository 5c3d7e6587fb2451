"""Corpora: where texts come from, which of them are held out for validation, and which of them are scored.

To add a kind of corpus, write a :class:`~ltm_pyro.data.corpora.base.CorpusKind` in a file of its own and give it a line
in `CORPORA`: whatever takes `data` then takes it too, and help texts and errors name it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

from ltm_pyro.data.corpora.base import CorpusKind, CorpusSource, NotFound
from ltm_pyro.data.corpora.benchmark_sets import BenchmarkSets
from ltm_pyro.data.corpora.holding_out import hold_out, utf8
from ltm_pyro.data.corpora.hub import HuggingFaceHub
from ltm_pyro.data.corpora.local import LocalFiles
from ltm_pyro.data.corpora.python_docs import PYTHON_DOCS, PythonDocs
from ltm_pyro.errors import InputError

Opened = TypeVar("Opened")

CORPORA: dict[str, CorpusKind] = {
    PYTHON_DOCS: PythonDocs(),
    "benchmark set": BenchmarkSets(),
    "file or folder": LocalFiles(),
    "Hugging Face": HuggingFaceHub(),
}
"""The kinds of corpora, by what help texts call them. The first that recognises `data` opens it: names go before files
and folders, which `./` tells apart, and those before the hub."""


@dataclass(frozen=True)
class Corpus:
    """The documents of a corpus, none of them blank."""

    name: str
    """A short name that is fit for the name of a folder."""

    train: list[str]
    """The documents to learn from."""

    validation: list[str]
    """The documents held out."""

    parts: dict[str, str] = field(default_factory=dict)
    """What became of the files or rows of the corpus, for a reader: a line for each split, and for what is not read."""

    @property
    def sha256(self) -> str:
        """The SHA-256 (hexadecimal) of all documents in their order and the side on which they are: two figures
        compare only where it is equal."""
        return _sha256(self.train, self.validation)


@dataclass(frozen=True)
class Texts:
    """Documents to score, none of them blank."""

    name: str
    """What they are, in a word or two."""

    documents: list[str]
    """All that are to be scored."""

    @property
    def sha256(self) -> str:
        """The SHA-256 (hexadecimal) of the documents in their order: two figures compare only where it is equal."""
        return _sha256(self.documents)


def open_corpus(data: str, text_column: str | None = None, streaming: bool = False) -> CorpusSource:
    """Finds a corpus, whose documents are then read one after the other: never are all of them in memory.

    A split `validation` (or `valid`, `val`, `dev`) is there to validate on; a split `test` is never read. Documents
    without a visible character are dropped.

    Args:
        data: the name or the path of a corpus; each kind in :data:`CORPORA` says what it recognises.
        text_column: the column that holds the text, in files and data sets with columns. None: "text", or for a
            benchmark set its own.
        streaming: read a data set of the hub as it is downloaded, every time anew, instead of keeping it on the disk.

    Raises:
        InputError: there is no such corpus, it is not there to learn from, or it is to be streamed and is not on the
            hub; when its documents are read, that they cannot be.
        CutOff: when its documents are read, that no more of them come.
    """
    return _find(data, lambda kind: (kind.stream if streaming else kind.open)(data, text_column))


def load_corpus(data: str, text_column: str | None = None) -> Corpus:
    """Loads all documents of a corpus, and holds out a part of it where it brings no validation split of its own.

    What is then held out is the choice of :func:`~ltm_pyro.data.corpora.holding_out.hold_out`.

    Args:
        data: as in :func:`open_corpus`.
        text_column: as in :func:`open_corpus`.

    Raises:
        InputError: there is no such corpus, it cannot be read, or it holds no text.
    """
    source = open_corpus(data, text_column)
    train = source.train.documents()
    if not train:
        raise InputError(f"{data} holds no text to learn from")
    train, validation = (train, source.validation.documents()) if source.validation else hold_out(train)
    if not (train and validation):
        raise InputError(f"{data} holds no text to validate on; give more text")
    sizes = [sum(len(utf8(text)) for text in texts) for texts in (train, validation)]
    parts = parts_of(source, (len(train), sizes[0]), (len(validation), sizes[1]))
    return Corpus(source.name, train, validation, parts)


def parts_of(source: CorpusSource, train: tuple[int, int], validation: tuple[int, int]) -> dict[str, str]:
    """What became of a source, as in :class:`Corpus`, given the texts and bytes of both sides."""
    origins = {
        "train": source.train.origin,
        "validation": source.validation.origin if source.validation else "held out of train",
    }
    counts = dict(zip(origins, (train, validation), strict=True))
    parts = {
        part: f"{count:,} text{'s' * (count != 1)}, {size:,} bytes{f': {origins[part]}' if origins[part] else ''}"
        for part, (count, size) in counts.items()
    }
    return parts | {part: f"not read: {origin}" for part, origin in source.unread.items()}


def load_texts(data: str, text_column: str | None = None) -> Texts:
    """Loads documents to score. Nothing is held out of them.

    Each kind in :data:`CORPORA` says which of its documents are scored. Documents without a visible character are
    dropped.

    Args:
        data: as in :func:`open_corpus`.
        text_column: as in :func:`open_corpus`.

    Raises:
        InputError: there are no such texts, they cannot be read, or there is nothing to score in them.
    """
    name, split = _find(data, lambda kind: kind.open_to_score(data, text_column))
    documents = split.documents()
    if not documents:
        raise InputError(f"{data} holds no text to score")
    return Texts(name, documents)


def absolute(data: str) -> str:
    """The same corpus, named so that it is found from any folder."""
    return next((kind.absolute(data) for kind in CORPORA.values() if kind.recognises(data)), data)


def _find(data: str, opened: Callable[[CorpusKind], Opened]) -> Opened:
    """What is opened by the first kind of corpus that recognises `data`."""
    for kind in CORPORA.values():
        if kind.recognises(data):
            try:
                return opened(kind)
            except NotFound as error:
                *labels, last = (known.label for known in CORPORA.values())
                raise InputError(f"{data!r} is neither {', '.join(labels)}, nor {last}: {error}") from error
    raise InputError(f"there is no file or folder {data!r}; check the path")


def _sha256(*groups: list[str]) -> str:
    digest = hashlib.sha256()
    for documents in groups:
        digest.update(len(documents).to_bytes(8, "big"))
        for document in documents:
            contents = utf8(document)
            digest.update(len(contents).to_bytes(8, "big"))
            digest.update(contents)
    return digest.hexdigest()

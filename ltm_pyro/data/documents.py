"""Documents as tokens, in memory or in files that are mapped into it, read wherever they lie."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import tiktoken

from ltm_pyro.data.tokenizers import encode, end_of_text
from ltm_pyro.errors import InputError


@dataclass(frozen=True, eq=False)
class Documents:
    """Documents, each with its end-of-text. They may be a selection of those that the arrays hold."""

    arrays: Sequence[np.ndarray]
    """The token ids of the documents joined, [n] each, of any unsigned type."""

    starts: np.ndarray
    """Where each document starts, counted through all arrays, [D] int64."""

    sizes: np.ndarray
    """How many tokens each document has, end-of-text included, [D] int64. A document lies in one array."""

    def __len__(self) -> int:
        return len(self.sizes)

    @property
    def num_tokens(self) -> int:
        """How many tokens all documents have, end-of-text included."""
        return int(self.sizes.sum())

    def select(self, chosen: np.ndarray) -> Documents:
        """The documents with these numbers, in this order, or those where a mask is true."""
        return Documents(self.arrays, self.starts[chosen], self.sizes[chosen])

    def read(self, start: int, stop: int) -> np.ndarray:
        """The tokens `start` to `stop` of the documents joined."""
        runs = self._runs
        pieces = []
        for run in range(np.searchsorted(runs.stops, start, side="right"), len(runs.stops)):
            if start >= stop:
                break
            upto = min(stop, int(runs.stops[run]))
            shift = int(runs.shifts[run])
            pieces.append(self.arrays[runs.arrays[run]][start + shift : upto + shift])
            start = upto
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)

    def counts(self, vocab_size: int) -> np.ndarray:
        """How often each id occurs, [vocab_size] int64."""
        counts = np.zeros(vocab_size, dtype=np.int64)
        step = 2**20  # what `bincount` converts at a time
        for start in range(0, self.num_tokens, step):
            tokens = self.read(start, min(start + step, self.num_tokens))
            check_tokens(tokens, vocab_size)
            counts += np.bincount(tokens, minlength=vocab_size)
        return counts

    @functools.cached_property
    def _runs(self) -> _Runs:
        array_stops = np.cumsum([len(array) for array in self.arrays])
        arrays = np.searchsorted(array_stops, self.starts, side="right")
        follows = (self.starts[1:] == (self.starts + self.sizes)[:-1]) & (arrays[1:] == arrays[:-1])
        first = np.flatnonzero(np.concatenate([[True], ~follows]))
        stops = np.cumsum(self.sizes)
        before = (stops - self.sizes)[first]
        in_array = self.starts[first] - (array_stops - [len(array) for array in self.arrays])[arrays[first]]
        last = np.append(first[1:], len(self)) - 1
        return _Runs(stops[last], arrays[first], in_array - before)


@dataclass(frozen=True)
class _Runs:
    """The documents joined, as the fewest pieces of arrays."""

    stops: np.ndarray
    """Where each piece ends in the documents joined, [R]."""

    arrays: np.ndarray
    """The number of the array in which each piece lies, [R]."""

    shifts: np.ndarray
    """What to add to a position in the documents joined, to get the position in the array, [R]."""


@dataclass(frozen=True)
class TokenizedTexts:
    """Documents to score, as tokens."""

    name: str
    """What they are, in a word or two."""

    documents: Documents
    """All that are to be scored."""

    sha256: str
    """A hash of what is scored: two figures compare only where it is equal."""

    is_of_run: bool = False
    """Whether they are what the run that is scored has held out of its corpus, a part of it for validation."""

    def texts(self, encoding: tiktoken.Encoding) -> list[str]:
        """The texts of all documents, without their end-of-text."""
        stops = np.cumsum(self.documents.sizes)
        starts = stops - self.documents.sizes
        pieces = [self.documents.read(start, stop) for start, stop in zip(starts, stops, strict=True)]
        return [encoding.decode(piece[:-1].tolist()) for piece in pieces]

    @classmethod
    def held_out_of(cls, corpus: str, documents: Documents, sha256: str) -> TokenizedTexts:
        """What is held out of the corpus of this name."""
        return cls(f"{corpus}, held-out part", documents, sha256)


@dataclass(frozen=True)
class TokenizedCorpus:
    """The documents of a corpus, as tokens."""

    name: str
    """A short name that is fit for the name of a folder."""

    train: Documents
    """The documents to learn from."""

    validation: TokenizedTexts
    """The documents held out."""

    sha256: str
    """A hash of the documents and of which are held out: two figures compare only where it is equal."""

    parts: Mapping[str, str] = field(default_factory=dict)
    """What became of the files or rows of the corpus, for a reader: a line for each split, and for what is not read."""


def token_dtype(vocab_size: int) -> np.dtype[np.unsignedinteger]:
    """The smallest type, little-endian, that tokens are stored in."""
    return np.dtype("<u2" if vocab_size <= 2**16 else "<u4")


def check_tokens(tokens: np.ndarray, vocab_size: int) -> None:
    """Check that tokens are ids of a vocabulary.

    Raises:
        InputError: one is not, because the file that they were read from is damaged.
    """
    if tokens.size and (highest := tokens.max()) >= vocab_size:
        raise InputError(
            f"the corpus holds the token {highest}, but its vocabulary has {vocab_size:,}: one of its files is "
            "damaged; python -m ltm_pyro.prepare --verify --out FOLDER says which"
        )


def encode_document(text: str, encoding: tiktoken.Encoding) -> np.ndarray:
    """The tokens of a document and its end-of-text, [n] of :func:`token_dtype`.

    Raises:
        InputError: it is not valid Unicode.
    """
    return np.append(encode(text, encoding), np.uint32(end_of_text(encoding))).astype(token_dtype(encoding.n_vocab))


def byte_counts(documents: Documents, encoding: tiktoken.Encoding) -> np.ndarray:
    """How often each byte occurs in the texts, [256] float64.

    Raises:
        InputError: a file of the corpus is damaged.
    """
    counts = documents.counts(encoding.n_vocab)
    pieces = encoding._mergeable_ranks  # end-of-text has no bytes
    sizes = np.fromiter(map(len, pieces), dtype=np.int64)
    occurrences = np.repeat(counts[np.fromiter(pieces.values(), dtype=np.int64)], sizes)
    return np.bincount(np.frombuffer(b"".join(pieces), dtype=np.uint8), occurrences, minlength=256)


def tokenize(texts: Sequence[str], encoding: tiktoken.Encoding) -> Documents:
    """Encodes documents into memory.

    Raises:
        InputError: one is not valid Unicode.
    """
    encoded = [encode_document(text, encoding) for text in texts]
    sizes = np.array([len(tokens) for tokens in encoded], dtype=np.int64)
    return Documents([np.concatenate(encoded)], np.cumsum(sizes) - sizes, sizes)

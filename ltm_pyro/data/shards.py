"""Shards of prepared corpora: documents are encoded in several processes, and a shard appears whole or not at all."""

from __future__ import annotations

import collections
import hashlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tiktoken

from ltm_pyro.data.corpora.base import Reading
from ltm_pyro.data.corpora.holding_out import utf8
from ltm_pyro.data.documents import encode_document
from ltm_pyro.data.prepared import INDEX, Index, Shard, StoredFile, file_name
from ltm_pyro.errors import InputError
from ltm_pyro.files import durable

CHUNK_CHARACTERS = 2**19
"""A process encodes, at a time, as many documents as have this many characters together."""


@dataclass(frozen=True)
class Encoded:
    """Documents that follow each other."""

    tokens: np.ndarray
    """The tokens of all documents, each with its end-of-text, [n]."""

    index: Index
    """The index of the documents, [D] of INDEX, whose `end` counts from the first of these tokens."""

    def __len__(self) -> int:
        return len(self.index)

    def split(self, count: int) -> tuple[Encoded, Encoded]:
        """The first documents, at least one, and the others."""
        end = int(self.index["end"][count - 1])
        others = self.index[count:].copy()
        others["end"] -= end
        return Encoded(self.tokens[:end], self.index[:count]), Encoded(self.tokens[end:], others)


@dataclass(frozen=True)
class _Chunk:
    """Documents to encode together."""

    texts: list[str]
    """The documents."""
    share: float | None
    """The share of the whole that has been read with them; None where that is not known."""


def _index_of(texts: list[str]) -> Index:
    """The index of documents, before it is known where their tokens end."""
    index = np.zeros(len(texts), dtype=INDEX)
    contents = [utf8(text) for text in texts]
    index["num_bytes"] = [len(content) for content in contents]
    index["hash"] = [hash_of(content) for content in contents]
    return index


def hash_of(content: bytes) -> int:
    """The hash of a text in an index."""
    return int.from_bytes(hashlib.sha256(content).digest()[:8], "big")


def encoded(
    documents: Reading, encoding: tiktoken.Encoding, processes: int
) -> Generator[tuple[Encoded, float | None], None, None]:
    """Encodes documents in their order, and gives with each piece the share of the whole that has been read.

    Memory holds a few chunks of documents for every process.

    Args:
        documents: the documents as they are read.
        encoding: a tokenizer of :func:`~ltm_pyro.data.tokenizers.get_tokenizer`.
        processes: how many encode at the same time; 1 starts none.

    Raises:
        InputError: a document is not valid Unicode.
        BrokenProcessPool: a process has been killed.
    """
    chunks = _chunks(documents)
    if processes == 1:
        _start(encoding)
        yield from map(_encode_chunk, chunks)
        return
    pool = ProcessPoolExecutor(processes, initializer=_start_process, initargs=(encoding,))
    try:
        waiting: collections.deque[Future[tuple[Encoded, float | None]]] = collections.deque()
        for chunk in chunks:
            waiting.append(pool.submit(_encode_chunk, chunk))
            if len(waiting) > 2 * processes:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def _chunks(documents: Reading) -> Iterator[_Chunk]:
    texts: list[str] = []
    size = 0
    for text, share in documents:
        texts.append(text)
        size += len(text)
        if size >= CHUNK_CHARACTERS:
            yield _Chunk(texts, share)
            texts, size = [], 0
    if texts:
        yield _Chunk(texts, 1.0)


_encoding: tiktoken.Encoding
"""The tokenizer of this process."""


def _start(encoding: tiktoken.Encoding) -> None:
    global _encoding
    _encoding = encoding


def _start_process(encoding: tiktoken.Encoding) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all, but it is the command that stops its processes
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # by this, not by the handler that the command has for itself
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _start(encoding)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None  # this runs in the processes of a pool
    parent.join()
    os._exit(1)


def _encode_chunk(chunk: _Chunk) -> tuple[Encoded, float | None]:
    tokens = [encode_document(text, _encoding) for text in chunk.texts]
    index = _index_of(chunk.texts)
    index["end"] = np.cumsum([len(each) for each in tokens])
    return Encoded(np.concatenate(tokens), index), chunk.share


class ShardWriter:
    """Writes documents to shards, which depend on the documents alone.

    Args:
        folder: where the files go.
        split: TRAIN or VALIDATION.
        number: the number of the first shard.
        shard_tokens: a shard ends with the document with which it reaches this many tokens.
        finished: called with each shard once its files are on the disk.
    """

    def __init__(
        self, folder: Path, split: str, number: int, shard_tokens: int, finished: Callable[[Shard], None]
    ) -> None:
        self.folder, self.split, self.number = folder, split, number
        self.shard_tokens, self.finished = shard_tokens, finished
        self.begun: _BegunShard | None = None

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, *exception: object) -> None:
        if self.begun is not None:
            self.begun.file.close()

    def add(self, documents: Encoded) -> None:
        """Append documents, ending every shard that they fill."""
        while len(documents):
            self.begun = self.begun or _BegunShard(self.folder / f"{self._path('tokens').name}.partial")
            missing = self.shard_tokens - self.begun.num_tokens
            count = min(int(np.searchsorted(documents.index["end"], missing)) + 1, len(documents))
            part, documents = documents.split(count)
            self.begun.append(part)
            if self.begun.num_tokens >= self.shard_tokens:
                self.end()

    def end(self) -> None:
        """End the shard that has been begun, if there is one."""
        if self.begun is None:
            return
        shard = self.begun.write(self._path("tokens"), self._path("index"))
        self.begun = None
        self.number += 1
        self.finished(shard)

    def _path(self, kind: str) -> Path:
        return self.folder / file_name(self.split, self.number, kind)


class _BegunShard:
    """A shard that is being written, under a name of its own."""

    def __init__(self, partial: Path) -> None:
        self.partial = partial
        self.file = partial.open("wb")
        self.sha256 = hashlib.sha256()
        self.num_tokens = self.num_token_bytes = 0
        self.indices: list[Index] = []

    def append(self, documents: Encoded) -> None:
        contents = documents.tokens.tobytes()
        self.file.write(contents)
        self.sha256.update(contents)
        index = documents.index.copy()
        index["end"] += self.num_tokens
        self.indices.append(index)
        self.num_tokens += len(documents.tokens)
        self.num_token_bytes += len(contents)

    def write(self, tokens_path: Path, index_path: Path) -> Shard:
        """Put both files in their places, once they are on the disk."""
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()
        index = np.concatenate(self.indices)
        durable.write(index_path, index.tobytes())
        os.replace(self.partial, tokens_path)
        durable.sync_folder(tokens_path.parent)
        return Shard(
            num_documents=len(index),
            num_tokens=self.num_tokens,
            num_bytes=int(index["num_bytes"].sum()),
            tokens=StoredFile(self.num_token_bytes, self.sha256.hexdigest()),
            index=StoredFile(index.nbytes, hashlib.sha256(index.tobytes()).hexdigest()),
        )


def without_finished(documents: Reading, indices: Iterable[Index], changed: str) -> Reading:
    """What comes after the documents that finished shards hold, which must be the same as they are now.

    Args:
        documents: the documents as they are read.
        indices: the indices of the finished shards.
        changed: the message of the error where the documents are not the same.

    Raises:
        InputError: the documents are not the same.
    """
    for index in indices:
        for expected in index["hash"].tolist():
            text, _ = next(documents, ("", 0.0))
            if hash_of(utf8(text)) != expected:
                raise InputError(changed)
    return documents

"""Writing prepared corpora: documents are encoded in several processes, and shards appear whole or not at all."""

from __future__ import annotations

import collections
import hashlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import tiktoken

from ltm_pyro.data.corpora.base import Reading
from ltm_pyro.data.corpora.holding_out import utf8
from ltm_pyro.data.documents import encode
from ltm_pyro.data.prepared import INDEX, Shard, StoredFile, file_name
from ltm_pyro.errors import InputError
from ltm_pyro.files import durable

CHUNK_CHARACTERS = 2**19
"""A process encodes as many documents at a time as have so many characters."""


@dataclass(frozen=True)
class Encoded:
    """Documents that follow each other."""

    tokens: np.ndarray
    """[n]: of all of them, each with its end-of-text."""

    index: np.ndarray
    """[D] of INDEX; `end` counts from the first token here."""

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

    first: int
    """The number of the first."""
    texts: list[str]
    share: float | None
    """How much of the whole has been read with them, if that is known."""


def _index_of(texts: list[str]) -> np.ndarray:
    """The documents, [D] of INDEX, before it is known where their tokens end."""
    index = np.zeros(len(texts), dtype=INDEX)
    contents = [utf8(text) for text in texts]
    index["num_bytes"] = [len(content) for content in contents]
    index["hash"] = [hash_of(content) for content in contents]
    return index


def hash_of(content: bytes) -> int:
    """What INDEX says of a text."""
    return int.from_bytes(hashlib.sha256(content).digest()[:8], "big")


def encoded(
    documents: Reading, first: int, encoding: tiktoken.Encoding, processes: int
) -> Iterator[tuple[Encoded, float | None]]:
    """Encodes documents in their order; with what has been encoded comes the share of the whole that has been read.

    Memory holds a few chunks of documents for every process.

    Args:
        documents: what is read of a corpus.
        first: the number of the first document, for errors.
        encoding: of :func:`~ltm_pyro.data.tokenizers.get_tokenizer`.
        processes: how many encode at the same time; 1 starts none.

    Raises:
        InputError: a document is not valid Unicode.
        BrokenProcessPool: a process has been killed.
    """
    chunks = _chunks(documents, first)
    if processes == 1:
        _start(encoding)
        yield from map(_encode_chunk, chunks)
        return
    pool = ProcessPoolExecutor(processes, initializer=_start_process, initargs=(encoding,))
    try:
        waiting = collections.deque()
        for chunk in chunks:
            waiting.append(pool.submit(_encode_chunk, chunk))
            if len(waiting) > 2 * processes:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def _chunks(documents: Reading, first: int) -> Iterator[_Chunk]:
    texts: list[str] = []
    size = 0
    for text, share in documents:
        texts.append(text)
        size += len(text)
        if size >= CHUNK_CHARACTERS:
            yield _Chunk(first, texts, share)
            first, texts, size = first + len(texts), [], 0
    if texts:
        yield _Chunk(first, texts, 1.0)


_encoding: tiktoken.Encoding
"""Of this process."""


def _start(encoding: tiktoken.Encoding) -> None:
    global _encoding
    _encoding = encoding


def _start_process(encoding: tiktoken.Encoding) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all, but it is the command that stops its processes
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # by this, not by the handler that the command has for itself
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _start(encoding)


def _end_with_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)


def _encode_chunk(chunk: _Chunk) -> tuple[Encoded, float | None]:
    tokens = [encode(text, number, _encoding) for number, text in enumerate(chunk.texts, chunk.first)]
    index = _index_of(chunk.texts)
    index["end"] = np.cumsum([len(each) for each in tokens])
    return Encoded(np.concatenate(tokens), index), chunk.share


class ShardWriter:
    """Writes documents to shards, which depend on the documents alone.

    Args:
        folder: where the files go.
        split: train or validation.
        number: of the first shard.
        shard_tokens: a shard ends with the document with which it has as many.
        finished: called with each shard once its files are on the disk.
    """

    def __init__(
        self, folder: Path, split: str, number: int, shard_tokens: int, finished: Callable[[Shard], None]
    ) -> None:
        self.folder, self.split, self.number = folder, split, number
        self.shard_tokens, self.finished = shard_tokens, finished
        self.file: BinaryIO | None = None

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, *exception: object) -> None:
        if self.file is not None:
            self.file.close()

    def add(self, documents: Encoded) -> None:
        """Append documents, ending every shard that they fill."""
        while len(documents):
            if self.file is None:
                self._begin()
            missing = self.shard_tokens - self.num_tokens
            count = min(int(np.searchsorted(documents.index["end"], missing)) + 1, len(documents))
            part, documents = documents.split(count)
            self._append(part)
            if self.num_tokens >= self.shard_tokens:
                self.end()

    def end(self) -> None:
        """End the shard that has been begun, if there is one."""
        if self.file is None:
            return
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()
        self.file = None
        index = np.concatenate(self.indices)
        durable.write(self.folder / file_name(self.split, self.number, "index"), index.tobytes())
        os.replace(self._partial(), self.folder / file_name(self.split, self.number, "tokens"))
        durable.sync_folder(self.folder)
        shard = Shard(
            num_documents=len(index),
            num_tokens=self.num_tokens,
            num_bytes=int(index["num_bytes"].sum()),
            tokens=StoredFile(self.num_token_bytes, self.sha256.hexdigest()),
            index=StoredFile(index.nbytes, hashlib.sha256(index.tobytes()).hexdigest()),
        )
        self.number += 1
        self.finished(shard)

    def _begin(self) -> None:
        self.file = self._partial().open("wb")
        self.sha256 = hashlib.sha256()
        self.num_tokens = self.num_token_bytes = 0
        self.indices: list[np.ndarray] = []

    def _append(self, documents: Encoded) -> None:
        contents = documents.tokens.tobytes()
        self.file.write(contents)
        self.sha256.update(contents)
        index = documents.index.copy()
        index["end"] += self.num_tokens
        self.indices.append(index)
        self.num_tokens += len(documents.tokens)
        self.num_token_bytes += len(contents)

    def _partial(self) -> Path:
        return self.folder / f"{file_name(self.split, self.number, 'tokens')}.partial"


def without_finished(documents: Reading, indices: Iterable[np.ndarray], changed: str) -> Reading:
    """What comes after the documents that finished shards hold, which must be the same as they are now.

    Args:
        documents: what is read of the corpus.
        indices: of the finished shards, [D] of INDEX each.
        changed: the error where they are not the same.

    Raises:
        InputError: see above.
    """
    for index in indices:
        for expected in index["hash"].tolist():
            text, _ = next(documents, ("", 0.0))
            if hash_of(utf8(text)) != expected:
                raise InputError(changed)
    return documents

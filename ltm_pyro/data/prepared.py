"""Prepared corpora: folders that hold the documents of a corpus as tokens, to be mapped into memory.

manifest.json               what the folder holds, and the SHA-256 of every other file; written last
unfinished.json             the same while the folder is being written, with the shards that are finished
train-00000.tokens.bin      a shard: token ids of many documents, each followed by its end-of-text
train-00000.index.bin       the documents of the shard: where each ends, its bytes of text, and a hash of its text
validation-00000.…          the same for what is held out, where that does not follow from the hashes

:mod:`~ltm_pyro.data.preparation` writes them, and docs/data.md describes the formats. Nothing that is read from them
can run code.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import reprlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import tiktoken

from ltm_pyro.data.corpora.holding_out import HELD_OUT_OF
from ltm_pyro.data.documents import Documents, TokenizedCorpus, TokenizedTexts, token_dtype
from ltm_pyro.data.tokenizers import fingerprint, name_of
from ltm_pyro.errors import InputError
from ltm_pyro.files import durable

MANIFEST = "manifest.json"
UNFINISHED = "unfinished.json"
FORMAT = "ltm_pyro prepared corpus"
VERSION = 1
TRAIN, VALIDATION = "train", "validation"
BY_HASH, BY_SOURCE, BY_ENDS = "hashes", "source", "ends"
"""What decides which documents are held out: their hashes, a split of the source's own, or, where there are few
documents, nothing: the end of each is held out."""
INDEX = np.dtype([("end", "<u8"), ("num_bytes", "<u8"), ("hash", "<u8")])
"""What the index says of a document: where its tokens end in the shard, its bytes of text, and the first eight bytes of
the SHA-256 of its text, read as a number in big-endian order."""

Index = np.ndarray[tuple[int], np.dtype[np.void]]
"""[D] of INDEX."""


@dataclass(frozen=True)
class StoredFile:
    """What the manifest says of a file."""

    num_bytes: int
    """The size of the file."""
    sha256: str
    """The SHA-256 (hexadecimal) of its contents."""


@dataclass(frozen=True)
class Shard:
    """Two files that hold some documents: their tokens and their index."""

    num_documents: int
    """How many documents there are."""
    num_tokens: int
    """How many tokens the documents have, end-of-texts included."""
    num_bytes: int
    """How many bytes the texts have."""
    tokens: StoredFile
    """The file of the tokens."""
    index: StoredFile
    """The file of the index."""

    @property
    def files(self) -> dict[str, StoredFile]:
        """Both files, by their kind, as in :func:`file_name`."""
        return {"tokens": self.tokens, "index": self.index}


@dataclass(frozen=True)
class Manifest:
    """What a prepared corpus holds. Nothing in it depends on when or how often it was prepared."""

    source: str
    """The source that was prepared, as it was given."""
    name: str
    """A short name of the corpus that is fit for the name of a folder."""
    text_column: str
    """The column that holds the text, in sources with columns."""
    tokenizer: str
    """The name of the tokenizer."""
    tokenizer_sha256: str
    """The fingerprint of the tokenizer."""
    vocab_size: int
    """How many ids the tokenizer has."""
    dtype: str
    """The type of the tokens: uint16 or uint32, little-endian."""
    shard_tokens: int
    """A shard ends with the document with which it reaches this many tokens."""
    held_out: str
    """What decides which documents are held out: BY_HASH, BY_SOURCE or BY_ENDS."""
    train: tuple[Shard, ...] = ()
    """The shards to learn from; where hashes decide, they hold what is held out too."""
    validation: tuple[Shard, ...] = ()
    """The shards that are held out."""

    def shards(self, split: str) -> tuple[Shard, ...]:
        """The shards of TRAIN or VALIDATION."""
        return {TRAIN: self.train, VALIDATION: self.validation}[split]

    def with_shards(self, split: str, shards: tuple[Shard, ...]) -> Manifest:
        """The same manifest with other shards of a split."""
        return dataclasses.replace(
            self,
            train=shards if split == TRAIN else self.train,
            validation=shards if split == VALIDATION else self.validation,
        )

    def stored(self) -> dict[str, StoredFile]:
        """All files but the manifest, by name."""
        return {
            file_name(split, number, kind): file
            for split in (TRAIN, VALIDATION)
            for number, shard in enumerate(self.shards(split))
            for kind, file in shard.files.items()
        }

    @property
    def sha256(self) -> str:
        """The hash of all tokens, of the documents and of what is held out of them, but not of where they came from."""
        contents = {name: file.sha256 for name, file in self.stored().items()}
        decisive = [VERSION, self.tokenizer_sha256, self.dtype, self.held_out, contents]
        return hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()

    def write(self, path: Path) -> None:
        """Write the manifest as JSON, whole or not at all."""
        values = {"format": FORMAT, "version": VERSION, **dataclasses.asdict(self)}
        durable.write(path, (json.dumps(values, indent=1) + "\n").encode())


def file_name(split: str, number: int, kind: str) -> str:
    """The name of a file of a shard; `kind` is tokens or index."""
    return f"{split}-{number:05d}.{kind}.bin"


def is_prepared(data: str) -> bool:
    """Whether this is a folder that holds a prepared corpus, finished or not."""
    try:
        return any((Path(data).expanduser() / file).exists() for file in (MANIFEST, UNFINISHED))
    except (OSError, RuntimeError):  # a name that is too long, no such home
        return False


def read_manifest(folder: Path, file: str = MANIFEST) -> Manifest:
    """The manifest of a prepared corpus.

    Raises:
        InputError: there is none, or it is damaged, or of another version.
    """
    path = folder / file
    try:
        values = json.loads(path.read_bytes())
    except FileNotFoundError:
        if (folder / UNFINISHED).exists():
            raise InputError(f"{folder} is not finished: give the command that prepares it again") from None
        raise InputError(f"{folder} holds no prepared corpus: it has no {file}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path} cannot be read: {error}") from None
    if not isinstance(values, dict) or values.get("format") != FORMAT:
        raise InputError(f"{path} is not the manifest of a prepared corpus")
    version = values.get("version")
    if type(version) is not int or version != VERSION:
        raise InputError(
            f"{path} has version {_shown(version)}, but this program reads version {VERSION}: prepare the corpus again"
        )
    try:
        manifest = _parse(Manifest, {key: value for key, value in values.items() if key not in ("format", "version")})
        _check(manifest)
    except ValueError as error:
        raise InputError(f"{path} is damaged: {error}; prepare the corpus again") from None
    return manifest


Parsed = TypeVar("Parsed", StoredFile, Shard, Manifest)


def _parse(kind: type[Parsed], values: Any) -> Parsed:
    """A dataclass from the values of JSON."""
    fields = {entry.name: str(entry.type) for entry in dataclasses.fields(kind)}
    if not isinstance(values, dict):
        raise ValueError(f"{_shown(values)} is not an object with {', '.join(fields)}")
    if missing := [key for key in fields if key not in values]:
        raise ValueError(f"it lacks {', '.join(missing)}")
    if unknown := [key for key in values if key not in fields]:
        raise ValueError(f"it has the unknown key {_shown(unknown[0])}")
    readers: dict[str, Callable[[Any], Any]] = {
        "int": _number,
        "str": _text,
        "StoredFile": lambda value: _parse(StoredFile, value),
        "tuple[Shard, ...]": lambda value: tuple(_parse(Shard, item) for item in _list(value)),
    }
    return kind(**{key: readers[annotation](values[key]) for key, annotation in fields.items()})


def _number(value: Any) -> int:
    if type(value) is not int or not 0 <= value < 2**63:
        raise ValueError(f"{_shown(value)} is not a count")
    return value


def _text(value: Any) -> str:
    if not isinstance(value, str) or not value.isprintable():
        raise ValueError(f"{_shown(value)} is not a line of text")
    return value


def _list(value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise ValueError(f"{_shown(value)} is not a list")
    return value


def _shown(value: Any) -> str:
    """Enough of a value of JSON to find it."""
    return reprlib.repr(value)


def _check(manifest: Manifest) -> None:
    """Check that a manifest does not contradict itself."""
    if not manifest.name or "/" in manifest.name:
        raise ValueError(f"{manifest.name!r} is not a name")
    if manifest.dtype not in ("uint16", "uint32"):
        raise ValueError(f"tokens cannot be of the type {manifest.dtype!r}")
    if manifest.held_out not in (BY_HASH, BY_SOURCE, BY_ENDS):
        raise ValueError(f"documents cannot be held out by {manifest.held_out!r}")
    for shard in (*manifest.train, *manifest.validation):
        if shard.num_documents < 1 or shard.index.num_bytes != shard.num_documents * INDEX.itemsize:
            raise ValueError("the size of an index does not match the number of its documents")
        if shard.tokens.num_bytes != shard.num_tokens * np.dtype(manifest.dtype).itemsize:
            raise ValueError("the size of a shard does not match the number of its tokens")


def open_prepared(folder: Path, encoding: tiktoken.Encoding) -> TokenizedCorpus:
    """Maps a prepared corpus into memory, without reading its tokens.

    The sizes of all files are checked, and the SHA-256 of the indices. That of the tokens, which are much larger, is
    checked by :func:`verify` alone.

    Raises:
        InputError: a file is missing or damaged, or it was prepared with another tokenizer.
    """
    manifest = read_manifest(folder)
    _check_tokenizer(manifest, folder, encoding)
    train, hashes = _open(manifest, folder, TRAIN)
    if manifest.held_out == BY_HASH:
        is_held_out = held_out_by_hash(hashes)
        train, validation = train.select(~is_held_out), train.select(is_held_out)
    else:
        validation, _ = _open(manifest, folder, VALIDATION)
    if not (len(train) and len(validation)):
        raise InputError(f"{folder / MANIFEST} is damaged: it has no documents to learn from, or to validate on")
    held_out = TokenizedTexts.held_out_of(manifest.name, validation, manifest.sha256)
    parts = {
        "train": f"{len(train):,} texts, {train.num_tokens:,} tokens",
        "validation": f"{len(validation):,} texts, {validation.num_tokens:,} tokens: {_HELD_OUT[manifest.held_out]}",
    }
    return TokenizedCorpus(manifest.name, train, held_out, manifest.sha256, parts)


_HELD_OUT = {
    BY_HASH: "held out of train",
    BY_SOURCE: "a split of its source",
    BY_ENDS: "held out of train, the end of each text",
}


def _check_tokenizer(manifest: Manifest, folder: Path, encoding: tiktoken.Encoding) -> None:
    if manifest.tokenizer_sha256 != fingerprint(encoding) or manifest.vocab_size != encoding.n_vocab:
        raise InputError(
            f"{folder} was prepared with the tokenizer {manifest.tokenizer} ({manifest.tokenizer_sha256[:8]}), but the "
            f"run uses {name_of(encoding)} ({fingerprint(encoding)[:8]}): give --tokenizer {manifest.tokenizer}, or "
            "prepare the corpus again"
        )
    if manifest.dtype != token_dtype(encoding.n_vocab).name:
        raise InputError(f"{folder / MANIFEST} is damaged: {manifest.dtype} is not the type of its tokens")


def held_out_by_hash(hashes: np.ndarray) -> np.ndarray:
    """Which documents are held out, [D] bool: the twentieth part of the distinct ones with the smallest hash.

    This is the rule of :func:`~ltm_pyro.data.corpora.holding_out.hold_out`, whatever the order of the documents.
    """
    distinct = np.unique(hashes)
    held_out = distinct[: len(distinct) // HELD_OUT_OF]
    return hashes <= held_out[-1] if len(held_out) else np.zeros(len(hashes), dtype=bool)


def _open(manifest: Manifest, folder: Path, split: str) -> tuple[Documents, np.ndarray]:
    """The documents of a split, and the hash of each."""
    arrays, starts, sizes, hashes = [], [], [], []
    before = 0
    for number, shard in enumerate(manifest.shards(split)):
        index = read_index(folder / file_name(split, number, "index"), shard)
        path = folder / file_name(split, number, "tokens")
        _check_size(path, shard.tokens)
        try:
            tokens = np.memmap(path, np.dtype(manifest.dtype).newbyteorder("<"), mode="r", shape=(shard.num_tokens,))
        except (OSError, ValueError) as error:
            raise InputError(f"{path} cannot be read: {error}") from None
        arrays.append(tokens.view(np.ndarray))  # slices of a `memmap` cost more
        ends = index["end"].astype(np.int64)
        sizes.append(np.diff(ends, prepend=0))
        starts.append(ends - sizes[-1] + before)
        hashes.append(index["hash"])
        before += shard.num_tokens
    if not arrays:
        return Documents([], *np.zeros((2, 0), dtype=np.int64)), np.zeros(0, dtype=np.uint64)
    return Documents(arrays, np.concatenate(starts), np.concatenate(sizes)), np.concatenate(hashes)


def read_index(path: Path, shard: Shard) -> Index:
    """The documents of a shard, [D] of INDEX.

    Raises:
        InputError: the file is missing, or is not the one that the manifest describes.
    """
    _check_size(path, shard.index)
    try:
        contents = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error}") from None
    if hashlib.sha256(contents).hexdigest() != shard.index.sha256:
        raise InputError(_damaged(path, "its SHA-256 is not that of the manifest"))
    if not contents or len(contents) != shard.num_documents * INDEX.itemsize:
        raise InputError(_damaged(path, "its size is not that of its documents"))
    index = np.frombuffer(contents, INDEX)
    ends = index["end"]
    num_bytes = int(index["num_bytes"].sum())
    if not ends[0] or (ends[1:] <= ends[:-1]).any() or (ends[-1], num_bytes) != (shard.num_tokens, shard.num_bytes):
        raise InputError(_damaged(path, "its documents are not those of the shard"))
    return index


def _check_size(path: Path, stored: StoredFile) -> None:
    try:
        size = path.stat().st_size
    except FileNotFoundError:
        raise InputError(f"{path} is missing: prepare the corpus again") from None
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error}") from None
    if size != stored.num_bytes:
        raise InputError(_damaged(path, f"it has {size:,} bytes, but the manifest says {stored.num_bytes:,}"))


def _damaged(path: Path, why: str) -> str:
    return f"{path} is damaged: {why}; prepare the corpus again in another folder"


def check_file(path: Path, stored: StoredFile) -> None:
    """Check the size and the SHA-256 of a file, reading all of it.

    Raises:
        InputError: the file is missing or damaged.
    """
    _check_size(path, stored)
    try:
        with path.open("rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error}") from None
    if sha256 != stored.sha256:
        raise InputError(_damaged(path, "its SHA-256 is not that of the manifest"))


def verify(folder: Path, part: int = 0, num_parts: int = 1) -> Manifest:
    """Checks the files of a prepared corpus against the manifest, which is returned.

    Args:
        part: which of `num_parts` parts of the files to check, from 0: processes that share a copy of the corpus take
            one each.

    Raises:
        InputError: one is missing or damaged.
    """
    manifest = read_manifest(folder)
    largest_first = sorted(manifest.stored().items(), key=lambda item: -item[1].num_bytes)
    for file, stored in largest_first[part::num_parts]:
        check_file(folder / file, stored)
    return manifest

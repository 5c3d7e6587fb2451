"""Preparing a corpus: its documents become tokens in shards, and what was finished before a stop is not done again."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import os
from dataclasses import dataclass
from pathlib import Path

import tiktoken

from ltm_pyro.data.corpora import open_corpus
from ltm_pyro.data.corpora.base import CorpusSource, CutOff, Reading
from ltm_pyro.data.corpora.holding_out import HELD_OUT_OF, hold_out
from ltm_pyro.data.documents import token_dtype
from ltm_pyro.data.prepared import (
    BY_ENDS,
    BY_HASH,
    BY_SOURCE,
    MANIFEST,
    TRAIN,
    UNFINISHED,
    VALIDATION,
    Manifest,
    Shard,
    check_file,
    file_name,
    is_prepared,
    read_index,
    read_manifest,
)
from ltm_pyro.data.shards import ShardWriter, encoded, without_finished
from ltm_pyro.data.tokenizers import fingerprint, get_tokenizer
from ltm_pyro.errors import InputError
from ltm_pyro.files.lock import LOCK, locked
from ltm_pyro.files.stop import StopSignal


@dataclass(frozen=True)
class PreparationSettings:
    """What the files of a prepared corpus depend on."""

    source: str
    """The corpus to prepare, as `data` of :func:`~ltm_pyro.data.corpora.open_corpus`."""
    text_column: str | None = None
    """The column that holds the text, in files and data sets with columns; None as in
    :func:`~ltm_pyro.data.corpora.open_corpus`."""
    tokenizer: str = "bytes"
    """The name of the tokenizer."""
    shard_tokens: int = 2**25
    """A shard ends with the document with which it reaches this many tokens."""


class PreparationDisplay:
    """What is told while a corpus is prepared. This display shows nothing; the command has one that does."""

    def opened(self, source: CorpusSource) -> None:
        """The source has been found, and nothing of it has been read yet."""

    def damaged(self, path: Path) -> None:
        """This file of a finished shard is damaged: its shard and those behind it are prepared again."""

    def resumed(self, folder: Path, manifest: Manifest) -> None:
        """The folder holds finished shards, after which the work continues."""

    def encoded(self, num_tokens: int, share: float | None) -> None:
        """More tokens have been encoded; `share` of all has been read, None where that is not known.

        Once it is not known, it stays so.
        """


class Stopped(Exception):
    """A signal asked to stop."""


def prepare(
    settings: PreparationSettings,
    folder: Path,
    stop: StopSignal,
    streaming: bool = False,
    processes: int | None = None,
    display: PreparationDisplay | None = None,
) -> tuple[Manifest, bool]:
    """Prepare a corpus, or continue its preparation; its manifest, and whether there was anything left to do.

    Args:
        settings: what is prepared, and how.
        folder: where the files go; it is made where there is none.
        stop: stops the work between two documents.
        streaming: read a data set of the hub as it is downloaded, instead of keeping it on the disk.
        processes: how many processes encode at the same time; None for one for each core.
        display: is told what happens.

    Raises:
        InputError: the source or the folder cannot be used.
        Stopped: a signal asked to stop.
        BrokenProcessPool: a process that encodes has been killed.
    """
    display = display or PreparationDisplay()
    _check_usable(folder)
    encoding = get_tokenizer(settings.tokenizer)
    source = open_corpus(settings.source, settings.text_column, streaming)
    display.opened(source)
    held_out, parts = _parts_of(settings.source, source)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--out {folder} cannot be used: {error}") from None
    with locked(folder, "preparing a corpus in it"):
        manifest, is_finished = _found_in(folder, _manifest_of(settings, source.name, held_out, encoding))
        # A finished folder is checked as well: what has been damaged since then is prepared again.
        intact = _without_damaged(folder, manifest, display)
        is_finished = is_finished and intact == manifest
        if not is_finished:
            manifest = intact
            manifest.write(folder / UNFINISHED)
            (folder / MANIFEST).unlink(missing_ok=True)
            if manifest.train:
                display.resumed(folder, manifest)
            try:
                manifest = _write_shards(folder, manifest, parts, encoding, processes or num_cores(), stop, display)
            except CutOff as error:
                kept = f"finished shards are kept in {folder}; the same command continues"
                raise InputError(f"{error}; {kept}") from None
            manifest.write(folder / MANIFEST)
        (folder / UNFINISHED).unlink(missing_ok=True)
    return manifest, not is_finished


def num_cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _check_usable(folder: Path) -> None:
    """Check that the folder may be written to.

    Raises:
        InputError: it holds files that no preparation has left there, or is not a folder.
    """
    try:
        is_ours = not folder.exists() or is_prepared(str(folder))
        if not is_ours and any(path.name not in (LOCK, f".{UNFINISHED}.partial") for path in folder.iterdir()):
            raise InputError(f"--out {folder} holds files already: give another folder")
    except OSError as error:
        raise InputError(f"--out {folder} cannot be used: {error}") from None


@dataclass(frozen=True)
class _Part:
    """The documents of a split, of which the first may have been looked at already; they can be read once."""

    size: int | None
    """How much there is to read, as in :class:`~ltm_pyro.data.corpora.base.Split`."""
    documents: Reading
    """All documents."""


def _parts_of(data: str, source: CorpusSource) -> tuple[str, dict[str, _Part]]:
    """What decides which documents are held out, and the documents of each split.

    The rule is that of :func:`~ltm_pyro.data.corpora.load_corpus`. Where hashes decide, TRAIN has all documents.

    Raises:
        InputError: there is no text to learn from, or to validate on.
    """
    train = iter(source.train)
    first: list[tuple[str, float | None]] = []
    distinct: set[str] = set()
    while len(distinct) < (1 if source.validation else HELD_OUT_OF) and (found := next(train, None)):
        first.append(found)
        distinct.add(found[0])
    if not first:
        raise InputError(f"{data} holds no text to learn from")
    all_train = itertools.chain(first, train)
    if source.validation:
        validation = iter(source.validation)
        if not (found := next(validation, None)):
            raise InputError(f"{data} holds no text to validate on; give more text")
        all_validation = itertools.chain([found], validation)
        return BY_SOURCE, {
            TRAIN: _Part(source.train.size, all_train),
            VALIDATION: _Part(source.validation.size, all_validation),
        }
    if len(distinct) == HELD_OUT_OF:
        return BY_HASH, {TRAIN: _Part(source.train.size, all_train)}
    heads, ends = hold_out([text for text, _ in first])
    if not (heads and ends):
        raise InputError(f"{data} holds no text to validate on; give more text")
    sides = {TRAIN: heads, VALIDATION: ends}
    return BY_ENDS, {
        split: _Part(len(texts), ((text, number / len(texts)) for number, text in enumerate(texts, 1)))
        for split, texts in sides.items()
    }


def _manifest_of(settings: PreparationSettings, name: str, held_out: str, encoding: tiktoken.Encoding) -> Manifest:
    """The manifest of the corpus, without shards."""
    return Manifest(
        name=_printable(name),
        source=_printable(settings.source),
        text_column=_printable(settings.text_column or "text"),
        tokenizer=settings.tokenizer,
        tokenizer_sha256=fingerprint(encoding),
        vocab_size=encoding.n_vocab,
        dtype=token_dtype(encoding.n_vocab).name,
        shard_tokens=settings.shard_tokens,
        held_out=held_out,
    )


def _printable(text: str) -> str:
    # The name of a file may be in no encoding at all, or empty but for its extension.
    return "".join(character if character.isprintable() else "-" for character in text) or "-"


def _found_in(folder: Path, manifest: Manifest) -> tuple[Manifest, bool]:
    """The manifest with the shards that the folder holds already, and whether those are all.

    Raises:
        InputError: they were prepared with other settings.
    """
    for file in (MANIFEST, UNFINISHED):
        if not (folder / file).exists():
            continue
        found = read_manifest(folder, file)
        for setting in dataclasses.fields(Manifest):
            before, now = getattr(found, setting.name), getattr(manifest, setting.name)
            if setting.name not in (TRAIN, VALIDATION) and before != now:
                raise InputError(
                    f"the preparation in {folder} began with {setting.name.replace('_', ' ')} {before}, but this "
                    f"command has {now}: give another folder"
                )
        return found, file == MANIFEST
    return manifest, False


def _without_damaged(folder: Path, manifest: Manifest, display: PreparationDisplay) -> Manifest:
    """The manifest with the undamaged shards, without those that follow a damaged one in its split."""
    for split in (TRAIN, VALIDATION):
        for number, shard in enumerate(manifest.shards(split)):
            if damaged := _first_damaged(folder, split, number, shard):
                display.damaged(damaged)
                manifest = manifest.with_shards(split, manifest.shards(split)[:number])
                break
    return manifest


def _first_damaged(folder: Path, split: str, number: int, shard: Shard) -> Path | None:
    for kind, stored in shard.files.items():
        path = folder / file_name(split, number, kind)
        try:
            check_file(path, stored)
        except InputError:
            return path
    return None


def _write_shards(
    folder: Path,
    manifest: Manifest,
    parts: dict[str, _Part],
    encoding: tiktoken.Encoding,
    processes: int,
    stop: StopSignal,
    display: PreparationDisplay,
) -> Manifest:
    """Write the shards that are missing; the manifest with all of them.

    Raises:
        InputError: the source cannot be read, or has changed since the finished shards were written.
        Stopped: a signal asked to stop.
    """
    changed = (
        f"{manifest.source} has changed since the preparation in {folder} began: give another --out to prepare it as "
        "it is now"
    )
    sizes = [part.size for part in parts.values() if part.size is not None]
    total = max(1, sum(sizes)) if len(sizes) == len(parts) else None
    before = 0
    for split, part in parts.items():
        shards = manifest.shards(split)
        indices = (read_index(folder / file_name(split, number, "index"), shard) for number, shard in enumerate(shards))
        documents = without_finished(until(stop, part.documents), indices, changed)
        if shards and shards[-1].num_tokens < manifest.shard_tokens and next(documents, None):  # that was the last one
            raise InputError(changed)

        def finished(shard: Shard, split: str = split) -> None:
            nonlocal manifest
            manifest = manifest.with_shards(split, (*manifest.shards(split), shard))
            manifest.write(folder / UNFINISHED)

        size = part.size or 0
        with (
            ShardWriter(folder, split, len(shards), manifest.shard_tokens, finished) as writer,
            contextlib.closing(encoded(documents, encoding, processes)) as chunks,
        ):
            for chunk, share in chunks:
                writer.add(chunk)
                total = None if share is None else total
                done = None if share is None or total is None else (before + size * share) / total
                display.encoded(len(chunk.tokens), done)
            writer.end()
        before += size
    return manifest


def until(stop: StopSignal, documents: Reading) -> Reading:
    """The documents, until a signal asks to stop.

    Raises:
        Stopped: a signal asked to stop.
    """
    for document in documents:
        if stop.received:
            raise Stopped
        yield document

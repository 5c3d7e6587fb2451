"""Prepare a corpus of any size for training: python -m ltm_pyro.prepare SOURCE --tokenizer gpt2 --out DIR

The documents become tokens in shards, which `python -m ltm_pyro.train --data DIR` maps into memory. Stopped anywhere,
the same command goes on behind the last finished shard, and ends with the files that it would have written without a
stop.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import os
import shlex
import signal
import sys
import time
from collections.abc import Sequence
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tiktoken
import tyro
from tqdm import tqdm

from ltm_pyro import cli
from ltm_pyro.data import fingerprint, get_tokenizer, open_corpus, token_dtype
from ltm_pyro.data.corpora.base import CorpusSource as Source
from ltm_pyro.data.corpora.base import CutOff, Reading
from ltm_pyro.data.corpora.holding_out import HELD_OUT_OF, hold_out
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
    verify,
)
from ltm_pyro.data.shards import ShardWriter, encoded, without_finished
from ltm_pyro.errors import InputError
from ltm_pyro.files.lock import LOCK, locked
from ltm_pyro.files.stop import StopSignal
from ltm_pyro.training.progress import time_text

SECONDS_BETWEEN_LINES = 10


@dataclass(frozen=True)
class PrepareConfig:
    """Tokenise a corpus of any size into a folder that training maps into memory."""

    source: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="SOURCE")] = ""
    """What train takes as --data: python-docs, a .txt, .jsonl or .parquet file or a folder of them,
    or a Hugging Face data set as NAME or NAME:CONFIG."""
    out: str | None = None
    """Folder for the shards. If the same command was stopped before, it goes on with what is there."""
    tokenizer: str = "bytes"
    """bytes, or an encoding of tiktoken, such as gpt2: that of the runs that will read the folder."""
    text_column: str = "text"
    """Column of the corpus that holds the text (.jsonl, .parquet, Hugging Face)."""
    streaming: bool = False
    """Read a Hugging Face data set as it is downloaded, so that nothing of it is kept on the disk but the shards."""
    processes: int | None = None
    """Processes that encode at the same time. Default: one for each core."""
    shard_tokens: int = 2**25
    """A shard ends with the document with which it has as many tokens. What a stop loses is less than a shard."""
    verify: bool = False
    """Check the SHA-256 of every file in --out, and write nothing."""


@dataclass(frozen=True)
class Part:
    """The documents of a split that have not been read yet."""

    size: int | None
    """What there is to read, as in :class:`~ltm_pyro.data.corpora.Split`."""
    documents: Reading


class Stopped(Exception):
    """A signal asked to stop."""


class Console:
    """What preparation prints while it goes: a bar on a terminal, a line every ten seconds elsewhere."""

    def __init__(self) -> None:
        self.bar: tqdm | None = None
        self.num_tokens = 0
        self.said = time.monotonic()

    def __enter__(self) -> Console:
        return self

    def __exit__(self, *exception: object) -> None:
        if self.bar is not None:
            self.bar.close()

    def add(self, num_tokens: int, share: float | None) -> None:
        """Count tokens; `share` of all has been read, None where that is not known, which then stays so."""
        self.num_tokens += num_tokens
        now = time.monotonic()
        if self.bar is None:  # what comes before was finished already, or cannot be timed
            self.first_share, self.first_tokens, self.started = share, self.num_tokens, now
            layout = "[{elapsed}]" if share is None else "{percentage:3.0f}%|{bar}| [{elapsed}<{remaining}]"
            hidden = not sys.stderr.isatty()
            self.bar = tqdm(total=1, initial=share or 0, bar_format=layout, disable=hidden, leave=False)
            return
        rate = f"{(self.num_tokens - self.first_tokens) / (now - self.started):,.0f} tokens/s"
        if share is None:
            text = f"{self.num_tokens:,} tokens: {rate}"
            self.bar.bar_format = f"{text} [{{elapsed}}]"
            self.bar.refresh()
        else:
            left = (now - self.started) / max(share - self.first_share, 1e-9) * (1 - share)
            text = f"{share:.1%}: {rate}, {time_text(left)} left"
            self.bar.bar_format = f"{{percentage:3.0f}}%|{{bar}}| [{{elapsed}}<{{remaining}}, {rate}]"
            self.bar.update(share - self.bar.n)
        if self.bar.disable and now - self.said >= SECONDS_BETWEEN_LINES:
            print(text, flush=True)
            self.said = now


def parse(args: Sequence[str]) -> PrepareConfig:
    """The settings.

    Raises:
        InputError: if they cannot be used.
    """
    config = cli.parse(PrepareConfig(), args, "prepare")
    if not config.source and not config.verify:
        raise InputError("give the SOURCE to prepare: a file, a folder or a Hugging Face data set")
    if not config.out:
        raise InputError("give --out DIR, the folder of the prepared corpus")
    for name in ("processes", "shard_tokens"):
        value = getattr(config, name)
        if value is not None and value < 1:
            raise InputError(f"--{name.replace('_', '-')} must be at least 1, not {value}")
    return config


def parts_of(data: str, source: Source) -> tuple[str, dict[str, Part]]:
    """What decides which documents are held out, and the documents of each split.

    The rule is that of :func:`~ltm_pyro.data.corpora.load_corpus`. Where hashes decide, `train` has all documents.

    Raises:
        InputError: there is no text to learn from, or to validate on.
    """
    train = iter(source.train)
    first, distinct = [], set()
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
            TRAIN: Part(source.train.size, all_train),
            VALIDATION: Part(source.validation.size, all_validation),
        }
    if len(distinct) == HELD_OUT_OF:
        return BY_HASH, {TRAIN: Part(source.train.size, all_train)}
    heads, ends = hold_out([text for text, _ in first])
    if not (heads and ends):
        raise InputError(f"{data} holds no text to validate on; give more text")
    sides = {TRAIN: heads, VALIDATION: ends}
    return BY_ENDS, {
        split: Part(len(texts), ((text, number / len(texts)) for number, text in enumerate(texts, 1)))
        for split, texts in sides.items()
    }


def manifest_of(config: PrepareConfig, name: str, held_out: str, encoding: tiktoken.Encoding) -> Manifest:
    """The manifest of the corpus, without shards."""
    return Manifest(
        name=_printable(name),
        source=_printable(config.source),
        text_column=_printable(config.text_column),
        tokenizer=config.tokenizer,
        tokenizer_sha256=fingerprint(encoding),
        vocab_size=encoding.n_vocab,
        dtype=token_dtype(encoding.n_vocab).name,
        shard_tokens=config.shard_tokens,
        held_out=held_out,
    )


def _printable(text: str) -> str:
    # The name of a file may be in no encoding at all, or empty but for its extension.
    return "".join(character if character.isprintable() else "-" for character in text) or "-"


def check_usable(folder: Path) -> None:
    """Check that the folder may be written to.

    Raises:
        InputError: it holds what no preparation has left there, or is no folder.
    """
    try:
        is_ours = not folder.exists() or is_prepared(str(folder))
        if not is_ours and any(path.name not in (LOCK, f".{UNFINISHED}.partial") for path in folder.iterdir()):
            raise InputError(f"--out {folder} holds files already: give another folder")
    except OSError as error:
        raise InputError(f"--out {folder} cannot be used: {error}") from None


def found_in(folder: Path, manifest: Manifest) -> tuple[Manifest, bool]:
    """The manifest with the shards that the folder holds already, and whether those are all.

    Raises:
        InputError: they were prepared otherwise.
    """
    for file in (MANIFEST, UNFINISHED):
        if not (folder / file).exists():
            continue
        found = read_manifest(folder, file)
        for setting in dataclasses.fields(Manifest):
            before, now = getattr(found, setting.name), getattr(manifest, setting.name)
            if setting.name not in (TRAIN, VALIDATION) and before != now:
                raise InputError(
                    f"--out {folder} was begun with {setting.name.replace('_', ' ')} {before}, and this command has "
                    f"{now}: give another folder"
                )
        return found, file == MANIFEST
    return manifest, False


def without_damaged(folder: Path, manifest: Manifest) -> Manifest:
    """The manifest with the shards that are whole; those that follow a damaged one in its split are left out too."""
    for split in (TRAIN, VALIDATION):
        for number, shard in enumerate(manifest.shards(split)):
            try:
                for kind in ("tokens", "index"):
                    check_file(folder / file_name(split, number, kind), getattr(shard, kind))
            except InputError:
                damaged = folder / file_name(split, number, kind)
                print(f"{damaged} is damaged: it and the shards behind it are prepared again", file=sys.stderr)
                manifest = manifest.with_shards(split, manifest.shards(split)[:number])
                break
    return manifest


def write_shards(
    folder: Path,
    manifest: Manifest,
    parts: dict[str, Part],
    encoding: tiktoken.Encoding,
    processes: int,
    stop: StopSignal,
    console: Console,
) -> Manifest:
    """Write the shards that are missing; the manifest with all of them.

    Raises:
        InputError: the source cannot be read, or has changed since the finished shards were written.
        Stopped: a signal asked to stop.
    """
    changed = (
        f"{manifest.source} is not what it was when {folder} was begun: give another --out to prepare it as it is now"
    )
    sizes = [part.size for part in parts.values()]
    total = None if None in sizes else max(1, sum(sizes))
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

        first = sum(shard.num_documents for shard in shards)
        with (
            ShardWriter(folder, split, len(shards), manifest.shard_tokens, finished) as writer,
            contextlib.closing(encoded(documents, first, encoding, processes)) as chunks,
        ):
            for chunk, share in chunks:
                writer.add(chunk)
                total = None if share is None else total
                console.add(len(chunk.tokens), None if total is None else (before + part.size * share) / total)
            writer.end()
        before += part.size or 0
    return manifest


def until(stop: StopSignal, documents: Reading) -> Reading:
    """The documents, until a signal asks to stop."""
    for document in documents:
        if stop.received:
            raise Stopped
        yield document


def describe(folder: Path, manifest: Manifest) -> str:
    """A line that says what a folder holds."""
    shards = (*manifest.train, *manifest.validation)
    num_documents, num_tokens, num_bytes = (
        sum(getattr(shard, name) for shard in shards) for name in ("num_documents", "num_tokens", "num_bytes")
    )
    return (
        f"{folder}: {num_documents:,} documents, {num_tokens:,} tokens of {manifest.tokenizer}, {num_bytes:,} bytes of "
        f"text, in {len(shards):,} shards"
    )


def prepare(config: PrepareConfig, stop: StopSignal) -> tuple[Manifest, bool]:
    """Prepare a corpus, or go on with it; its manifest, and whether there was anything left to do.

    Raises:
        InputError: the source or the folder cannot be used.
        Stopped: a signal asked to stop.
    """
    folder = Path(config.out)
    check_usable(folder)
    encoding = get_tokenizer(config.tokenizer)
    source = open_corpus(config.source, config.text_column, config.streaming)
    held_out, parts = parts_of(config.source, source)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--out {folder} cannot be used: {error}") from None
    with locked(folder, "preparing a corpus in it"):
        manifest, is_finished = found_in(folder, manifest_of(config, source.name, held_out, encoding))
        if not is_finished:
            manifest = without_damaged(folder, manifest)
            manifest.write(folder / UNFINISHED)
            if manifest.train:
                print(f"{describe(folder, manifest)}, are finished; going on from there", flush=True)
            with Console() as console:
                processes = config.processes or num_cores()
                try:
                    manifest = write_shards(folder, manifest, parts, encoding, processes, stop, console)
                except CutOff as error:
                    kept = f"finished shards are kept in {folder}; the same command goes on"
                    raise InputError(f"{error}; {kept}") from None
            manifest.write(folder / MANIFEST)
        (folder / UNFINISHED).unlink(missing_ok=True)
    return manifest, not is_finished


def num_cores() -> int:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def main(args: Sequence[str]) -> int:
    config = parse(args)
    folder = Path(config.out)
    if config.verify:
        manifest = verify(folder)
        if config.source and config.source != manifest.source:
            raise InputError(f"{folder} was prepared from {manifest.source}, not from {config.source}")
        print(f"{describe(folder, manifest)}; every file has its SHA-256")
        return 0
    with StopSignal() as stop:
        started = time.monotonic()
        try:
            manifest, is_new = prepare(config, stop)
        except (Stopped, BrokenProcessPool):
            if stop.received:  # perhaps by the processes that encode, too
                name = signal.Signals(stop.received).name
                print(
                    f"\nstopped by {name}: finished shards are kept in {folder}; the same command goes on", flush=True
                )
                return 128 + stop.received
            print(
                "error: a process that encodes was killed, perhaps for want of memory; the same command goes on "
                "(--processes 1 needs least)",
                file=sys.stderr,
            )
            return 1
    took = time_text(time.monotonic() - started) if is_new else "was finished already"
    print(f"{describe(folder, manifest)}; {took}")
    print(f"train on it with --data {shlex.quote(str(folder))} --tokenizer {manifest.tokenizer}")
    return 0


if __name__ == "__main__":
    cli.run(main, sys.argv[1:])

"""Prepare a corpus of any size for training: python -m ltm_pyro.prepare SOURCE --tokenizer gpt2 --out DIR

The documents become tokens in shards, which `python -m ltm_pyro.train --data DIR` maps into memory. If the
command was stopped, the same command continues after the last finished shard, and ends with the files that it would
have written without a stop.
"""

from __future__ import annotations

import shlex
import signal
import sys
import time
from collections.abc import Sequence
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Never

import tyro
from tqdm import tqdm

from ltm_pyro import cli
from ltm_pyro.data import CORPORA, CorpusSource
from ltm_pyro.data.preparation import PreparationDisplay, PreparationSettings, Stopped, prepare
from ltm_pyro.data.prepared import Manifest, verify
from ltm_pyro.errors import InputError
from ltm_pyro.files.stop import StopSignal
from ltm_pyro.training.progress import time_text

SECONDS_BETWEEN_LINES = 10


@dataclass(frozen=True)
class PrepareConfig:
    """Turn a corpus of any size into tokens, in a folder that training maps into memory."""

    source: Annotated[
        str,
        tyro.conf.Positional,
        tyro.conf.arg(metavar="SOURCE"),
        cli.choices("The corpus to prepare, of one of these kinds.", CORPORA),
    ] = ""
    out: str | None = None
    """Folder for the shards. If the same command was stopped before, it continues with what the folder holds."""
    tokenizer: str = PreparationSettings.tokenizer
    """bytes, or an encoding of tiktoken, such as gpt2. The runs that read the folder must have the same."""
    text_column: str | None = None
    """Column that holds the text, in files and data sets with columns. Default: text, or a benchmark set's own."""
    streaming: bool = False
    """Read a Hugging Face data set while it is downloaded, so that the disk keeps nothing of it but the shards."""
    processes: int | None = None
    """Number of processes that encode at the same time. Default: one for each core."""
    shard_tokens: int = PreparationSettings.shard_tokens
    """A shard ends with the document with which it reaches this many tokens. A stop loses less than one shard."""
    verify: bool = False
    """Check the SHA-256 of every file in --out, and write nothing."""


class TerminalDisplay(PreparationDisplay):
    """What preparation prints while it goes: a bar on a terminal, a line every ten seconds elsewhere."""

    def __init__(self) -> None:
        self.bar: tqdm[Never] | None = None
        self.num_tokens = 0
        self.last_line = time.monotonic()

    def __enter__(self) -> TerminalDisplay:
        return self

    def __exit__(self, *exception: object) -> None:
        if self.bar is not None:
            self.bar.close()

    def opened(self, source: CorpusSource) -> None:
        validation = source.validation.origin if source.validation else "held out of train"
        unread = {part: f"not read: {origin}" for part, origin in source.unread.items()}
        cli.print_parts(source.name, {"train": source.train.origin, "validation": validation, **unread})

    def damaged(self, path: Path) -> None:
        print(f"{path} is damaged: it and the shards after it are prepared again", file=sys.stderr)

    def resumed(self, folder: Path, manifest: Manifest) -> None:
        print(f"{describe(folder, manifest)}, are finished; continuing from there", flush=True)

    def encoded(self, num_tokens: int, share: float | None) -> None:
        self.num_tokens += num_tokens
        now = time.monotonic()
        if self.bar is None:  # what comes before was finished already, or cannot be timed
            self.first_share, self.first_tokens, self.started = share or 0.0, self.num_tokens, now
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
        if self.bar.disable and now - self.last_line >= SECONDS_BETWEEN_LINES:
            print(text, flush=True)
            self.last_line = now


def parse(args: Sequence[str]) -> tuple[PrepareConfig, Path]:
    """The settings, and the folder of the prepared corpus.

    Raises:
        InputError: if they cannot be used.
    """
    config = cli.parse(PrepareConfig(), args, "prepare")
    if not config.source and not config.verify:
        raise InputError("give the SOURCE to prepare: a file, a folder or a Hugging Face data set")
    if not config.out:
        raise InputError("give --out DIR, the folder of the prepared corpus")
    cli.require_at_least(config, processes=1, shard_tokens=1)
    return config, Path(config.out)


def describe(folder: Path, manifest: Manifest) -> str:
    """A line that says what a folder holds."""
    shards = (*manifest.train, *manifest.validation)
    return (
        f"{folder}: {sum(shard.num_documents for shard in shards):,} documents, "
        f"{sum(shard.num_tokens for shard in shards):,} tokens of {manifest.tokenizer}, "
        f"{sum(shard.num_bytes for shard in shards):,} bytes of text, in {len(shards):,} shards"
    )


def main(args: Sequence[str]) -> int:
    config, folder = parse(args)
    if config.verify:
        manifest = verify(folder)
        if config.source and config.source != manifest.source:
            raise InputError(f"{folder} was prepared from {manifest.source}, not from {config.source}")
        print(f"{describe(folder, manifest)}; all files match their SHA-256")
        return 0
    settings = PreparationSettings(config.source, config.text_column, config.tokenizer, config.shard_tokens)
    started = time.monotonic()
    with StopSignal() as stop:
        try:
            with TerminalDisplay() as display:
                manifest, is_new = prepare(settings, folder, stop, config.streaming, config.processes, display)
        except (Stopped, BrokenProcessPool):
            if stop.received:  # perhaps by the processes that encode, too
                name = signal.Signals(stop.received).name
                print(
                    f"\nstopped by {name}: finished shards are kept in {folder}; the same command continues", flush=True
                )
                return 128 + stop.received
            print(
                "error: an encoding process was killed, perhaps because memory ran out; the same command continues "
                "(--processes 1 needs the least memory)",
                file=sys.stderr,
            )
            return 1
    took = time_text(time.monotonic() - started) if is_new else "was finished already"
    print(f"{describe(folder, manifest)}; {took}")
    print(f"train on it with --data {shlex.quote(str(folder))} --tokenizer {manifest.tokenizer}")
    return 0


if __name__ == "__main__":
    cli.run(main, sys.argv[1:])

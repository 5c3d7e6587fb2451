"""Corpora that lie in files and folders."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from ltm_pyro.data.corpora.base import (
    VALIDATION_SPLITS,
    CorpusKind,
    CorpusSource,
    Reading,
    Split,
    existing_path,
    first_split,
    reason,
)
from ltm_pyro.data.corpora.formats import FORMATS, FileFormat, FileReading, extensions, format_of
from ltm_pyro.errors import InputError

SPLIT_NAME = re.compile(rf"(train|{'|'.join(VALIDATION_SPLITS)}|test)([-_.]?\d.*)?")  # a shard is numbered


class LocalFiles(CorpusKind):
    """A file of text, JSON or Parquet, or a folder of such files.

    A file is one document (`.txt`) or holds a document a row (`.jsonl`, `.json`, `.parquet`); all but Parquet may also
    be packed, as `.gz`. The files of a folder are all of one format. A file or a folder at its top named `train`,
    `validation` (or `valid`, `val`, `dev`) or `test`, with a number or without (`train-00-of-06.jsonl.gz`), belongs to
    that split, and all else to `train`. Hidden files are left out.

    Line ends of `.txt` files become `\\n`. A `.txt` file and a `.json` file that is one list are read as a whole; of
    Parquet, a group of rows at a time.

    All of a file is scored. In a folder the split `test` is scored, else the one to validate on, else all of it.
    """

    label = "an existing file or folder"
    summary = (
        f"the path of a file ({', '.join(name for name in extensions(FORMATS) if not name.endswith('.gz'))}), "
        "or of a folder of such files"
    )

    def recognises(self, data: str) -> bool:
        return existing_path(data) is not None

    def open(self, data: str, text_column: str) -> CorpusSource:
        return CorpusSource.of_splits(data, *self._splits(data, text_column))

    def open_to_score(self, data: str, text_column: str) -> tuple[str, Split]:
        name, splits = self._splits(data, text_column)
        return name, first_split(splits, ("test", *VALIDATION_SPLITS)) or splits["train"]

    def _splits(self, data: str, text_column: str) -> tuple[str, dict[str, Split]]:
        path = existing_path(data)
        if path is None:  # it has gone in the meantime
            raise InputError(f"there is no file or folder {data!r}; check the path")

        def read(file: Path, file_format: FileFormat) -> FileReading:
            return file_format.read(file, text_column)

        return local_splits(path, read)


def local_splits(
    path: Path,
    read: Callable[[Path, FileFormat], FileReading],
    formats: Sequence[FileFormat] = FORMATS,
    split_name: re.Pattern[str] = SPLIT_NAME,
) -> tuple[str, dict[str, Split]]:
    """The name of a file or folder, and its splits.

    Args:
        path: the file or folder.
        read: gives the texts of a file, given the file and its format.
        formats: what can be read.
        split_name: what a file or folder is named that belongs to a split, which is the first group.

    Raises:
        InputError: the folder cannot be read, or holds no files, some of another format, or those of several.
    """
    if not path.is_dir():
        _, name = format_of(path, formats)
        return name, {"train": _split_of([path], path, read, formats)}
    files: dict[str, list[Path]] = {}
    try:
        inside = sorted(_walk(path))
    except OSError as error:
        raise InputError(f"the folder {path} cannot be read: {reason(error)}") from error
    for file in inside:
        parts = file.relative_to(path).parts
        if file.is_file() and not any(part.startswith(".") for part in parts):
            top = parts[0] if len(parts) > 1 else format_of(file, formats)[1]
            match = split_name.fullmatch(top.lower())
            files.setdefault(match[1] if match else "train", []).append(file)
    if not files:
        holding = ", ".join(extensions(formats))
        raise InputError(f"the folder {path} holds no files; give one that holds {holding} files")
    found = {format_of(file, formats)[0].name: file.name for file in itertools.chain(*files.values())}
    if len(found) > 1:
        examples = ", ".join(f"{name} ({file_format})" for file_format, name in found.items())
        raise InputError(f"the folder {path} holds files of several formats, such as {examples}; keep those of one")
    return path.resolve().name, {split: _split_of(group, path, read, formats) for split, group in files.items()}


def _split_of(
    files: list[Path],
    path: Path,
    read: Callable[[Path, FileFormat], FileReading],
    formats: Sequence[FileFormat],
) -> Split:
    try:
        sizes = [file.stat().st_size for file in files]
    except OSError as error:
        raise InputError(f"{path} cannot be read: {reason(error)}") from error

    def read_all() -> Reading:
        for file, size, before in zip(files, sizes, itertools.accumulate(sizes, initial=0), strict=False):
            for text, share in read(file, format_of(file, formats)[0]):
                yield text, (before + share * size) / max(1, sum(sizes))

    return Split(sum(sizes), read_all)


def _walk(folder: Path) -> Iterator[Path]:
    """All that lies below a folder; unlike `rglob`, an error where a part of it cannot be read."""
    for path in folder.iterdir():
        yield path
        if path.is_dir():
            yield from _walk(path)

"""Corpora that lie in files and folders."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path

from ltm_pyro.data.corpora.base import (
    VALIDATION_SPLITS,
    CorpusKind,
    CorpusSource,
    Reading,
    Split,
    Splits,
    existing_path,
    reason,
)
from ltm_pyro.data.corpora.formats import FORMATS, FileFormat, FileReading, extensions, format_of
from ltm_pyro.data.corpora.splits import find_files
from ltm_pyro.errors import InputError

MOST_NAMED = 3
"""The most files of a split that are named where it is described."""


class LocalFiles(CorpusKind):
    """A file of text, JSON, CSV or Parquet, or a folder of such files.

    A text file (`.txt`, `.md`, `.rst`) is one document; other files hold a document a row (`.jsonl`, `.json`, `.csv`,
    `.tsv`, `.parquet`). All may also be packed, as `.gz`. The files of a folder are all of one format, but for a README
    and the like, which are left out.

    The files of a folder may be splits: `train`, `validation` (`valid`, `val`, `dev`) and `test` (`eval`). A word of
    these in the name of a file or of a folder says which, at any depth (`data/train-00-of-06.jsonl.gz`,
    `corpus_test.parquet`). Where names say two splits, or `train` beside files that say nothing, the folder is refused.
    Every real file is read once. Hidden files are passed over.

    Line ends of text files become `\\n` before anything is counted, and a byte order mark is no part of the text. A
    text file and a `.json` file that is one list are read as a whole; of Parquet, a group of rows at a time.

    All of a file is scored, and of a folder without splits; else the split `test`, the one to validate on, or `train`.
    """

    label = "an existing file or folder"
    summary = (
        f"the path of a file ({', '.join(name for name in extensions(FORMATS))}; each also as .gz), "
        "or of a folder of such files, all of one format"
    )

    def recognises(self, data: str) -> bool:
        return existing_path(data) is not None

    def absolute(self, data: str) -> str:
        return str(Path(data).expanduser().absolute())

    def open(self, data: str, text_column: str | None) -> CorpusSource:
        return self._splits(data, text_column).to_learn(data)

    def open_to_score(self, data: str, text_column: str | None) -> tuple[str, Split]:
        splits = self._splits(data, text_column)
        return splits.to_score(data, ("test", *VALIDATION_SPLITS, "train"))

    def _splits(self, data: str, text_column: str | None) -> Splits:
        path = existing_path(data)
        if path is None:  # it has gone in the meantime
            raise InputError(f"there is no file or folder {data!r}; check the path")

        def read(file: Path, file_format: FileFormat) -> FileReading:
            return file_format.read(file, text_column or "text")

        return local_splits(path, read)


def local_splits(
    path: Path,
    read: Callable[[Path, FileFormat], FileReading],
    formats: Sequence[FileFormat] = FORMATS,
) -> Splits:
    """The splits of a file or folder.

    Args:
        path: the file or folder.
        read: gives the texts of a file, given the file and its format.
        formats: what can be read.

    Raises:
        InputError: the folder cannot be read, or holds no files, some of another format, or those of several; or which
            files are which split cannot be told.
    """
    if not path.is_dir():
        _, name = format_of(path, formats)
        if not path.is_file():
            raise InputError(f"{path} is neither a file nor a folder")
        return Splits(name, {"train": _split_of([path], path.parent, read, formats)}, path.name)
    found = find_files(path, lambda file: format_of(file, formats)[1])
    if not found.splits:
        holding = ", ".join(extensions(formats))
        left_out = f" but {found.left_out[0].name}" if found.left_out else ""
        raise InputError(f"the folder {path} holds no files{left_out}; give one that holds {holding} files")
    files = itertools.chain(*found.splits.values())
    examples = {format_of(file, formats)[0].name: file.name for file in files}
    if len(examples) > 1:
        shown = ", ".join(f"{name} ({file_format})" for file_format, name in examples.items())
        raise InputError(f"the folder {path} holds files of several formats, such as {shown}; keep those of one")
    splits = {split: _split_of(group, path, read, formats) for split, group in found.splits.items()}
    left_out = _listed(found.left_out, path) if found.left_out else ""
    name = path.resolve().name
    return Splits(name, splits, None if found.has_names else name, left_out)


def _split_of(
    files: list[Path],
    folder: Path,
    read: Callable[[Path, FileFormat], FileReading],
    formats: Sequence[FileFormat],
) -> Split:
    try:
        sizes = [file.stat().st_size for file in files]
    except OSError as error:
        raise InputError(f"{folder} cannot be read: {reason(error)}") from error

    def read_all() -> Reading:
        for file, size, before in zip(files, sizes, itertools.accumulate(sizes, initial=0), strict=False):
            for text, share in read(file, format_of(file, formats)[0]):
                yield text, (before + share * size) / max(1, sum(sizes))

    return Split(sum(sizes), read_all, _listed(files, folder))


def _listed(files: list[Path], folder: Path) -> str:
    """The number of these files, and the names of the first."""
    names = [str(file.relative_to(folder)) for file in files[:MOST_NAMED]]
    more = f", … (+{len(files) - MOST_NAMED:,})" if len(files) > MOST_NAMED else ""
    return f"{len(files):,} file{'s' * (len(files) != 1)} ({', '.join(names)}{more})"

"""Formats of files that hold documents: UTF-8 text, JSON and Parquet.

To add a format, write a function that reads a file of it and give it an entry in `FORMATS`.
"""

from __future__ import annotations

import gzip
import itertools
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, cast

from ltm_pyro.data.corpora.base import reason
from ltm_pyro.errors import InputError

if TYPE_CHECKING:
    from pyarrow import Schema

ROWS_TO_FIND_A_COLUMN = 1000
"""A JSON file is taken not to have a column that none of its first rows, this many, has."""

FileReading = Iterator[tuple[str, float]]
"""Texts of a file, each with the share (0 to 1) of the file that has been read with it."""


@dataclass(frozen=True)
class FileFormat:
    """A format of files."""

    name: str
    """What errors call it."""

    reader: Callable[[Path, str], FileReading]
    """Reads the texts of a file, given its path and the column that holds the text."""

    extensions: tuple[str, ...]
    """The ends of the names of such files."""

    has_rows: bool = True
    """Whether a file holds a text in each row, or is one text."""

    def read(self, file: Path, text_column: str) -> FileReading:
        """The texts of a file.

        Raises:
            InputError: the file cannot be read, is not of this format, or has no such column of text.
        """
        try:
            yield from self.reader(file, text_column)
        except InputError:
            raise
        except Exception as error:  # each of the libraries below has its own
            raise InputError(f"{file} cannot be read as {self.name}: {reason(error)}") from error


def text_format(name: str, *extensions: str) -> FileFormat:
    """A format whose files are UTF-8 text, each of them one text."""

    def read(file: Path, text_column: str) -> FileReading:
        with gzip.open(file, "rt", encoding="utf-8") if _is_packed(file) else file.open(encoding="utf-8") as opened:
            text = opened.read()
        if "\0" in text:
            raise InputError(f"{file} is not {name}: it contains null bytes; convert it, or leave it out")
        yield text, 1.0

    return FileFormat(name, read, extensions, has_rows=False)


def _read_json(file: Path, text_column: str) -> FileReading:
    columns: dict[str, None] = {}
    for number, (row, share) in enumerate(_json_rows(file), 1):
        row = {"text": row} if isinstance(row, str) else row
        if not isinstance(row, dict):
            raise InputError(f"row {number} of {file} is {type(row).__name__}, not an object with a column of text")
        if text_column not in columns:
            columns |= dict.fromkeys(row)
            if number >= ROWS_TO_FIND_A_COLUMN:
                _check_has_column(columns, text_column, file)
        text = row.get(text_column)
        if isinstance(text, str):
            yield text, share
        elif text is not None:
            kind = type(text).__name__
            raise InputError(f"the column {text_column!r} of {file} holds {kind} in row {number}, not text")
    if columns:
        _check_has_column(columns, text_column, file)


def _json_rows(file: Path) -> Iterator[tuple[Any, float]]:
    """The values of the lines of a file, or of the list that all of it is."""
    with file.open("rb") as packed:
        size = max(1, file.stat().st_size)
        lines = cast(IO[bytes], gzip.GzipFile(fileobj=packed)) if _is_packed(file) else packed
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            if number == 1 and line.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"["):
                rows = json.loads(line + lines.read())
                yield from ((row, count / len(rows)) for count, row in enumerate(rows, 1))
                return
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"line {number}, column {error.colno}: {error.msg}") from None
            yield row, packed.tell() / size


def _read_parquet(file: Path, text_column: str) -> FileReading:
    from pyarrow import parquet

    with parquet.ParquetFile(file) as opened:
        check_column(opened.schema_arrow, text_column, file)
        read, num_rows = itertools.count(1), opened.metadata.num_rows
        for rows in opened.iter_batches(batch_size=1000, columns=[text_column]):
            for text in rows.column(text_column).to_pylist():
                share = next(read) / num_rows
                if text is not None:
                    yield text, share


FORMATS = (
    text_format("UTF-8 text", ".txt", ".txt.gz"),
    FileFormat("JSON", _read_json, (".json", ".json.gz", ".jsonl", ".jsonl.gz")),
    FileFormat("Parquet", _read_parquet, (".parquet",)),
)
"""The formats that are read; an extension belongs to one of them."""


def extensions(formats: Iterable[FileFormat]) -> list[str]:
    """The extensions of all these formats."""
    return [extension for file_format in formats for extension in file_format.extensions]


def format_of(file: Path, formats: Iterable[FileFormat]) -> tuple[FileFormat, str]:
    """The format of a file, and the name of the file without the extension, which tells the format.

    Raises:
        InputError: the file has none of the extensions of these formats.
    """
    for file_format in formats:
        for extension in file_format.extensions:
            if file.name.lower().endswith(extension):
                return file_format, file.name[: -len(extension)]
    raise InputError(f"{file} has none of the extensions that can be read: {', '.join(extensions(formats))}")


def check_column(schema: Schema, text_column: str, source: str | Path) -> None:
    """Check that a table has a column of text of that name.

    Raises:
        InputError: it has none.
    """
    from pyarrow import types

    _check_has_column(schema.names, text_column, source)
    kind = schema.field(text_column).type
    if not (types.is_string(kind) or types.is_large_string(kind) or types.is_null(kind)):
        raise InputError(f"the column {text_column!r} of {source} holds {kind}, not text; choose another column")


def _check_has_column(columns: Iterable[str], text_column: str, source: str | Path) -> None:
    if text_column not in columns:
        raise InputError(
            f"{source} has no column {text_column!r}; choose, or rename, one of its columns: {', '.join(columns)}"
        )


def _is_packed(file: Path) -> bool:
    return file.name.lower().endswith(".gz")

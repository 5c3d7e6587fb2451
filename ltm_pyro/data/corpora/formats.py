"""Formats of files that hold documents: UTF-8 text, JSON, CSV and Parquet, each plain or packed by gzip.

To add a format, write a function that reads a file of it and give it an entry in `FORMATS`.
"""

from __future__ import annotations

import codecs
import csv
import gzip
import io
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, cast

from ltm_pyro.data.corpora.base import reason
from ltm_pyro.data.tokenizers import check_unicode
from ltm_pyro.errors import InputError

if TYPE_CHECKING:
    from pyarrow import DataType, Schema

ROWS_TO_FIND_A_COLUMN = 1000
"""A JSON file is taken not to have a column that none of its first rows, this many, has."""

PACKED = ".gz"
"""The end of the name of a file that is packed by gzip."""

FileReading = Iterator[tuple[str, float]]
"""Texts of a file, each with the share (0 to 1) of the file that has been read with it."""

Rows = Iterator[tuple[int | None, str, float]]
"""The same, each text with the number of its row, from 1, before it; None where a file is one text."""


@dataclass(frozen=True)
class FileFormat:
    """A format of files."""

    name: str
    """What errors call it."""

    reader: Callable[[Path, str], Rows]
    """Reads the texts of a file, given its path and the column that holds the text."""

    extensions: tuple[str, ...]
    """The ends of the names of such files, where they are not packed."""

    has_rows: bool = True
    """Whether a file holds a text in each row, or is one text."""

    def read(self, file: Path, text_column: str) -> FileReading:
        """The texts of a file.

        Raises:
            InputError: the file cannot be read, is not of this format, has no such column of text, or a text is not
                valid Unicode.
        """
        try:
            for number, text, share in self.reader(file, text_column):
                check_unicode(text, str(file) if number is None else f"row {number} of {file}")
                yield text, share
        except InputError:
            raise
        except Exception as error:  # each of the libraries below has its own
            raise InputError(f"{file} cannot be read as {self.name}: {reason(error)}") from error


def text_format(name: str, *extensions: str) -> FileFormat:
    """A format whose files are UTF-8 text, each of them one text."""

    def read(file: Path, text_column: str) -> Rows:
        text = read_text(file)
        if "\0" in text:
            raise InputError(f"{file} is not {name}: it contains null bytes; convert it, or leave it out")
        yield None, text, 1.0

    return FileFormat(name, read, extensions, has_rows=False)


def read_text(file: Path) -> str:
    """The text of a UTF-8 file, packed or not, without a byte order mark, its line ends as `\\n`.

    Raises:
        OSError, ValueError: it cannot be read, or is no such text.
    """
    with io.TextIOWrapper(_opened(file), encoding="utf-8-sig") as opened:
        return opened.read()


def _read_json(file: Path, text_column: str) -> Rows:
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
            yield number, text, share
        elif text is not None:
            kind = type(text).__name__
            raise InputError(f"the column {text_column!r} of {file} holds {kind} in row {number}, not text")
    if columns:
        _check_has_column(columns, text_column, file)


def _json_rows(file: Path) -> Iterator[tuple[Any, float]]:
    """The values of the lines of a file, or of the list or the object that all of it is."""
    size = max(1, file.stat().st_size)
    is_first = True
    with file.open("rb") as packed:
        lines = cast(IO[bytes], gzip.GzipFile(fileobj=packed)) if _is_packed(file) else packed
        for number, line in enumerate(lines, 1):
            line = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
            if not line.strip():
                continue
            if is_first and line.lstrip().startswith(b"["):
                rows = _json_value(line + lines.read(), number)
                yield from ((row, count / len(rows)) for count, row in enumerate(rows, 1))
                return
            try:
                row = _json_value(line, number)
            except ValueError:
                # An object over several lines is one row; a file of lines is not read as a whole to find that out.
                if not (is_first and line.strip() == b"{"):
                    raise
                row = _json_value(line + lines.read(), number)
            is_first = False
            yield row, packed.tell() / size


def _json_value(text: bytes, first_line: int) -> Any:
    """The value of a text that begins at this line of a file, from 1.

    Raises:
        ValueError: it is not one value; the message says where.
    """
    try:
        return json.loads(text.rstrip())
    except json.JSONDecodeError as error:
        raise ValueError(f"line {first_line + error.lineno - 1}, column {error.colno}: {error.msg}") from None


def _separated(delimiter: str) -> Callable[[Path, str], Rows]:
    """Reads files of columns with a line of their names, as spreadsheets write them."""

    def read(file: Path, text_column: str) -> Rows:
        csv.field_size_limit(2**31 - 1)  # of the whole process; its own limit is 128 KiB
        size = max(1, file.stat().st_size)
        with file.open("rb") as packed:
            binary = cast(IO[bytes], gzip.GzipFile(fileobj=packed)) if _is_packed(file) else packed
            rows = csv.reader(io.TextIOWrapper(binary, "utf-8-sig", newline=""), delimiter=delimiter, strict=True)
            columns = next(rows, None)
            if columns is None:
                return
            _check_has_column(columns, text_column, file)
            place = columns.index(text_column)
            number = 0
            for row in rows:
                if not row:
                    continue
                number += 1
                if len(row) != len(columns):
                    raise ValueError(f"row {number} (line {rows.line_num}) has {len(row)} columns, not {len(columns)}")
                yield number, row[place], packed.tell() / size

    return read


def _read_parquet(file: Path, text_column: str) -> Rows:
    from pyarrow import parquet

    with _opened(file) as opened, parquet.ParquetFile(opened) as table:
        check_column(table.schema_arrow, text_column, file)
        numbers, num_rows = itertools.count(1), table.metadata.num_rows
        for rows in table.iter_batches(batch_size=1000, columns=[text_column]):
            for text in rows.column(text_column).to_pylist():
                number = next(numbers)
                if text is not None:
                    yield number, text, number / num_rows


FORMATS = (
    text_format("UTF-8 text", ".txt", ".text", ".md", ".markdown", ".rst"),
    FileFormat("JSON", _read_json, (".json", ".jsonl", ".ndjson")),
    FileFormat("CSV", _separated(","), (".csv",)),
    FileFormat("TSV", _separated("\t"), (".tsv",)),
    FileFormat("Parquet", _read_parquet, (".parquet",)),
)
"""The formats that are read; an extension belongs to one of them, and may be followed by `.gz`."""


def extensions(formats: Iterable[FileFormat]) -> list[str]:
    """The extensions of all these formats."""
    return [extension for file_format in formats for extension in file_format.extensions]


def format_of(file: Path, formats: Iterable[FileFormat]) -> tuple[FileFormat, str]:
    """The format of a file, and the name of the file without the extension, which tells the format.

    Raises:
        InputError: the file has none of the extensions of these formats.
    """
    name = file.name[: -len(PACKED)] if _is_packed(file) else file.name
    for file_format in formats:
        for extension in file_format.extensions:
            if name.lower().endswith(extension):
                return file_format, name[: -len(extension)]
    raise InputError(
        f"{file} has none of the extensions that can be read: {', '.join(extensions(formats))}, each also as {PACKED}"
    )


def check_column(schema: Schema, text_column: str, source: str | Path) -> None:
    """Check that a table has a column of text of that name.

    Raises:
        InputError: it has none.
    """
    _check_has_column(schema.names, text_column, source)
    kind = schema.field(text_column).type
    if not _is_text(kind):
        raise InputError(f"the column {text_column!r} of {source} holds {kind}, not text; choose another column")


def _is_text(kind: DataType) -> bool:
    """Whether values of this type are text in Python, however they are stored: also as categories, or as runs."""
    from pyarrow import BaseExtensionType, types

    if isinstance(kind, BaseExtensionType):
        return _is_text(kind.storage_type)
    if types.is_dictionary(kind) or types.is_run_end_encoded(kind):
        return _is_text(kind.value_type)
    return any(
        is_of_kind(kind) for is_of_kind in (types.is_string, types.is_large_string, types.is_string_view, types.is_null)
    )


def _check_has_column(columns: Sequence[str] | Mapping[str, object], text_column: str, source: str | Path) -> None:
    if isinstance(columns, Sequence) and columns.count(text_column) > 1:
        raise InputError(
            f"the column {text_column!r} stands {columns.count(text_column)} times in {source}; rename one"
        )
    if text_column not in columns:
        raise InputError(
            f"{source} has no column {text_column!r}; choose, or rename, one of its columns: {', '.join(columns)}"
        )


def _is_packed(file: Path) -> bool:
    return file.name.lower().endswith(PACKED)


def _opened(file: Path) -> IO[bytes]:
    """A file as it was before it was packed."""
    return cast(IO[bytes], gzip.open(file)) if _is_packed(file) else file.open("rb")
